"""Vectors over all edited parameters, held as what they are: some rows of a large readout, or factors of low rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from .._calling import Params
from ._factors import Factors, factors_of, stacked, worthwhile
from ._parts import Part, combined, dots, empty, products, union
from .metric import LayerMetric, Metric

_MANY = 1024  # rows from which on it is looked which are zero


@final
@dataclass(frozen=True, eq=False)
class Vector:
    """One number for each edited parameter.

    Attributes:
        rows: for each tensor the rows that are held, rising, or None for all; the others are 0.
        values: of these rows, tensor after tensor, flat, float64.
        factors: of the tensors that are held as these instead, by their places; no rows of them are held.
    """

    rows: tuple[Tensor | None, ...]
    values: Tensor
    factors: Mapping[int, Factors] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        """Whether all rows are held."""
        return all(rows is None for rows in self.rows)

    @property
    def nbytes(self) -> int:
        """The size of what is held."""
        return self.values.nbytes + sum(side.nbytes for factors in self.factors.values() for side in factors)

    @cached_property
    def square(self) -> float:
        """Its inner product with itself."""
        return float(self.values @ self.values) + sum(factors.square for factors in self.factors.values())


@final
class Space:
    """The space of changes of some parameters.

    Args:
        start: the parameters by name.
        factored: whether gradients of low rank are held as factors.
    """

    def __init__(self, start: Params, *, factored: bool = False) -> None:
        self._start, self._names, self._factored = start, list(start), factored

    def zero(self) -> Vector:
        """Return 0."""
        return _vector([empty(value) if _tall(value) else _zeros(value) for value in self._start.values()])

    def vector(self, grads: Sequence[Tensor | None]) -> Vector:
        """Return a gradient, whose tensors are in order and of the parameters' shapes; None where it is 0."""
        return _vector([self._part(grad, value) for grad, value in zip(grads, self._start.values(), strict=True)])

    def dot(self, one: Vector, two: Vector) -> Tensor:
        """Return the inner product, a scalar."""
        return one.values @ two.values if one.dense and two.dense else self.dots([one], [two])[0, 0]

    def dots(self, ones: Sequence[Vector], twos: Sequence[Vector]) -> Tensor:
        """Return all inner products, (ones, twos)."""
        if all(vector.dense for vector in (*ones, *twos)):
            return products([one.values for one in ones], [two.values for two in twos])
        found = ones[0].values.new_zeros(len(ones), len(twos))
        for some, others in zip(self._by_tensor(ones), self._by_tensor(twos), strict=True):
            found += dots(some, others)
        return found

    def combined(self, weights: Iterable[float | Tensor], vectors: Sequence[Vector]) -> Vector:
        """Return the weighted sum, without factors; at least one vector."""
        weights = list(weights)
        if all(vector.dense for vector in vectors):
            whole = torch.zeros_like(vectors[0].values)
            for weight, vector in zip(weights, vectors, strict=True):
                whole += weight * vector.values
            return Vector(vectors[0].rows, whole)
        each = zip(self._by_tensor(vectors), self._start.values(), strict=True)
        return _vector([combined(weights, parts, value.shape) for parts, value in each])

    def moved(self, delta: Vector) -> Params:
        """Return the parameters changed by delta, each rounded once to its own dtype."""
        found: Params = {}
        for (name, start), part in zip(self._start.items(), self._parts(delta), strict=True):
            rows = None if part.factors else part.rows
            if rows is None:
                found[name] = (start.double() + part.whole(start.shape)).to(start.dtype)
            else:
                found[name] = start.index_copy(0, rows, (start[rows].double() + part.values).to(start.dtype))
        return found

    def shaped(self, vector: Vector) -> Params:
        """Return all parts, by name, in the parameters' shapes."""
        parts = zip(self._start.items(), self._parts(vector), strict=True)
        return {name: part.whole(value.shape) for (name, value), part in parts}

    def applied(self, metric: Metric, row: Vector, eps: float) -> Vector:
        """Return the vector in the dual metric: ``G⁻¹ g C⁻¹``, of its rows alone where these do not mix."""
        return self.all_applied(metric, [row], eps)[0]

    def all_applied(self, metric: Metric, rows: Sequence[Vector], eps: float) -> list[Vector]:
        """Return all of them in the dual metric, all factors together: C⁻¹ is read once."""
        given = [dict(zip(self._names, self._parts(row), strict=True)) for row in rows]
        found: list[dict[str, Part]] = [{} for _ in rows]
        for layer in metric.layers.values():
            some = [place for place, parts in enumerate(given) if layer.weight in parts and parts[layer.weight].factors]
            moved = self._factors_applied(layer, [given[place] for place in some]) if some else []
            for place, parts in zip(some, moved, strict=True):
                found[place] |= parts
        for parts, done in zip(given, found, strict=True):
            rest = {name: part for name, part in parts.items() if name not in done}
            done |= self._plainly_applied(metric, rest, eps) if rest else {}
        return [_vector([parts[name] for name in self._names]) for parts in found]

    def _factors_applied(self, layer: LayerMetric, given: Sequence[dict[str, Part]]) -> list[dict[str, Part]]:
        """Return weight and bias of a layer in the dual metric, of parts that hold factors of its weight."""
        bias = layer.bias if layer.bias in self._names else None
        joined: list[Factors] = []
        for parts in given:
            factors = parts[layer.weight].factors
            assert factors is not None
            left, right = reversed(factors) if layer.transposed else factors
            if bias is not None:  # a column more: the product of the bias and the last unit vector
                left = torch.cat([left, parts[bias].whole(self._start[bias].shape)[None]])
                right = functional.pad(right, (0, 1, 0, 1))
                right[-1, -1] = 1.0
            joined.append(Factors(left, right))
        moved = layer.moved(stacked(joined), with_bias=bias is not None)
        ranks, like = [len(factors.left) for factors in joined], self._start[layer.weight]
        found = []
        for left, right in zip(*(torch.split(side, ranks) for side in moved), strict=True):
            kept = right if bias is None else right[:, :-1]
            sides = (kept, left) if layer.transposed else (left, kept)
            found.append({layer.weight: empty(like, Factors(*sides))})
            if bias is not None:
                found[-1][bias] = Part(None, right[:, -1] @ left)
        return found

    def _plainly_applied(self, metric: Metric, parts: dict[str, Part], eps: float) -> dict[str, Part]:
        mixed = any(len(layer.second) > 1 or layer.transposed for layer in metric.layers.values())
        by_rows = not metric.two_sided and not mixed
        if not by_rows or all(part.rows is None for part in parts.values()):
            whole = {name: part.whole(self._start[name].shape) for name, part in parts.items()}
            return {name: Part(None, value) for name, value in metric.applied(whole, eps)[0].items()}
        parts = self._aligned(metric, parts)
        moved, _ = metric.applied({name: part.values for name, part in parts.items() if not part.empty}, eps)
        return {name: Part(part.rows, moved.get(name, part.values)) for name, part in parts.items()}

    def _aligned(self, metric: Metric, parts: dict[str, Part]) -> dict[str, Part]:
        """Let weight and bias of a layer hold the same rows."""
        found = dict(parts)
        for layer in metric.layers.values():
            pair = [name for name in (layer.weight, layer.bias) if name in parts]
            some = [index for name in pair if (index := parts[name].rows) is not None]
            rows = union(some) if some and len(some) == len(pair) else None
            for name in pair:
                held, values = parts[name].rows, parts[name].values
                if held is not None:
                    shape = (len(self._start[name]) if rows is None else len(rows), *values.shape[1:])
                    index = held if rows is None else torch.searchsorted(rows, held)
                    found[name] = Part(rows, values.new_zeros(shape).index_copy(0, index, values))
        return found

    def _part(self, grad: Tensor | None, like: Tensor) -> Part:
        low = self._factored and worthwhile(like)
        if grad is None and (low or _tall(like)):
            return empty(like)
        if grad is None:
            return _zeros(like)
        held = _held(grad) if _tall(grad) else None
        if held is not None:
            return Part(held, grad[held].double())
        factors = factors_of(grad) if low else None
        return Part(None, grad.double()) if factors is None else empty(like, factors)

    def _by_tensor(self, vectors: Sequence[Vector]) -> list[tuple[Part, ...]]:
        return list(zip(*(self._parts(vector) for vector in vectors), strict=True))

    def _parts(self, vector: Vector) -> list[Part]:
        """Return what is held of each tensor."""
        shapes: list[tuple[int, ...]] = []
        for start, held in zip(self._start.values(), vector.rows, strict=True):
            shapes.append(tuple(start.shape) if held is None else (len(held), *start.shape[1:]))
        values = torch.split(vector.values, [math.prod(shape) for shape in shapes])
        each = enumerate(zip(vector.rows, values, shapes, strict=True))
        return [Part(rows, part.view(shape), vector.factors.get(place)) for place, (rows, part, shape) in each]


def _vector(parts: Sequence[Part]) -> Vector:
    factors = {place: part.factors for place, part in enumerate(parts) if part.factors is not None}
    return Vector(tuple(part.rows for part in parts), torch.cat([part.values.reshape(-1) for part in parts]), factors)


def _zeros(like: Tensor) -> Part:
    return Part(None, torch.zeros_like(like, dtype=torch.float64))


def _tall(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and len(tensor) >= _MANY


def _held(grad: Tensor) -> Tensor | None:
    """Return the rows that are not 0; None where they are more than half."""
    rows = grad.reshape(len(grad), -1).any(1).nonzero().squeeze(1)
    return rows if 2 * len(rows) <= len(grad) else None
