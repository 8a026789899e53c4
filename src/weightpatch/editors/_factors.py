"""Matrices of low rank as their factors: a linear layer's gradient is Σ_p g_p x_pᵀ over the positions asked about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_RANK = 8  # up to which factors are looked for
_SIDE, _NUMBERS = 32, 1 << 14  # of a matrix from which on that pays


class Factors(NamedTuple):
    """The matrix ``leftᵀ right``.

    Attributes:
        left: (rank, rows), float64.
        right: (rank, columns), float64.
    """

    left: Tensor
    right: Tensor

    def whole(self) -> Tensor:
        """Return the matrix."""
        return self.left.mT @ self.right

    @property
    def square(self) -> float:
        """The sum of its squares."""
        return float(((self.left @ self.left.mT) * (self.right @ self.right.mT)).sum())


def worthwhile(tensor: Tensor) -> bool:
    """Say whether it may pay to look for factors."""
    return tensor.ndim == 2 and min(tensor.shape) >= _SIDE and tensor.numel() >= _NUMBERS


def factors_of(matrix: Tensor) -> Factors | None:
    """Return what a matrix is the product of, to rounding; None where its rank is too high, or it is not finite.

    Rank 1 is tried first, in few passes of the matrix; then it is compared with the row space of a random sketch.
    """
    if matrix.dtype not in (torch.float32, torch.float64):  # a half's rounding is no rounding of what is computed
        return None
    eps, length = torch.finfo(matrix.dtype).eps, float(matrix.norm())
    if not 0 < length < math.inf:
        return (
            Factors(*(matrix.new_zeros(0, size, dtype=torch.float64) for size in matrix.shape)) if not length else None
        )
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(len(matrix), generator=generator, dtype=matrix.dtype, device="cpu").to(matrix.device)
    left = matrix @ _unit(probe @ matrix)  # the sum that the probe takes may cancel, the next ones do not
    right = _unit(left @ matrix)
    left = matrix @ right
    if float(torch.addr(matrix, left, right, alpha=-1).norm()) <= 8 * eps * length:
        return Factors(left.double()[None], right.double()[None])
    sketch = torch.randn(_RANK + 4, len(matrix), generator=generator, dtype=matrix.dtype, device="cpu").to(
        matrix.device
    )
    basis, sizes = torch.linalg.qr((sketch @ matrix).mT)
    if not float(sizes[-1, -1].abs()) <= math.sqrt(eps) * float(sizes[0, 0].abs()):
        return None
    shares = matrix @ basis
    if not float(torch.addmm(matrix, shares, basis.mT, alpha=-1).norm()) <= 8 * eps * length:
        return None
    u, s, v = torch.linalg.svd(shares.double(), full_matrices=False)
    rank = int((s > eps * s[0]).sum())
    if rank > _RANK:
        return None
    return Factors((u[:, :rank] * s[:rank]).mT.contiguous(), v[:rank] @ basis.double().mT)


def total(terms: Iterable[tuple[float | Tensor, Factors]]) -> Tensor:
    """Return a weighted sum, whole: a single product."""
    lefts, rights = zip(*((weight * left, right) for weight, (left, right) in terms), strict=True)
    return Factors(torch.cat(lefts), torch.cat(rights)).whole()


def inner_products(ones: Sequence[Factors], twos: Sequence[Factors]) -> Tensor:
    """Return all inner products, (ones, twos)."""
    one, two = stacked(ones), stacked(twos)
    products = (one.left @ two.left.mT) * (one.right @ two.right.mT)
    return summed(summed(products, ones).mT, twos).mT


def inner_products_with(ones: Sequence[Factors], rows: Tensor | None, values: Tensor) -> Tensor:
    """Return inner products with a matrix of which these rows are held, or all, (ones,)."""
    one = stacked(ones)
    left = one.left if rows is None else one.left[:, rows]
    return summed(((left @ values) * one.right).sum(1), ones)


def stacked(terms: Sequence[Factors]) -> Factors:
    """Return all factors, one after another."""
    return Factors(torch.cat([term.left for term in terms]), torch.cat([term.right for term in terms]))


def summed(values: Tensor, terms: Sequence[Factors]) -> Tensor:
    """Sum what there is of each factor, along the first dimension, over those of a term."""
    ranks = torch.tensor([len(term.left) for term in terms], device=values.device)
    owners = torch.repeat_interleave(torch.arange(len(terms), device=values.device), ranks)
    found: Tensor = values.new_zeros(len(terms), *values.shape[1:]).index_add_(0, owners, values)
    return found


def _unit(vector: Tensor) -> Tensor:
    found: Tensor = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
    return found
