"""Plain gradient descent, the editor of the paper's first equation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from .._calling import Params
from .base import IterativeEditor, Rate, each


@final
@dataclass(frozen=True, kw_only=True)
class GradientDescent(IterativeEditor):
    """Gradient descent: ``θ ← θ - α g`` with ``g = ∇_θ l_e(θ)``.

    Source: Sinitsin et al., Editable Neural Networks, ICLR 2020, equation 1.

    >>> GradientDescent(lr=1e-2, max_steps=10)
    GradientDescent(lr=0.01, max_steps=10, keep_weight=0.0, weight_decay=0.0)
    """

    lr: Rate = 1e-2

    def init(self, params: Params) -> None:
        """Return no state."""

    def step(self, params: Params, grads: Params, state: None) -> tuple[Params, None]:
        """Move every parameter by ``-α g``."""
        return {name: p - each(self.lr, name) * grads[name] for name, p in params.items()}, None
