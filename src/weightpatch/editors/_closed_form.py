"""Values under keys, solved for in closed form, and values by one normalised gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import InvalidInput
from .base import root

__all__ = ["NormalisedGradient", "alike", "closed_form"]

_ROUNDING = 1e-4  # how far a key may be from itself, computed in a batch of another size, relative to its norm


@final
@dataclass(frozen=True)
class NormalisedGradient:
    """Values by one gradient, with nothing searched: ``r_i = -η ||k̂_i||² ĝ_i``, g the gradient of the violation.

    The hats divide every feature by its root mean square over the keys of the edit. Source: UltraEdit (Gu et al. 2025),
    which subtracts means too, and carries both on from edit to edit: without them a batch of one can move.

    Args:
        lr: η, in units of the layer's output; above 0.
    """

    lr: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InvalidInput(f"NormalisedGradient was given lr={self.lr}; expected a finite number above 0")

    def residuals(self, keys: Tensor, gradient: Tensor) -> Tensor:
        """Return R, (m, out), for keys (m, width) and a gradient (m, out)."""
        sizes = _normalised(keys).square().sum(1, keepdim=True)
        return -self.lr * sizes * _normalised(gradient)


def closed_form(keys: Tensor, residuals: Tensor, preconditioned: Tensor, *, exact: bool) -> Tensor:
    """Return ``Δ = R (Kᵀ H K + s I)⁻¹ Kᵀ H``, (out, width), of tensors with a row for each key.

    Args:
        keys: Kᵀ, (m, width).
        residuals: Rᵀ, (m, out).
        preconditioned: Kᵀ H, (m, width).
        exact: s = 0, by a pseudo-inverse, as keys may be the same or out of reach of H; else s = 1.
    """
    gram = preconditioned @ keys.mT
    gram = (gram + gram.mT) / 2
    if exact:
        solved: Tensor = torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ preconditioned
    else:
        solved = torch.linalg.solve(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device), preconditioned)
    return residuals.mT @ solved


def alike(keys: Tensor) -> Tensor:
    """Return which value each key gets, (m,): the same for keys that are the same, since no weights tell them apart."""
    keys = keys.double()
    near = torch.cdist(keys, keys) <= _ROUNDING * keys.norm(dim=1, keepdim=True)
    first = near.to(torch.uint8).argmax(1)  # of equal numbers the first one
    found: Tensor = torch.unique(first, return_inverse=True)[1]
    return found


def _normalised(features: Tensor) -> Tensor:
    size = root(features.square().mean(0))
    return features / size.where(size > 0, 1)
