"""Gradient descent with a heavy ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from .._calling import Params
from .base import IterativeEditor, Rate, each


@final
@dataclass(frozen=True, kw_only=True)
class Momentum(IterativeEditor):
    """Momentum: ``v ← μ v + g``, ``θ ← θ - α v``, with v starting at 0.

    Source: Sinitsin et al., Editable Neural Networks, ICLR 2020; Polyak 1964.

    Args:
        momentum: μ, the share of the last direction that is kept, from 0 to below 1.

    >>> Momentum(lr=1e-2)
    Momentum(lr=0.01, max_steps=10, keep_weight=0.0, weight_decay=0.0, momentum=0.9)
    """

    lr: Rate = 1e-2
    momentum: Rate = 0.9

    def init(self, params: Params) -> Params:
        """Return v = 0."""
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def step(self, params: Params, grads: Params, state: Params) -> tuple[Params, Params]:
        """Update v, then move every parameter by ``-α v``."""
        velocity = {name: each(self.momentum, name) * v + grads[name] for name, v in state.items()}
        return {name: p - each(self.lr, name) * velocity[name] for name, p in params.items()}, velocity
