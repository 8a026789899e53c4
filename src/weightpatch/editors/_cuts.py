"""Linearised demands, as they are collected: their rows, the Gram matrix of these, and what they ask for."""

from __future__ import annotations

import math
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
        self._rows: list[Vector] = []  # J and C⁻¹ Jᵀ
        self._moves: list[Vector] = []
        self._demand: list[int] = []
        self._b: list[float] = []
        self._slack: list[float] = []  # beyond b, against rounding
        self._groups: dict[int, _Group] = {}
        self._gram = origin.values.new_zeros(0, 0)
        self.weights = origin.values.new_zeros(0)

    @property
    def gram(self) -> Tensor:
        """The Gram matrix ``J C⁻¹ Jᵀ`` of all rows."""
        known, size = len(self._gram), len(self._rows)
        if known < size:
            new = self._space.dots(self._rows, self._moves[known:])
            grown = self._gram.new_zeros(size, size)
            grown[:known, :known], grown[:, known:], grown[known:, :known] = self._gram, new, new[:known].T
            self._gram = grown
        return self._gram

    def knows(self, demand: int) -> bool:
        """Say whether there is a ball of this demand."""
        return demand in self._groups

    def add(self, demand: int, row: Vector, value: float, delta: Vector, slack: float) -> None:
        """Add an inequality; where the demand has it already, rounding lost it, and it asks for a little more.

        Args:
            demand: which one.
            row: its gradient.
            value: its violation at delta.
            delta: where that was found.
            slack: by how much it is overshot.
        """
        for place, known in enumerate(self._rows):
            if self._demand[place] == demand and self._same(known, row):
                self._slack[place] = 2 * self._slack[place] + value
                return
        self._append(demand, row, self._at_origin(row, value, delta), slack)

    def add_ball(self, demand: int, rows: list[Vector], values: list[float], delta: Vector, radius: float) -> None:
        """Add a ball; `values` (k,) are its residuals at delta."""
        size = len(self._rows)
        self._groups[demand] = _Group(list(range(size, size + len(rows))), radius)
        for row, value in zip(rows, values, strict=True):
            self._append(demand, row, self._at_origin(row, value, delta), 0.0)

    def refine(self, demand: int, values: list[float], delta: Vector, radius: float) -> bool:
        """Take the residuals of a ball as they are found at delta: rounding lost it, and it is aimed at further inside.

        Args:
            demand: which one.
            values: its residuals, (k,).
            delta: where they were found.
            radius: how long they may be.

        Returns:
            Whether that can help: it cannot where the centre was aimed at, and what rounding leaves shrinks no more.
        """
        group, length = self._groups[demand], math.hypot(*values)
        hope = group.radius > 0 or length < 0.5 * group.shortest
        group.radius, group.shortest = max(0.0, group.radius - 2 * (length - radius)), min(length, group.shortest)
        for place, value in zip(group.places, values, strict=True):
            self._b[place] = self._at_origin(self._rows[place], value, delta)
        return hope

    def solve(self) -> Dual:
        """Solve for all of them."""
        return least_norm(self.gram, self.right, self._balls())

    @property
    def right(self) -> Tensor:
        """What is asked for: b, and the slack."""
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

    def _append(self, demand: int, row: Vector, b: float, slack: float) -> None:
        move = row if self._metric is None else self._space.applied(self._metric, row, self._eps)
        self._rows.append(row)
        self._moves.append(move)
        self._demand.append(demand)
        self._b.append(b)
        self._slack.append(slack)
        self.weights = torch.cat([self.weights, self.weights.new_zeros(1)])

    def _at_origin(self, row: Vector, value: float, delta: Vector) -> float:
        return value - float(self._space.dot(row, delta) - self._space.dot(row, self._origin))

    def _same(self, one: Vector, two: Vector) -> bool:
        """Say whether they differ by rounding alone."""
        square = two.square
        distance = one.square + square - 2 * float(self._space.dot(one, two))
        return distance <= 1e-8 * square
