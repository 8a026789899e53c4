"""Steps by the sign of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from .._calling import Params
from .base import IterativeEditor, Rate, each


@final
@dataclass(frozen=True, kw_only=True)
class RProp(IterativeEditor):
    """Sign descent: ``θ ← θ - α sign(g)``: every parameter with a gradient moves by exactly α.

    Source: Sinitsin et al., Editable Neural Networks, ICLR 2020, after Riedmiller and Braun 1993 without its
    adaptive rates.

    >>> RProp(lr=1e-3)
    RProp(lr=0.001, max_steps=10, keep_weight=0.0, weight_decay=0.0)
    """

    lr: Rate = 1e-3

    def init(self, params: Params) -> None:
        """Return no state."""

    def step(self, params: Params, grads: Params, state: None) -> tuple[Params, None]:
        """Move every parameter by ``-α sign(g)``."""
        return {name: p - each(self.lr, name) * grads[name].sign() for name, p in params.items()}, None
