"""Vectors over all edited parameters, of which only the rows that are not zero are held: few, at a large readout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from .._calling import Params
from .metric import Metric

_MANY = 1024  # rows from which on it is looked which are zero
_CHUNK = 1 << 14  # numbers of each vector at a time, which stay in a cache


@final
@dataclass(frozen=True, eq=False)
class Vector:
    """One number for each edited parameter.

    Attributes:
        rows: for each tensor the rows that are held, rising, or None for all; the others are 0.
        values: of these rows, tensor after tensor, flat, float64.
    """

    rows: tuple[Tensor | None, ...]
    values: Tensor

    @property
    def dense(self) -> bool:
        """Whether all rows are held."""
        return all(rows is None for rows in self.rows)

    @cached_property
    def square(self) -> float:
        """Its inner product with itself."""
        return float(self.values @ self.values)


@final
class Space:
    """The space of changes of some parameters.

    Args:
        start: the parameters by name.
    """

    def __init__(self, start: Params) -> None:
        self._start, self._names = start, list(start)
        self._some = next(iter(start.values()))

    def zero(self) -> Vector:
        """Return 0."""
        none = torch.empty(0, dtype=torch.int64, device=self._some.device)
        rows = tuple(none if _tall(value) else None for value in self._start.values())
        size = sum(value.numel() for value, held in zip(self._start.values(), rows, strict=True) if held is None)
        return Vector(rows, torch.zeros(size, dtype=torch.float64, device=self._some.device))

    def vector(self, grads: Sequence[Tensor | None]) -> Vector:
        """Return a gradient, whose tensors are in order and of the parameters' shapes; None where it is 0."""
        rows: list[Tensor | None] = []
        values = []
        for grad, value in zip(grads, self._start.values(), strict=True):
            grad = torch.zeros_like(value) if grad is None else grad
            held = _held(grad) if _tall(grad) else None
            rows.append(held)
            values.append((grad if held is None else grad[held]).reshape(-1).double())
        return Vector(tuple(rows), torch.cat(values))

    def dot(self, one: Vector, two: Vector) -> Tensor:
        """Return the inner product, a scalar."""
        if one.dense and two.dense:
            return one.values @ two.values
        total = one.values.new_zeros(())
        for held, values, other, others in zip(one.rows, self._parts(one), two.rows, self._parts(two), strict=True):
            if held is None or other is None:
                a = values if held is not None or other is None else values[other]
                b = others if other is not None or held is None else others[held]
            else:
                place = torch.searchsorted(other, held).clamp_max(max(len(other) - 1, 0))
                both = other[place] == held if len(other) else torch.zeros_like(held, dtype=torch.bool)
                a, b = values[both], others[place[both]]
            total = total + (a * b).sum()
        return total

    def dots(self, ones: Sequence[Vector], twos: Sequence[Vector]) -> Tensor:
        """Return all inner products, (ones, twos): in one pass over the numbers where all rows of all are held."""
        if not all(vector.dense for vector in (*ones, *twos)):
            return torch.stack([torch.stack([self.dot(one, two) for two in twos]) for one in ones])
        total = ones[0].values.new_zeros(len(ones), len(twos))
        for begin in range(0, len(ones[0].values), _CHUNK):
            some = slice(begin, begin + _CHUNK)
            total += torch.stack([v.values[some] for v in ones]) @ torch.stack([v.values[some] for v in twos]).T
        return total

    def combined(self, weights: Iterable[float | Tensor], vectors: Sequence[Vector]) -> Vector:
        """Return the weighted sum; at least one vector."""
        scaled = list(zip(weights, vectors, strict=True))
        if all(vector.dense for vector in vectors):
            whole = torch.zeros_like(vectors[0].values)
            for weight, vector in scaled:
                whole += weight * vector.values
            return Vector(vectors[0].rows, whole)
        rows: list[Tensor | None] = []
        values = []
        parts = [self._parts(vector) for vector in vectors]
        for place, start in enumerate(self._start.values()):
            held = [vector.rows[place] for vector in vectors]
            some = [index for index in held if index is not None]
            union = _union(some) if len(some) == len(held) else None
            shape = start.shape if union is None else (len(union), *start.shape[1:])
            total = torch.zeros(shape, dtype=torch.float64, device=start.device)
            for (weight, vector), part in zip(scaled, parts, strict=True):
                index = vector.rows[place]
                if index is None:
                    total += weight * part[place]
                else:
                    where = index if union is None else torch.searchsorted(union, index)
                    total.index_add_(0, where, weight * part[place])
            rows.append(union)
            values.append(total.reshape(-1))
        return Vector(tuple(rows), torch.cat(values))

    def moved(self, delta: Vector) -> Params:
        """Return the parameters changed by delta, each rounded once to its own dtype."""
        found: Params = {}
        for (name, start), held, part in zip(self._start.items(), delta.rows, self._parts(delta), strict=True):
            if held is None:
                found[name] = (start.double() + part).to(start.dtype)
            else:
                found[name] = start.index_copy(0, held, (start[held].double() + part).to(start.dtype))
        return found

    def shaped(self, vector: Vector) -> Params:
        """Return all parts, by name, in the parameters' shapes."""
        found = {}
        for (name, start), held, part in zip(self._start.items(), vector.rows, self._parts(vector), strict=True):
            found[name] = part if held is None else part.new_zeros(start.shape).index_copy(0, held, part)
        return found

    def applied(self, metric: Metric, row: Vector, eps: float) -> Vector:
        """Return the vector in the dual metric: ``G⁻¹ g C⁻¹``, of its rows alone where these do not mix."""
        by_rows = not metric.two_sided and all(len(layer.second) == 1 for layer in metric.layers.values())
        if row.dense or not by_rows:
            moved, _ = metric.applied(self.shaped(row), eps)
            return Vector((None,) * len(self._names), torch.cat([moved[name].reshape(-1) for name in self._names]))
        row = self._aligned(metric, row)
        parts = dict(zip(self._names, self._parts(row), strict=True))
        moved, _ = metric.applied({name: part for name, part in parts.items() if len(part)}, eps)
        return Vector(row.rows, torch.cat([moved.get(name, part).reshape(-1) for name, part in parts.items()]))

    def _aligned(self, metric: Metric, row: Vector) -> Vector:
        """Let weight and bias of a layer hold the same rows."""
        rows = dict(zip(self._names, row.rows, strict=True))
        parts = dict(zip(self._names, self._parts(row), strict=True))
        for layer in metric.layers.values():
            pair = [name for name in (layer.weight, layer.bias) if name in rows]
            some = [index for name in pair if (index := rows[name]) is not None]
            union = _union(some) if some and len(some) == len(pair) else None
            for name in pair:
                held, start = rows[name], self._start[name]
                if held is not None:
                    total = parts[name].new_zeros(len(start) if union is None else len(union), *start.shape[1:])
                    index = held if union is None else torch.searchsorted(union, held)
                    rows[name], parts[name] = union, total.index_copy(0, index, parts[name])
        return Vector(tuple(rows.values()), torch.cat([part.reshape(-1) for part in parts.values()]))

    def _parts(self, vector: Vector) -> list[Tensor]:
        """Return the held rows of each tensor."""
        shapes: list[tuple[int, ...]] = []
        for start, held in zip(self._start.values(), vector.rows, strict=True):
            shapes.append(tuple(start.shape) if held is None else (len(held), *start.shape[1:]))
        parts = torch.split(vector.values, [math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _union(rows: Sequence[Tensor]) -> Tensor:
    found: Tensor = torch.unique(torch.cat(list(rows)))
    return found


def _tall(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and len(tensor) >= _MANY


def _held(grad: Tensor) -> Tensor | None:
    """Return the rows that are not 0; None where they are more than half."""
    rows = grad.reshape(len(grad), -1).any(1).nonzero().squeeze(1)
    return rows if 2 * len(rows) <= len(grad) else None
