"""Linearised demands, as they are collected: their rows, the Gram matrix of these, and what they ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ._dual import Ball, Dual, least_norm
from ._vectors import Space, Vector
from .metric import Metric


@final
@dataclass(eq=False)
class _Group:
    """The rows of one ball, its radius as it is aimed at, and the shortest residual found so far."""

    places: list[int]
    radius: float
    shortest: float = math.inf


@final
class Cuts:
    """Demands ``J (Δ - Δ_0) ≤ -b`` and ``||J_g (Δ - Δ_0) + b_g|| ≤ ρ_g``, and multipliers of them.

    Args:
        space: of Δ.
        metric: C and G; the Euclidean one when None.
        eps: how exact the rows are, relative.
        origin: Δ_0.

    Attributes:
        weights: w of where the search is: ``Δ = Δ_0 - Σ w_i C⁻¹ J_iᵀ``, one a row.
    """

    def __init__(self, space: Space, metric: Metric | None, eps: float, origin: Vector) -> None:
        self._space, self._metric, self._eps, self._origin = space, metric, eps, origin
        self._rows: list[Vector] = []  # J
        self._moves: list[Vector] = []  # C⁻¹ Jᵀ, of those that the Gram matrix has
        self._demand: list[int] = []
        self._b: list[float] = []  # of rows that the Gram matrix does not have yet, the violation where the search is
        self._slack: list[float] = []  # beyond b, against rounding
        self._groups: dict[int, _Group] = {}
        self._gram = origin.values.new_zeros(0, 0)
        self.weights = origin.values.new_zeros(0)

    @property
    def gram(self) -> Tensor:
        """The Gram matrix ``J C⁻¹ Jᵀ`` of all rows."""
        known, size = len(self._gram), len(self._rows)
        if known < size:
            new = self._rows[known:]
            self._moves += new if self._metric is None else self._space.all_applied(self._metric, new, self._eps)
            columns = self._space.dots(self._rows, self._moves[known:])
            grown = self._gram.new_zeros(size, size)
            grown[:known, :known], grown[:, known:], grown[known:, :known] = self._gram, columns, columns[:known].T
            self._gram = grown
            for place in range(known, size):
                self._b[place] += self._gone(place)
        return self._gram

    def knows(self, demand: int) -> bool:
        """Say whether there is a ball of this demand."""
        return demand in self._groups

    def add(self, demand: int, row: Vector, value: float, slack: float) -> None:
        """Add an inequality; where the demand has it already, rounding lost it, and it asks for a little more.

        Args:
            demand: which one.
            row: its gradient.
            value: its violation where the search is.
            slack: by how much it is overshot.
        """
        places = [place for place, known in enumerate(self._demand) if known == demand]
        same = self._same(places, row)
        if same is None:
            self._append(demand, row, value, slack)
        else:
            self._slack[same] = 2 * self._slack[same] + value

    def add_ball(self, demand: int, rows: list[Vector], values: list[float], radius: float) -> None:
        """Add a ball; `values` (k,) are its residuals where the search is."""
        size = len(self._rows)
        self._groups[demand] = _Group(list(range(size, size + len(rows))), radius)
        for row, value in zip(rows, values, strict=True):
            self._append(demand, row, value, 0.0)

    def refine(self, demand: int, values: list[float], radius: float) -> bool:
        """Take the residuals of a ball as they are found now: rounding lost it, and it is aimed at further inside.

        Args:
            demand: which one.
            values: its residuals where the search is, (k,).
            radius: how long they may be.

        Returns:
            Whether that can help: it cannot where the centre was aimed at, and what rounding leaves shrinks no more.
        """
        group, length = self._groups[demand], math.hypot(*values)
        hope = group.radius > 0 or length < 0.5 * group.shortest
        group.radius, group.shortest = max(0.0, group.radius - 2 * (length - radius)), min(length, group.shortest)
        for place, value in zip(group.places, values, strict=True):
            self._b[place] = value + self._gone(place)
        return hope

    def solve(self) -> Dual:
        """Solve for all of them."""
        return least_norm(self.gram, self.right, self._balls())

    @property
    def right(self) -> Tensor:
        """What is asked for: b, and the slack."""
        _ = self.gram  # b is known with it
        return self.weights.new_tensor([b + slack for b, slack in zip(self._b, self._slack, strict=True)])

    def alone(self) -> Tensor:
        """Return multipliers that meet each row as if there were no other."""
        right = self.right.clone()
        inequality = torch.ones_like(right, dtype=torch.bool)
        for places, _ in self._balls():
            inequality[places] = False
        size = self.gram.diagonal()
        right = torch.where(inequality, right.clamp_min(0), right) / size.clamp_min(torch.finfo(right.dtype).tiny)
        return right.where(size > 0, 0.0)

    def change(self, weights: Tensor) -> Vector:
        """Return Δ."""
        return self._space.combined(*self._terms(weights, self._origin))

    def length(self, weights: Tensor) -> float:
        """Return what ``Σ w_i C⁻¹ J_iᵀ`` adds to the outputs, in root mean square; without a metric its norm."""
        if self._metric is None or not self._metric.two_sided:
            return float((weights @ self.gram @ weights).clamp_min(0).sqrt())
        way = self._space.combined(*self._terms(weights, self._space.zero()))
        return math.sqrt(sum(float(spread) for spread in self._metric.spreads(self._space.shaped(way)).values()))

    def of_demands(self, weights: Tensor, count: int) -> Tensor:
        """Return the multiplier of each demand, (count,): the sum of its inequalities', the length of its ball's."""
        demands = torch.tensor(self._demand, dtype=torch.int64, device=weights.device)
        found = weights.new_zeros(count).index_add(0, demands, weights.abs())
        for demand, group in self._groups.items():
            found[demand] = weights[group.places].norm()
        return found

    def gap(self, weights: Tensor) -> float:
        """Return the relative difference of the least norm's square and its dual's, which agree at the optimum."""
        norm = float(weights @ self.gram @ weights)
        dual = float(weights @ self.right) - sum(radius * float(weights[p].norm()) for p, radius in self._balls())
        return abs(norm - dual) / max(norm, 1e-300) if len(weights) else 0.0

    def _terms(self, weights: Tensor, start: Vector) -> tuple[list[float], list[Vector]]:
        used = weights.nonzero().squeeze(1).tolist()
        return [1.0, *(-float(weights[place]) for place in used)], [start, *(self._moves[place] for place in used)]

    def _balls(self) -> list[Ball]:
        device = self.weights.device
        return [Ball(torch.tensor(group.places, device=device), group.radius) for group in self._groups.values()]

    def _append(self, demand: int, row: Vector, value: float, slack: float) -> None:
        self._rows.append(row)
        self._demand.append(demand)
        self._b.append(value)
        self._slack.append(slack)
        self.weights = torch.cat([self.weights, self.weights.new_zeros(1)])

    def _gone(self, place: int) -> float:
        """Return ``-J_i (Δ - Δ_0)``, of where the search is."""
        known = len(self._gram)  # the others weigh nothing yet
        return float(self._gram[place] @ self.weights[:known])

    def _same(self, places: Sequence[int], row: Vector) -> int | None:
        """Return which of these rows differs from another by rounding alone; such are as long."""
        length = _length(row)
        near = [place for place in places if abs(_length(self._rows[place]) - length) <= 1e-4 * length]
        if near:
            inner = self._space.dots([self._rows[place] for place in near], [row]).squeeze(1).tolist()
            for place, product in zip(near, inner, strict=True):
                if self._rows[place].square + row.square - 2 * product <= 1e-8 * row.square:
                    return place
        return None


def _length(row: Vector) -> float:
    return math.sqrt(max(row.square, 0.0))  # rounding may leave less than 0
