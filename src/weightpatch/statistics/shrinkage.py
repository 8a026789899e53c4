"""How much of its mean eigenvalue a second moment needs on its diagonal: one half of the data is told by the other."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import LayerMoments

__all__ = ["OUTPUTS", "UNKNOWN", "estimated", "held_out", "ledoit_wolf"]

OUTPUTS = 0.1  # of the outputs' side, whatever the data: the least drawdown of 0.01 to 1, from 100 images to 10,000
UNKNOWN = 1.0  # where there are no two halves to compare: the directions that were seen count twice as much as others

_WIDEST = 1536  # inputs up to which eigenvalues are taken, in a second or two
_LEAST, _MOST, _TRIED = 5e-6, 5.0, 61  # from the rounding of float32 features to directions that hardly differ
_NULL = 1e-12  # of the largest eigenvalue: directions below it are in neither half


def estimated(layer: LayerMoments) -> float:
    """Return the shrinkage of a layer's E[x xᵀ], from two halves of the items.

    It is `held_out` for layers of up to 1,536 inputs and `ledoit_wolf` for wider ones, where eigenvalues would take
    long; 1 where all items are in one half.
    """
    half = layer.half
    if half is None or half.count in (0, layer.count):
        return UNKNOWN
    one, two = half.total / half.count, (layer.total - half.total) / (layer.count - half.count)
    rule = held_out if layer.total.shape[-1] <= _WIDEST else ledoit_wolf
    return rule(one, two, half.count / layer.count)


def held_out(one: Tensor, two: Tensor, share: float = 0.5) -> float:
    """Return the shrinkage for the moment of both halves, from how well each half's predicts the other's.

    A half of the data, a share n₁ / n, needs n / n₁ times the whole's s. So ``M₁ + s (n / n₁) μ₁ 1``, with μ₁ the mean
    eigenvalue, is up to scale the covariance of a normal distribution, and s is what makes the other half's M₂
    likeliest: the least sum, over both ways, of ``d log tr(C₁⁻¹ M₂) + log det C₁``, with C₁ that covariance and d the
    number of directions that either half shows. Edits are no draws from that distribution: with half of this s they
    changed least on validation data, and that is returned, 2.5e-6 to 2.5.

    Args:
        one: second moment of one half, (groups, d, d), float64; the scale does not matter.
        two: the same of the other half.
        share: of the positions, those in the first half.
    """
    grid = torch.logspace(0, 1, _TRIED, _MOST / _LEAST, dtype=torch.float64, device=one.device) * _LEAST
    one, two = _scaled(one), _scaled(two)
    (ones, first), (twos, second) = torch.linalg.eigh(one), torch.linalg.eigh(two)
    rank = torch.full((len(one),), one.shape[-1], device=one.device)
    if bool((_null(ones) & _null(twos)).any()):
        rank = (~_null(torch.linalg.eigvalsh(one + two))).sum(-1)
    loss = _loss(ones, first, two, rank, grid / share) + _loss(twos, second, one, rank, grid / (1 - share))
    return float(grid[loss.argmin()]) / 2


def ledoit_wolf(one: Tensor, two: Tensor, share: float) -> float:
    """Return the shrinkage with the least expected squared error of ``(1 - ρ) M + ρ μ 1``, as ρ / (1 - ρ).

    ρ is E||M - E M||² / ||M - μ 1||². Two independent halves tell its numerator, ``share (1 - share) ||M₁ - M₂||²``,
    also where the positions of an item depend on each other. Source: Ledoit and Wolf, *A well-conditioned estimator for
    large-dimensional covariance matrices*, 2004.

    Args:
        one: second moment of one half, (groups, d, d), float64.
        two: the same of the other half.
        share: of the positions, those in the first half.
    """
    both = share * one + (1 - share) * two
    noise = share * (1 - share) * (one - two).square().sum()
    mean = both.diagonal(dim1=-2, dim2=-1).mean(-1)
    spread = both.square().sum() - both.shape[-1] * mean.square().sum()
    kept = 1 - noise / spread.clamp_min(torch.finfo(spread.dtype).tiny)
    return float((1 / kept.clamp_min(1 / (1 + _MOST)) - 1).clamp_min(_LEAST))


def _scaled(moment: Tensor) -> Tensor:
    """Return the moment with a mean eigenvalue of 1 in each group; 0 stays 0."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    return moment / mean.clamp_min(torch.finfo(moment.dtype).tiny)[:, None, None]


def _null(values: Tensor) -> Tensor:
    """Say which eigenvalues, in ascending order, are 0 to rounding."""
    return values <= _NULL * values[:, -1:]


def _loss(values: Tensor, vectors: Tensor, told: Tensor, rank: Tensor, grid: Tensor) -> Tensor:
    """Return twice the negative log-likelihood of a half, given the other's eigenvalues, at each s, over all groups."""
    shares = ((told @ vectors) * vectors).sum(-2)  # along each eigenvector, (groups, d)
    shrunk = values.clamp_min(0)[:, None] + grid[:, None]  # (groups, s, d)
    trace = (shares[:, None] / shrunk).sum(-1).clamp_min(torch.finfo(grid.dtype).tiny)
    determinant = shrunk.log().sum(-1) - (values.shape[-1] - rank)[:, None] * grid.log()
    found: Tensor = (rank[:, None] * trace.log() + determinant).sum(0)
    return found
