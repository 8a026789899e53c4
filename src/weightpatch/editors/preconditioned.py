"""Gradient descent in the metric of a layer's inputs, with a Polyak step inside a trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .._calling import Params
from ..errors import InvalidInput
from .base import IterativeEditor, Rate, each
from .metric import Metric


@final
@dataclass(frozen=True, kw_only=True)
class Preconditioned(IterativeEditor):
    """Preconditioned gradient descent: ``θ ← θ - α η C⁻¹ g``, ``η = min(l_e / gᵀ C⁻¹ g, r min_l p_l / ||g||_l)``.

    C is the second moment of the inputs of each edited layer, so that the step changes the layer's answers on reference
    data as little as it can for the progress it makes. The first η is Polyak's: it solves the linearised demand. The
    second is a trust region: what one step adds to a layer's outputs stays, in root mean square on the reference data,
    below r times these outputs' own, p_l; ``||g||_l² = gᵀ C⁻¹ g`` of that layer. Source: Polyak, *Introduction to
    Optimization*, 1987; the metric is the input side of K-FAC (Martens and Grosse 2015) and that of ROME (Meng et al.
    2022).

    Args:
        lr: α, in Polyak steps.
        metric: from `weightpatch.statistics`.
        radius: r.

    >>> Preconditioned(metric=moments.metric(), max_steps=20)
    """

    lr: Rate = 1.05
    metric: Metric
    radius: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.metric, Metric):
            raise InvalidInput(
                f"Preconditioned was given metric={self.metric!r:.80}; expected weightpatch.statistics."
                "second_moments(model, inputs).metric()"
            )
        if not self.radius > 0:
            raise InvalidInput(f"Preconditioned was given radius={self.radius}; expected a number above 0")

    def scaled(self, value: Tensor, grads: Params) -> Params:
        """Return ``η C⁻¹ g``."""
        moved, squares = self.metric.applied(grads)
        total = torch.stack(list(squares.values())).sum()
        tiny = torch.finfo(total.dtype).tiny
        eta = value / total.clamp_min(tiny)
        for name, square in squares.items():
            allowed = self.radius * self.metric.layers[name].power ** 0.5
            eta = torch.minimum(eta, allowed * square.clamp_min(tiny).rsqrt())
        return {name: eta * d for name, d in moved.items()}

    def init(self, params: Params) -> None:
        """Return nothing: there is no state."""

    def step(self, params: Params, grads: Params, state: None) -> tuple[Params, None]:
        """Move every parameter by ``-α`` times its scaled direction."""
        return {name: p - each(self.lr, name) * grads[name] for name, p in params.items()}, None
