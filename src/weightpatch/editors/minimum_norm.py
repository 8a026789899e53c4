"""The smallest change that meets every demand: exact where the answers are affine in what is edited."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .._calling import Params
from ..errors import InvalidInput, NotEditable
from ..problem import Problem
from ._dual import Dual, least_norm
from .base import Certificate, Editor, Solution
from .metric import Metric

_BEYOND_TARGET = 8  # how many times as far it is looked whether answers are affine: a kink may lie behind the target
_SLACK = 64  # roundings by which a demand is overshot: in a batch of another size the model answers a little otherwise
_BEYOND = 0.05  # by which share of its violation a demand that is not affine is overshot


@final
@dataclass(frozen=True, kw_only=True)
class MinimumNorm(Editor):
    """Solve ``min ||Δ||_C s.t. l_i(θ + Δ) ≤ 0`` for all demands i: every violated one is linearised, again and again.

    Demands that a solution violates are linearised there and added, so that rivals and kept samples join when they
    matter. At a linear readout each demand is the largest of affine functions: the answer is then *the* least-norm one,
    and the certificate says so, or names the demands that contradict each other. Elsewhere each round linearises all
    demands where it is, and makes the least move that solves these, inside a trust region; such an answer is not the
    least one, `Shrink` makes it smaller. Source: Kelley, *The Cutting-Plane Method*, 1960; for an inner layer, Sotoudeh
    and Thakur, *Provable Repair of Deep Neural Networks*, PLDI 2021, solve one such problem.

    Args:
        metric: ``||Δ||_C`` from `weightpatch.statistics`; the Euclidean norm when not given.
        max_steps: the most rounds.
        radius: where answers are not affine, what one round may add to the outputs of the edited layers together, in
            root mean square on the reference data and relative to these outputs' own; without a metric, in the
            parameters' own norm, and without bound where that is 0.

    >>> MinimumNorm(metric=moments.metric())
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
        search = _Search(self.metric, problem)
        for steps in range(self.max_steps):
            if not search.linearise():
                return search.solution(steps)
            dual = search.solve()
            if not dual.feasible:
                search.look_around()
                return search.solution(steps, dual)
            search.move(dual, self.radius)
        return search.solution(self.max_steps)


