"""Newton's method for the demands themselves: the least step that meets all of them as linearised where it stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from .._calling import Params
from ..constraints import Piece
from ..errors import InvalidInput, NotEditable
from ..problem import Problem
from ._dual import least_norm
from ._vectors import Space, Vector
from .base import IterativeEditor, Rate, each
from .metric import Metric

_RIVALS = 2  # of one demand added in a round, each a row: few of all classes are active, and a round is a pass
_ROUNDS = 10  # in which the demands and rivals that a step would break join it
_SLACK = 64  # roundings by which a demand is overshot: in a batch of another size the model answers a little otherwise
_SLIGHT = 1e-3  # of a violation, or of a logit: what is left, where answers are affine, is of damping and rounding
_ELASTIC = 1e-6  # the damping from which on demands that contradict each other are traded against each other


@final
@dataclass(frozen=True, kw_only=True)
class GaussNewton(IterativeEditor):
    """Newton's method for inequalities: ``θ ← θ + α Δ``, Δ of ``min ½ ||Δ||_C² s.t. l_i + <G_i, Δ> ≤ -m_i`` for all i.

    With l_i the violations at θ and G_i their gradients. At a linear readout one step is `MinimumNorm`'s answer to
    classes, as long to a few parts in 10⁵; in an inner layer the steps are those of its rounds, without a trust region
    (α below 1 damps them) and without a certificate. In return a step is differentiable, so that Editable Training can
    go through the very solve that edits are made with later. Of several answers that violate a demand, the rivals of
    `Classified`, the farthest are linearised each. Demands that hold, and rivals that do not violate, join where the
    step would break them.

    The active set A, where λ > 0, is found without a graph. Where every active demand has λ > 0 and every other one is
    met with room to spare (strict complementarity), A stays the same nearby, the step is ``Δ = -C⁻¹ G_Aᵀ λ`` with
    ``λ = (G_A C⁻¹ G_Aᵀ + D)⁻¹ (l_A + m_A)``, and it is these optimality conditions that are differentiated, not the way
    to them: with ``u = C⁻¹ G_Aᵀ λ``,

        ``dλ = (G_A C⁻¹ G_Aᵀ + D)⁻¹ (d(l_A + m_A) - d(G_A u)|_λ - dD λ)``, ``dΔ = -du|_λ - C⁻¹ G_Aᵀ dλ``,

    where ``|_λ`` holds λ. That asks for second derivatives of the active demands alone, and for one more C⁻¹ in all. C
    is held fixed. At a kink, where A changes, it is the derivative on one side.

    D is the diagonal of ``G C⁻¹ Gᵀ`` times the damping, as Marquardt's. Nearly dependent demands cannot ask for more
    than about ``1 / √damping`` times the step that the farthest one takes alone. Beyond that, and where the linearised
    demands contradict each other, the step is a compromise: the least sum of squares of what they miss. A demand that
    no edit changes, to first order, has no say in a step.

    `Within` is linearised as the squared distance that it is, of which a step takes about half the distance;
    `MinimumNorm` meets it at once. Source: Robinson, *Extension of Newton's method to nonlinear functions with values
    in a cone*, 1972; Daniel, *Newton's method for nonlinear inequalities*, 1973; the derivative of a quadratic
    programme's solution, Amos and Kolter, *OptNet*, ICML 2017.

    Args:
        lr: α, in full steps.
        metric: ``||Δ||_C`` from `weightpatch.statistics`; the Euclidean norm when not given.
        overshoot: m_i, as a share of l_i, in demands that are violated, where the step without it leaves one unmet; at
            least 0. In the others, and in addition, it is what rounding and damping may take. At a linear readout it is
            not asked for, and the step is the least one.
        damping: relative to the diagonal; above 0.

    Raises:
        InvalidInput: a setting is out of range, or a penalty is given: Δ is the least change as it is.

    >>> objective = wp.EditableObjective(model, GaussNewton(max_steps=1), parameters="fc.weight")
    >>> loss = objective(fix, keep=keep)
    """

    lr: Rate = 1.0
    metric: Metric | None = None
    overshoot: float = 0.05
    damping: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise InvalidInput(f"GaussNewton was given metric={self.metric!r:.80}; expected a Metric or None")
        if not 0 <= self.overshoot < math.inf:
            raise InvalidInput(
                f"GaussNewton was given overshoot={self.overshoot}; expected a finite number, at least 0"
            )
        if not 0 < self.damping < math.inf:
            raise InvalidInput(f"GaussNewton was given damping={self.damping}; expected a finite number above 0")
        for name in ("keep_weight", "weight_decay"):
            if getattr(self, name):
                raise InvalidInput(
                    f"GaussNewton was given {name}={getattr(self, name)}; its steps are the least ones in the metric "
                    "and have no penalty: leave it out, pass metric=weightpatch.statistics.second_moments(model, "
                    "inputs).metric(), or use Preconditioned"
                )

    def init(self, params: Params) -> None:
        """Return nothing: there is no state."""

    def step(self, params: Params, grads: Params, state: None) -> tuple[Params, None]:
        """Move every parameter by ``-α`` times its direction, which is ``-Δ``."""
        return {name: p - each(self.lr, name) * grads[name] for name, p in params.items()}, None

    def direction(self, problem: Problem, params: Params, *, create_graph: bool = False) -> Params | None:
        """Return ``-Δ``, solved for as the class says; None where the loop ends."""
        pieces = problem.constraint.pieces(problem.at(params))
        worst = torch.cat([piece.violation.detach() for piece in pieces]).max()
        if not 0 < float(worst) < math.inf:
            return None
        if not any(piece.violation.requires_grad for piece in pieces):
            raise NotEditable(f"the constraint does not depend on {sorted(params)}; choose other parameters")
        asked = _Asked(self, params)
        found = pieces
        for _ in range(_ROUNDS):
            left = _violated(found)
            new = [place for place in left if place not in asked.places]
            if new:
                asked.add(pieces, new)
            elif not left or not asked.asks_for_more(pieces, found, left):
                break
            with torch.no_grad():
                change = asked.change()
                moved = {name: p + change[name].to(p.dtype) for name, p in params.items()}
                found = problem.constraint.pieces(problem.at(moved))
        if not create_graph:
            change = asked.change()
            return {name: -change[name].to(p.dtype) for name, p in params.items()}
        return asked.differentiable(pieces)


class _Place(NamedTuple):
    """A number that must not be above 0: of which piece, which demand, and which of its rivals; None without rivals."""

    piece: int
    demand: int
    rival: int | None


def _violated(pieces: Sequence[Piece]) -> list[_Place]:
    """Return the farthest numbers above 0 of every demand, at least one of each that is violated."""
    places = []
    for number, piece in enumerate(pieces):
        demands = (piece.violation.detach() > 0).nonzero().squeeze(1)
        if piece.rivals is None:
            places += [_Place(number, demand, None) for demand in demands.tolist()]
            continue
        far, rivals = piece.rivals.detach()[demands].topk(min(_RIVALS, piece.rivals.shape[1]))
        for demand, values, order in zip(demands.tolist(), far.tolist(), rivals.tolist(), strict=True):
            # The farthest counts in a tie too, which is not above 0.
            pairs = enumerate(zip(values, order, strict=True))
            places += [_Place(number, demand, rival) for i, (value, rival) in pairs if i == 0 or value > 0]
    return places


class _Asked:
    """The linearised demands of one step, and its multipliers.

    Attributes:
        places: of each row.
        beyond: whether more is asked for than the linearised demands, as answers bend.
    """

    def __init__(self, editor: GaussNewton, params: Params) -> None:
        self.beyond = False
        self._editor, self._params, self._moved = editor, params, list(params.values())
        self._space = Space({name: p.detach() for name, p in params.items()}, factored=True)
        self._eps = max(torch.finfo(p.dtype).eps for p in self._moved)
        self.places: list[_Place] = []
        self._rows: list[Vector] = []  # G and C⁻¹ Gᵀ
        self._moves: list[Vector] = []
        self._gram = self._moved[0].detach().new_zeros(0, 0, dtype=torch.float64)
        self._right = self._weights = self._taken = self._gram.new_zeros(0)
        self._damping = editor.damping

    def add(self, pieces: Sequence[Piece], places: Sequence[_Place]) -> None:
        """Linearise more demands, and solve for all."""
        numbers = [_number(pieces, place) for place in places]
        rows = [self._space.vector(self._gradient(number, create_graph=False)) for number in numbers]
        metric = self._editor.metric
        moves = rows if metric is None else self._space.all_applied(metric, rows, self._eps)
        known = len(self._rows)
        self._rows += rows
        self._moves += moves
        new = self._space.dots(self._rows, moves)
        grown = new.new_zeros(len(new), len(new))
        grown[:known, :known], grown[:, known:], grown[known:] = self._gram, new, new.mT
        self._gram = (grown + grown.mT) / 2
        aims = [self._aim(number).detach().reshape(1) for number in numbers]
        self._right = torch.cat([self._right, *aims])
        self._taken = torch.cat([self._taken, self._taken.new_zeros(len(aims))])
        self.places += places
        self._solve()

    def asks_for_more(self, pieces: Sequence[Piece], found: Sequence[Piece], left: Sequence[_Place]) -> bool:
        """Solve for more, where the step leaves something unmet; say whether there was more to ask for.

        At first it is what damping takes from the multipliers, where hardly anything is left: answers are affine.
        """
        before, after = (torch.stack([_number(some, place).detach() for place in left]) for some in (pieces, found))
        slight = bool((after <= _SLIGHT * before.abs().clamp_min(1)).all())
        if slight and self._damping == self._editor.damping and not bool(self._taken.any()):
            self._taken = self._damping * self._gram.diagonal() * self._weights
        elif not self.beyond:
            self.beyond = True
        else:
            return False
        aims = [self._aim(_number(pieces, place)).detach().reshape(1) for place in self.places]
        self._right = torch.cat(aims) + self._taken
        self._solve()
        return True

    def change(self) -> Params:
        """Return Δ, float64."""
        used = self._weights.nonzero().squeeze(1).tolist()
        weights = [0.0, *(-float(self._weights[place]) for place in used)]
        total = self._space.combined(weights, [self._space.zero(), *(self._moves[place] for place in used)])
        return self._space.shaped(total)

    def differentiable(self, pieces: Sequence[Piece]) -> Params:
        """Return -Δ with a graph: its value is `change`'s, its derivative that of the optimality conditions."""
        active = self._weights.nonzero().squeeze(1)
        weights, numbers = self._weights[active], [_number(pieces, self.places[place]) for place in active.tolist()]
        if not numbers or not bool(weights.isfinite().all()):
            return {name: torch.full_like(p, float(weights.sum())) for name, p in self._params.items()}
        rows = [self._gradient(number, create_graph=True) for number in numbers]
        pushed = self._pushed(rows, weights)
        moves = [list(self._space.shaped(self._moves[place]).values()) for place in active.tolist()]
        gram = self._gram[active][:, active]
        # Of the diagonal, which is quadratic in a row, this has the value and the derivative.
        size = 2 * torch.stack([_inner(row, move) for row, move in zip(rows, moves, strict=True)]) - gram.diagonal()
        shares = torch.stack([_inner(row, pushed) for row in rows]) + self._damping * size * weights
        missed = torch.stack([self._aim(number) for number in numbers]) + self._taken[active] - shares
        damped = gram + self._damping * gram.diagonal().diag()
        more = torch.linalg.pinv(damped, hermitian=True) @ missed
        found: Params = {}
        for (name, p), first, *parts in zip(self._params.items(), pushed, *moves, strict=True):
            found[name] = (first + torch.tensordot(more, torch.stack(parts), 1)).to(p.dtype)
        return found

    def _solve(self) -> None:
        if not bool(self._gram.isfinite().all()):  # of a gradient: the step is NaN, and the loop ends there
            self._weights = torch.full_like(self._right, torch.nan)
            return
        size = self._gram.diagonal()
        some = size > 0
        gram, right, size = self._gram[some][:, some], self._right[some], size[some].diag()
        self._damping = self._editor.damping
        dual = least_norm(gram + self._damping * size, right)
        while not dual.feasible and self._damping < 1:  # from there on none is far from meeting its own part alone
            self._damping = max(10 * self._damping, _ELASTIC)
            dual = least_norm(gram + self._damping * size, right)
        self._weights = torch.zeros_like(self._right)
        self._weights[some] = dual.multipliers

    def _aim(self, number: Tensor) -> Tensor:
        """Return ``l + m``, float64."""
        value = number.double()
        slack = _SLACK * torch.finfo(number.dtype).eps + 2 * self._editor.damping
        share = self._editor.overshoot if self.beyond else 0.0
        return value + share * value.relu() + slack * value.abs().clamp_min(1)

    def _gradient(self, number: Tensor, *, create_graph: bool) -> Sequence[Tensor | None]:
        if not number.requires_grad:
            return [None] * len(self._moved)
        return torch.autograd.grad(number, self._moved, retain_graph=True, create_graph=create_graph, allow_unused=True)

    def _pushed(self, rows: Sequence[Sequence[Tensor | None]], weights: Tensor) -> list[Tensor]:
        """Return ``u = C⁻¹ G_Aᵀ λ`` with λ held, float64."""
        total: Params = {}
        for (name, p), *grads in zip(self._params.items(), *rows, strict=True):
            terms = [w * g.double() for w, g in zip(weights, grads, strict=True) if g is not None]
            total[name] = torch.stack(terms).sum(0) if terms else torch.zeros_like(p, dtype=torch.float64)
        metric = self._editor.metric
        return list((total if metric is None else metric.applied(total, self._eps)[0]).values())


def _number(pieces: Sequence[Piece], place: _Place) -> Tensor:
    piece = pieces[place.piece]
    return piece.violation[place.demand] if place.rival is None else _rivals(piece)[place.demand, place.rival]


def _rivals(piece: Piece) -> Tensor:
    assert piece.rivals is not None
    return piece.rivals


def _inner(row: Sequence[Tensor | None], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(g.double() * o).sum() for g, o in zip(row, other, strict=True) if g is not None]).sum()
