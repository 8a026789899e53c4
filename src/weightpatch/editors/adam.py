"""Adam with its bias correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch

from .._calling import Params
from .base import IterativeEditor, Rate, each, root


class AdamState(NamedTuple):
    """The running means of g and g², and how many they hold."""

    first: Params
    second: Params
    steps: int


@final
@dataclass(frozen=True, kw_only=True)
class Adam(IterativeEditor):
    """Adam: ``m ← β₁ m + (1 - β₁) g``, ``v ← β₂ v + (1 - β₂) g²``, ``θ ← θ - α m̂ / (√v̂ + ε)``.

    The hats divide by ``1 - β^t``. Source: Sinitsin et al., Editable Neural Networks, ICLR 2020; Kingma and Ba 2015.

    Args:
        betas: β₁ and β₂, each from 0 to below 1.
        epsilon: ε, in units of the gradient.

    >>> Adam(lr=1e-3)
    Adam(lr=0.001, max_steps=10, keep_weight=0.0, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-08)
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: Rate = 1e-8

    def init(self, params: Params) -> AdamState:
        """Return zero means."""
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return AdamState(zeros, zeros, 0)

    def step(self, params: Params, grads: Params, state: AdamState) -> tuple[Params, AdamState]:
        """Update both means, then move every parameter by ``-α m̂ / (√v̂ + ε)``."""
        (b1, b2), t = self.betas, state.steps + 1
        first = {n: b1 * m + (1 - b1) * grads[n] for n, m in state.first.items()}
        second = {n: b2 * v + (1 - b2) * grads[n].square() for n, v in state.second.items()}
        size = {n: root(v / (1 - b2**t)) + each(self.epsilon, n) for n, v in second.items()}
        moved = {n: p - each(self.lr, n) / (1 - b1**t) * first[n] / size[n] for n, p in params.items()}
        return moved, AdamState(first, second, t)
