"""What a vector holds of one tensor: all of it, some rows of a large readout, or factors where it is of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._factors import Factors, inner_products, inner_products_with, total

_CHUNK = 1 << 14  # numbers of each vector at a time, which stay in a cache


class Part(NamedTuple):
    """A tensor's part.

    Attributes:
        rows: which are held, rising, or None for all; the others are 0.
        values: of these rows, float64.
        factors: what it is held as instead; no rows are held then.
    """

    rows: Tensor | None
    values: Tensor
    factors: Factors | None = None

    @property
    def empty(self) -> bool:
        """Whether it is 0, as nothing is held."""
        return self.factors is None and self.rows is not None and not len(self.rows)

    def whole(self, shape: Sequence[int]) -> Tensor:
        """Return the tensor."""
        if self.factors is not None:
            return self.factors.whole()
        if self.rows is None:
            return self.values
        return self.values.new_zeros(tuple(shape)).index_copy(0, self.rows, self.values)


def empty(like: Tensor, factors: Factors | None = None) -> Part:
    """Return a part that holds no rows."""
    rows = torch.empty(0, dtype=torch.int64, device=like.device)
    return Part(rows, torch.empty(0, *like.shape[1:], dtype=torch.float64, device=like.device), factors)


def dots(ones: Sequence[Part], twos: Sequence[Part]) -> Tensor:
    """Return all inner products of one tensor's parts, (ones, twos)."""
    found = ones[0].values.new_zeros(len(ones), len(twos))
    of_ones, of_twos = ([place for place, part in enumerate(parts) if part.factors] for parts in (ones, twos))
    low_ones, low_twos = ([part.factors for part in parts if part.factors] for parts in (ones, twos))
    if low_ones and low_twos:
        found[_mesh(of_ones, of_twos, found)] = inner_products(low_ones, low_twos)
    plain_ones, plain_twos = (
        [place for place, part in enumerate(parts) if not part.factors and not part.empty] for parts in (ones, twos)
    )
    for place in plain_twos if low_ones else ():
        found[of_ones, place] = inner_products_with(low_ones, twos[place].rows, twos[place].values)
    for place in plain_ones if low_twos else ():
        found[place, of_twos] = inner_products_with(low_twos, ones[place].rows, ones[place].values)
    if plain_ones and plain_twos:
        some, others = [ones[place] for place in plain_ones], [twos[place] for place in plain_twos]
        found[_mesh(plain_ones, plain_twos, found)] = _plain_dots(some, others)
    return found


def _mesh(some: Sequence[int], others: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices of all these rows and columns."""
    rows, columns = (torch.tensor(places, dtype=torch.int64, device=like.device) for places in (some, others))
    return rows[:, None], columns


def products(ones: Sequence[Tensor], twos: Sequence[Tensor]) -> Tensor:
    """Return all inner products of flat tensors, (ones, twos): in one pass over the numbers."""
    found = ones[0].new_zeros(len(ones), len(twos))
    for begin in range(0, len(ones[0]), _CHUNK):
        some = slice(begin, begin + _CHUNK)
        found += torch.stack([one[some] for one in ones]) @ torch.stack([two[some] for two in twos]).T
    return found


def combined(weights: Sequence[float | Tensor], parts: Sequence[Part], shape: Sequence[int]) -> Part:
    """Return the weighted sum, without factors: of them it is one product."""
    scaled = list(zip(weights, parts, strict=True))
    low = [(weight, part.factors) for weight, part in scaled if part.factors]
    if not low:
        return _plain_sum(scaled, shape)
    plain = [(weight, part) for weight, part in scaled if not part.factors and not part.empty]
    whole = total(low)
    return Part(None, whole + _plain_sum(plain, shape).whole(shape) if plain else whole)


def union(rows: Sequence[Tensor]) -> Tensor:
    """Return all of these rows, rising."""
    found: Tensor = torch.unique(torch.cat(list(rows)))
    return found


def _plain_dots(ones: Sequence[Part], twos: Sequence[Part]) -> Tensor:
    if all(part.rows is None for part in (*ones, *twos)):
        return products([one.values.reshape(-1) for one in ones], [two.values.reshape(-1) for two in twos])
    return torch.stack([torch.stack([_dot(one, two) for two in twos]) for one in ones])


def _dot(one: Part, two: Part) -> Tensor:
    held, other = one.rows, two.rows
    if held is None or other is None:
        a = one.values if held is not None or other is None else one.values[other]
        b = two.values if other is not None or held is None else two.values[held]
    else:
        place = torch.searchsorted(other, held).clamp_max(max(len(other) - 1, 0))
        both = other[place] == held if len(other) else torch.zeros_like(held, dtype=torch.bool)
        a, b = one.values[both], two.values[place[both]]
    return (a * b).sum()


def _plain_sum(scaled: Sequence[tuple[float | Tensor, Part]], shape: Sequence[int]) -> Part:
    some = [part.rows for _, part in scaled if part.rows is not None]
    held = union(some) if len(some) == len(scaled) else None
    like = scaled[0][1].values
    found = like.new_zeros(tuple(shape) if held is None else (len(held), *shape[1:]))
    for weight, part in scaled:
        if part.rows is None:
            found += weight * part.values
        else:
            where = part.rows if held is None else torch.searchsorted(held, part.rows)
            found.index_add_(0, where, weight * part.values)
    return Part(held, found)
