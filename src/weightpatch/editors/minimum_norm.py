"""The smallest change that meets every demand: exact where the answers are affine in what is edited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .._calling import leaves, read
from ..constraints import Piece
from ..errors import InvalidInput, NotEditable
from ..problem import Problem
from ._cuts import Cuts
from ._dual import Dual
from ._vectors import Space, Vector
from .base import Certificate, Editor, Solution
from .metric import Metric

_BEYOND_TARGET = 8  # how many times as far it is looked whether answers are affine: a kink may lie behind the target
_SLACK = 256  # roundings by which a demand is overshot: in a batch of another size the model answers a little otherwise
_RIVALS = 24  # added in a round, of all its demands: of thousands of classes few matter, and a round is a pass of all
_ROUND = 5e8  # bytes that the rivals of one round may take
_EQUATIONS = 256  # outputs of one demand up to which each is an equation of its own
_TOGETHER = 64  # rivals of one demand in a round where answers are not affine, where each is a backward pass
_PATIENCE = 12  # rounds where answers are not affine that bring the demands no nearer
_BEYOND = 0.05  # by which share of its violation a demand that is not affine is overshot


@final
@dataclass(frozen=True, kw_only=True)
class MinimumNorm(Editor):
    """Solve ``min ||Δ||_C s.t. l_i(θ + Δ) ≤ 0`` for all demands i: every violated one is linearised, again and again.

    Demands that a solution violates are linearised there and added, so that rivals and kept samples join when they
    matter: of a vocabulary few do, and only their rows are held and changed. A demand about a distance, as `Within`, is
    an equation for each number of the output, up to the radius allowed, and the others are the largest of affine
    functions at a linear readout: the answer is then *the* least-norm one, and the certificate says so, or names the
    demands that contradict each other. Elsewhere each round linearises all demands where it is, and makes the least
    move that solves these, inside a trust region; such an answer is not the least one, `Shrink` makes it smaller. Where
    it does not get there it returns the round whose violations were the least in sum, and stops when 12 brought none.
    Source: Kelley, *The Cutting-Plane Method*, 1960; for an inner layer, Sotoudeh and Thakur, *Provable Repair of Deep
    Neural Networks*, PLDI 2021, solve one such problem.

    Args:
        metric: ``||Δ||_C`` from `weightpatch.statistics`; the Euclidean norm when not given.
        max_steps: the most rounds.
        radius: where answers are not affine, what one round may add to the outputs of the edited layers together, in
            root mean square on the reference data and relative to these outputs' own; without a metric, in the
            parameters' own norm, and without bound where that is 0.

    >>> from weightpatch.statistics import second_moments
    >>> moments = second_moments(model, images, parameters="fc.weight")
    >>> wp.edit(model, fix, MinimumNorm(metric=moments.metric()), parameters="fc.*")
    Edit(satisfied, ...)
    """

    metric: Metric | None = None
    max_steps: int = 50
    radius: float = 0.5

    def __post_init__(self) -> None:
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise InvalidInput(f"MinimumNorm was given metric={self.metric!r:.80}; expected a Metric or None")
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise InvalidInput(f"MinimumNorm was given max_steps={self.max_steps!r}; expected an integer, at least 1")
        if not self.radius > 0:
            raise InvalidInput(f"MinimumNorm was given radius={self.radius}; expected a number above 0")

    def run(self, problem: Problem) -> Solution:
        """Add linearised demands until none is violated, or until they contradict each other."""
        search, steps = _Search(self.metric, problem), 0
        while search.linearise(last=steps == self.max_steps):
            dual = search.solve()
            if not dual.feasible:
                search.look_around()
                return search.solution(steps, dual)
            search.move(dual, self.radius)
            steps += 1
        return search.solution(steps)


class _Search:
    """Where the search is, and what has been linearised so far.

    Attributes:
        affine: whether the answers were affine in the parameters on every way gone so far.
    """

    def __init__(self, metric: Metric | None, problem: Problem) -> None:
        self._metric, self._problem = metric, problem
        self._names = list(problem.start)
        self._space = Space(problem.start, factored=True)
        self._delta = self._space.zero()
        self._power = 0.0 if metric is None else sum(metric.layers[name].power for name in self._layers(metric))
        self._size = math.sqrt(sum(float(p.double().square().sum()) for p in problem.start.values()))
        self._eps = max(torch.finfo(value.dtype).eps for value in problem.start.values())
        self.affine, self._demands = True, 0
        self._best, self._since = (math.inf, self._delta), 0  # the least violation in sum, and where; rounds since then
        self._leading: dict[int, list[int]] = {}  # of each demand, the rivals that the last round linearised
        self._restart()

    def _layers(self, metric: Metric) -> list[str]:
        return [key for key, layer in metric.layers.items() if {layer.weight, layer.bias} & set(self._names)]

    def _restart(self) -> None:
        """Forget every linearisation, and measure from here."""
        self._cuts = Cuts(self._space, self._metric, self._eps, self._delta)

    def linearise(self, *, last: bool = False) -> bool:
        """Add the demands that are violated here; say whether there was one that may be met in rounds to come."""
        params = {name: value.requires_grad_() for name, value in self._space.moved(self._delta).items()}
        with torch.enable_grad():
            pieces = self._problem.constraint.pieces(self._problem.at(params))
            violation = torch.cat([piece.violation for piece in pieces])
        self._demands = len(violation)
        values = violation.detach().double()
        self._note(float(values.clamp_min(0).sum()))
        met, finite = not bool((values > 0).any()), bool(values.isfinite().all())
        if last or met or not finite or self._since > _PATIENCE or self._problem.expired:
            return False
        if not violation.requires_grad:
            raise NotEditable(f"the constraint does not depend on {sorted(self._names)}; choose other parameters")
        if not self.affine:
            self._restart()
        first, moved, hope = 0, list(params.values()), False
        for piece in pieces:
            for place, value in enumerate(values[first : first + len(piece.violation)].tolist()):
                if value <= 0 and self.affine:
                    continue
                residual = None if piece.residual is None else piece.residual[place]
                if residual is None or len(residual) > _EQUATIONS:
                    size = self._add(first + place, violation[first + place], value, moved)
                    violated, room = int((values > 0).sum()), _ROUND / (2 * size)
                    most = int(min(_RIVALS / violated if self.affine else _TOGETHER, room / violated))
                    self._add_rivals(first + place, piece, place, moved, max(1, most))
                    hope = True
                else:
                    hope = self._add_ball(first + place, residual, piece.radius, moved) or hope
            first += len(piece.violation)
        return hope

    def _note(self, violation: float) -> None:
        """Note where the search has been; where answers are affine a later round is the better one."""
        if violation < self._best[0] or self.affine:
            self._best, self._since = (violation, self._delta), 0
        else:
            self._since += 1

    def _add(self, demand: int, violation: Tensor, value: float, moved: list[Tensor]) -> int:
        """Add one demand, linearised; return the bytes of its row."""
        slack = self._rounding(violation) * max(1.0, abs(value))
        slack += 0.0 if self.affine else _BEYOND * max(value, 0.0)
        row = self._row(violation, moved)
        self._cuts.add(demand, row, value, slack)
        return max(row.nbytes, 1)

    def _add_rivals(self, demand: int, piece: Piece, place: int, moved: list[Tensor], most: int) -> None:
        """Add what else violates the demand.

        Where answers are not affine a round starts anew, and the farthest rival alone counts at first; where another
        one takes the lead the next time, twice as many have to be met together.
        """
        if piece.rivals is None:
            return
        rivals = piece.rivals[place].detach()
        if not self.affine:
            known = self._leading.get(demand, [])
            turned = bool(known) and float(rivals.max()) > 0 and int(rivals.argmax()) not in known
            most = min(most, max(1, len(known)) * (2 if turned else 1))
        values, places = rivals.topk(min(most, len(rivals)))
        for value, rival in zip(values.tolist()[1:], places.tolist()[1:], strict=True):
            if value > 0 or not self.affine:
                self._add(demand, piece.rivals[place, rival], value, moved)
        if not self.affine:
            self._leading[demand] = places.tolist()

    def _add_ball(self, demand: int, residual: Tensor, radius: float, moved: list[Tensor]) -> bool:
        """Add a demand that is about a distance, or refine it where it is known; say whether that can help."""
        values = residual.detach().double()
        length = float(values.norm())
        if self._cuts.knows(demand):
            return self._cuts.refine(demand, values.tolist(), radius)
        aim = max(0.0, radius - self._rounding(residual) * max(1.0, length)) * (1.0 if self.affine else 1 - _BEYOND)
        rows = [self._row(part, moved) for part in residual]
        self._cuts.add_ball(demand, rows, values.tolist(), aim)
        return True

    def _row(self, number: Tensor, moved: list[Tensor]) -> Vector:
        grads: Sequence[Tensor | None] = [None] * len(moved)
        if number.requires_grad:
            grads = torch.autograd.grad(number, moved, retain_graph=True, allow_unused=True)
        return self._space.vector(grads)

    def _rounding(self, values: Tensor) -> float:
        eps = torch.finfo(values.dtype).eps
        return (_SLACK if eps < 1e-5 else 4) * eps

    def solve(self) -> Dual:
        """Solve for all that was linearised."""
        return self._cuts.solve()

    def move(self, dual: Dual, radius: float) -> None:
        """Go to the solution; only so far as the trust region reaches where answers are not affine."""
        cuts, target = self._cuts, self._cuts.change(dual.multipliers)
        self.affine = self.affine and self._affine_towards(target)
        share, way = 1.0, dual.multipliers - cuts.weights
        if not self.affine:
            length = cuts.length(way)
            reach = radius * (math.sqrt(self._power) if self._power else self._size) or math.inf
            share = min(1.0, reach / length) if length else 1.0
        cuts.weights = cuts.weights + share * way
        self._delta = target if share == 1.0 else cuts.change(cuts.weights)

    def look_around(self) -> None:
        """See whether answers are affine before a contradiction is believed: no way may have been gone yet."""
        self.affine = self.affine and self._affine_towards(self._cuts.change(self._cuts.weights + self._cuts.alone()))

    def solution(self, steps: int, dual: Dual | None = None) -> Solution:
        """Return the best place of the search, with the multipliers of each demand."""
        weights = self._cuts.weights if dual is None else dual.multipliers
        each = self._cuts.of_demands(weights, self._demands)
        bad = () if dual is None or dual.feasible else tuple((each > 1e-9 * each.max()).nonzero().squeeze(1).tolist())
        certificate = Certificate(each, bad, self.affine, 0.0 if bad else self._cuts.gap(weights))
        return Solution(self._space.moved(self._best[1]), steps, certificate)

    def _affine_towards(self, target: Vector) -> bool:
        """Compare the demands' answers there with those interpolated from here and from well beyond."""
        far = self._space.combined((1.0 - _BEYOND_TARGET, _BEYOND_TARGET), (self._delta, target))
        here = self._answers(self._delta)
        for a, b, m in zip(here, self._answers(far), self._answers(target), strict=True):
            between = torch.lerp(a, b, 1 / _BEYOND_TARGET)
            scale = float(torch.maximum(a.abs(), b.abs()).max())
            if not float((between - m).abs().max()) <= 64 * torch.finfo(m.dtype).eps * scale:
                return False
        return bool(here)

    @torch.no_grad()
    def _answers(self, delta: Vector) -> list[Tensor]:
        """Return every tensor that the demands read; where they do not say which one, all that are floating."""
        seen: list[Tensor] = []
        function = self._problem.at(self._space.moved(delta))
        asked = dict.fromkeys(part.output for part in self._problem.constraint.conjuncts)

        def noted(*args: object, **kwargs: object) -> object:
            answer = function(*args, **kwargs)
            found = [leaf for output in asked for leaf in leaves(read(answer, output))]
            seen.extend(leaf for leaf in found if leaf.is_floating_point())
            return answer

        self._problem.constraint.violation(noted)
        return seen
