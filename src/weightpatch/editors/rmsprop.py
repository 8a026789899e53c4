"""Steps divided by a running root mean square of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from .._calling import Params
from .base import IterativeEditor, Rate, each


@final
@dataclass(frozen=True, kw_only=True)
class RMSProp(IterativeEditor):
    """RMSProp: ``r_0 = g_0²``, ``r_t = β r_(t-1) + (1 - β) g_t²``, ``θ ← θ - α g / √(r + ε)``.

    The first step is therefore close to ``α sign(g)``. Source: Sinitsin et al., Editable Neural Networks, ICLR 2020,
    whose code starts r at the first squared gradient and puts ε under the root.

    Args:
        beta: β, the share of the past in the running mean, from 0 to below 1.
        epsilon: ε, in squared units of the gradient.

    >>> RMSProp(lr=1e-3)
    RMSProp(lr=0.001, max_steps=10, keep_weight=0.0, weight_decay=0.0, beta=0.5, epsilon=1e-06)
    """

    lr: Rate = 1e-3
    beta: Rate = 0.5
    epsilon: Rate = 1e-6

    def init(self, params: Params) -> None:
        """Return no running mean: the first gradient sets it."""

    def step(self, params: Params, grads: Params, state: Params | None) -> tuple[Params, Params]:
        """Update r, then move every parameter by ``-α g / √(r + ε)``."""
        squares = {name: g.square() for name, g in grads.items()}
        mean = squares if state is None else {n: self._mean(n, state[n], s) for n, s in squares.items()}
        moved = {
            n: p - each(self.lr, n) * grads[n] / (mean[n] + each(self.epsilon, n)).sqrt() for n, p in params.items()
        }
        return moved, mean

    def _mean(self, name: str, past: Tensor, square: Tensor) -> Tensor:
        beta = each(self.beta, name)
        return beta * past + (1 - beta) * square