class _Search:
    """The linearised demands ``J (Δ - Δ_0) ≤ -b`` so far, and where the search is.

    Attributes:
        affine: whether the answers were affine in the parameters on every way gone so far.
    """

    def __init__(self, metric: Metric | None, problem: Problem) -> None:
        self._metric, self._problem = metric, problem
        self._names = list(problem.start)
        self._start = torch.cat([p.reshape(-1) for p in problem.start.values()]).double()
        self._delta = torch.zeros_like(self._start)
        self._power = 0.0 if metric is None else sum(metric.layers[name].power for name in self._layers(metric))
        self._eps = max(torch.finfo(value.dtype).eps for value in problem.start.values())
        self.affine, self._demands = True, 0
        self._restart()

    def _layers(self, metric: Metric) -> list[str]:
        return [key for key, layer in metric.layers.items() if {layer.weight, layer.bias} & set(self._names)]

    def _restart(self) -> None:
        """Forget every linearisation, and measure from here."""
        self._origin = self._delta
        self._rows: list[Tensor] = []  # J and C⁻¹ Jᵀ, one flat vector a cut
        self._moves: list[Tensor] = []
        self._demand: list[int] = []
        self._b: list[float] = []
        self._slack: list[float] = []  # beyond b, against rounding
        self._gram = self._start.new_zeros(0, 0)
        self._weights = self._start.new_zeros(0)  # Δ = Δ_0 - Σ w_i C⁻¹ J_iᵀ

    def linearise(self) -> bool:
        """Add the demands that are violated here; say whether there was one."""
        params = {name: value.requires_grad_() for name, value in self._params(self._delta).items()}
        with torch.enable_grad():
            violation = self._problem.violation(params)
        self._demands = len(violation)
        values = violation.detach().double()
        if not bool((values > 0).any()) or not bool(values.isfinite().all()):
            return False
        if not violation.requires_grad:
            raise NotEditable(f"the constraint does not depend on {sorted(self._names)}; choose other parameters")
        if not self.affine:
            self._restart()
        eps, moved = torch.finfo(violation.dtype).eps, list(params.values())
        for place, value in enumerate(values.tolist()):
            if value > 0 or not self.affine:
                grads = torch.autograd.grad(violation[place], moved, retain_graph=True, allow_unused=True)
                pairs = zip(grads, moved, strict=True)
                row = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])
                slack = (_SLACK if eps < 1e-5 else 4) * eps * max(1.0, abs(value)) + (
                    0.0 if self.affine else _BEYOND * max(value, 0.0)
                )
                self._add(place, row.double(), value, slack)
        return True

    def _add(self, demand: int, row: Tensor, value: float, slack: float) -> None:
        """Add one cut; where the demand has it already, rounding lost it, and it asks for a little more."""
        b = value - float(row @ (self._delta - self._origin))
        for place, known in enumerate(self._rows):
            if self._demand[place] == demand and float((known - row).norm()) <= 1e-4 * float(row.norm()):
                self._slack[place] = 2 * self._slack[place] + value
                return
        self._rows.append(row)
        self._moves.append(self._applied(row))
        self._demand.append(demand)
        self._b.append(b)
        self._slack.append(slack)
        new = torch.stack([other @ self._moves[-1] for other in self._rows])
        grown = self._gram.new_zeros(len(new), len(new))
        grown[:-1, :-1], grown[-1], grown[:, -1] = self._gram, new, new
        self._gram = grown
        self._weights = torch.cat([self._weights, self._weights.new_zeros(1)])

    def solve(self) -> Dual:
        """Solve for all cuts."""
        return least_norm(self._gram, self._right())

    def _right(self) -> Tensor:
        return self._gram.new_tensor([b + slack for b, slack in zip(self._b, self._slack, strict=True)])

    def move(self, dual: Dual, radius: float) -> None:
        """Go to the solution; only so far as the trust region reaches where answers are not affine."""
        target = self._combined(dual.multipliers)
        self.affine = self.affine and self._affine_towards(target)
        share = 1.0
        if not self.affine:
            way = dual.multipliers - self._weights
            length = math.sqrt(max(float(way @ self._gram @ way), 0.0))
            reach = radius * (math.sqrt(self._power) if self._power else float(self._start.norm())) or math.inf
            share = min(1.0, reach / length) if length else 1.0
        self._weights = self._weights + share * (dual.multipliers - self._weights)
        self._delta = target if share == 1.0 else self._combined(self._weights)

    def look_around(self) -> None:
        """See whether answers are affine before a contradiction is believed: no way may have been gone yet."""
        alone = self._right().clamp_min(0) / self._gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
        alone = alone.where(self._gram.diagonal() > 0, 0.0)
        self.affine = self.affine and self._affine_towards(self._combined(self._weights + alone))

    def solution(self, steps: int, dual: Dual | None = None) -> Solution:
        """Return where the search is, with the multipliers of each demand."""
        weights = self._weights if dual is None else dual.multipliers
        demands = torch.tensor(self._demand, dtype=torch.int64)
        each = weights.new_zeros(self._demands).index_add(0, demands, weights)
        bad = () if dual is None or dual.feasible else tuple((each > 1e-9 * each.max()).nonzero().squeeze(1).tolist())
        norm = float(weights @ self._gram @ weights)
        gap = abs(norm - float(weights @ self._right())) / max(norm, 1e-300)
        certificate = Certificate(each, bad, self.affine, gap if len(weights) and not bad else 0.0)
        return Solution(self._params(self._delta), steps, certificate)

    def _applied(self, row: Tensor) -> Tensor:
        if self._metric is None:
            return row
        moved, _ = self._metric.applied(self._shaped(row), self._eps)
        return torch.cat([moved[name].reshape(-1) for name in self._names])

    def _combined(self, weights: Tensor) -> Tensor:
        total = self._origin.clone()
        for place in weights.nonzero().squeeze(1).tolist():
            total -= weights[place] * self._moves[place]
        return total

    def _shaped(self, flat: Tensor) -> Params:
        parts = torch.split(flat, [value.numel() for value in self._problem.start.values()])
        return {name: part.view_as(self._problem.start[name]) for name, part in zip(self._names, parts, strict=True)}

    def _params(self, delta: Tensor) -> Params:
        start = self._problem.start
        return {name: value.to(start[name].dtype) for name, value in self._shaped(self._start + delta).items()}

    def _affine_towards(self, target: Tensor) -> bool:
        """Compare the demands' answers there with those interpolated from here and from well beyond."""
        far = self._delta + _BEYOND_TARGET * (target - self._delta)
        for a, b, m in zip(self._answers(self._delta), self._answers(far), self._answers(target), strict=True):
            between = torch.lerp(a, b, 1 / _BEYOND_TARGET)
            scale = float(torch.maximum(a.abs(), b.abs()).max())
            if not float((between - m).abs().max()) <= 64 * torch.finfo(m.dtype).eps * scale:
                return False
        return True

    @torch.no_grad()
    def _answers(self, delta: Tensor) -> list[Tensor]:
        """Return every tensor that the demands read."""
        seen: list[Tensor] = []
        function = self._problem.at(self._params(delta))

        def noted(*args: object, **kwargs: object) -> object:
            answer = function(*args, **kwargs)
            seen.extend([answer] if isinstance(answer, Tensor) else [])
            return answer

        self._problem.constraint.violation(noted)
        return seen
