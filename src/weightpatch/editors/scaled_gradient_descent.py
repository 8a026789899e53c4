"""Gradient descent whose rate is divided by the norm of the first gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .._calling import Params
from .base import IterativeEditor, Rate, each, root


@final
@dataclass(frozen=True, kw_only=True)
class ScaledGradientDescent(IterativeEditor):
    """Scaled gradient descent: ``θ ← θ - α g / ||g_0||``, the global norm of the *first* gradient over all parameters.

    Source: Sinitsin et al., Editable Neural Networks, ICLR 2020, section on editors compared.

    >>> ScaledGradientDescent(lr=0.1)
    ScaledGradientDescent(lr=0.1, max_steps=10, keep_weight=0.0, weight_decay=0.0)
    """

    lr: Rate = 1e-1

    def init(self, params: Params) -> None:
        """Return no norm: the first gradient sets it."""

    def step(self, params: Params, grads: Params, state: Tensor | None) -> tuple[Params, Tensor]:
        """Move every parameter by ``-α g / ||g_0||``; a zero first gradient moves nothing."""
        if state is None:
            norm = root(torch.stack([g.square().sum() for g in grads.values()]).sum())
            state = torch.where(norm > 0, norm, torch.ones_like(norm))
        return {name: p - each(self.lr, name) * grads[name] / state for name, p in params.items()}, state
