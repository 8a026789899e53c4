"""What a change of a layer costs: the mean square of what it adds to the layer's outputs on reference data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from .._calling import Params
from ..errors import InvalidInput

__all__ = ["LayerMetric", "Metric"]

_RANK = 8  # gradients of a linear layer have at most the rank of the items that are asked about


@final
@dataclass(frozen=True, eq=False)
class LayerMetric:
    """The metric of one linear or convolution layer: ``||Δ||² = tr(Δ C Δᵀ) = E ||Δ x||²`` over its reference inputs x.

    Attributes:
        weight: the name of its weight.
        bias: the name of its bias, or None.
        second: E[x xᵀ] per group of channels, with a constant 1 as the last input, (groups, fan_in + 1, fan_in + 1),
            float64; of a convolution x is what the kernel covers at one position.
        power: E ||y||² of its outputs y at one position.
        shrinkage: C is ``second`` plus this share of its mean eigenvalue on the diagonal.
        energy: None, or the share of the inputs' energy that edits must not touch at all: C⁻¹ becomes the projector on
            the other directions.
    """

    weight: str
    bias: str | None
    second: Tensor
    power: float
    shrinkage: float = 0.01
    energy: float | None = None
    _made: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def inverse(self, like: Tensor, *, with_weight: bool = True, with_bias: bool = True) -> Tensor:
        """Return C⁻¹, (groups, d, d), for the inputs of the parts that are edited, in the dtype of `like`."""
        key = (with_weight, with_bias, like.dtype, like.device)
        if key not in self._made:
            last = self.second.shape[-1] - 1
            index = slice(None if with_weight else last, None if with_bias else last)
            self._made[key] = self._inverse(self.second[:, index, index]).to(like)
        return self._made[key]

    def _inverse(self, second: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(second)
        values = values.clamp_min(0)
        if self.energy is None:
            shrunk = values + self.shrinkage * values.mean(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
            inverse: Tensor = (vectors * shrunk.reciprocal()[:, None, :]) @ vectors.mT
            return inverse
        rest = values.cumsum(-1) / values.sum(-1, keepdim=True)  # ascending: what the weakest directions hold together
        free = (rest <= 1 - self.energy).to(values)
        projector: Tensor = (vectors * free[:, None, :]) @ vectors.mT
        return projector


@final
@dataclass(frozen=True, eq=False)
class Metric:
    """The metrics of several layers, as `weightpatch.statistics.Moments.metric` makes them.

    Attributes:
        layers: by the name of the weight.
    """

    layers: Mapping[str, LayerMetric]

    def __repr__(self) -> str:
        shown = ", ".join(list(self.layers)[:3]) + (", ..." if len(self.layers) > 3 else "")
        some = next(iter(self.layers.values()), None)
        how = "" if some is None else f"energy={some.energy}" if some.energy else f"shrinkage={some.shrinkage}"
        return f"<Metric of {shown}, {how}>"

    def applied(self, grads: Params, eps: float | None = None) -> tuple[Params, dict[str, Tensor]]:
        """Return ``d = C⁻¹ g``, and ``gᵀ C⁻¹ g`` of each layer, a scalar each; differentiable in the gradients.

        Args:
            grads: by name.
            eps: how exact they are, relative; by default as their dtype can be.

        Raises:
            InvalidInput: a gradient is of a parameter that belongs to none of the layers.
        """
        found: Params = {}
        squares: dict[str, Tensor] = {}
        for name, layer in self._touched(grads).items():
            weight, bias = grads.get(layer.weight), None if layer.bias is None else grads.get(layer.bias)
            some = weight if weight is not None else bias
            assert some is not None
            groups, rows = len(layer.second), len(some)
            parts = [] if weight is None else [weight.reshape(groups, rows // groups, -1)]
            parts += [] if bias is None else [bias.reshape(groups, rows // groups, 1)]
            gradient = torch.cat(parts, -1)
            inverse = layer.inverse(some, with_weight=weight is not None, with_bias=bias is not None)
            moved = _times(gradient, inverse, eps or torch.finfo(gradient.dtype).eps)
            squares[name] = (gradient * moved).sum()
            if weight is not None:
                fan_in = weight[0].numel()
                found[layer.weight] = moved[..., :fan_in].reshape(weight.shape)
            if bias is not None and layer.bias is not None:
                found[layer.bias] = moved[..., -1].reshape(bias.shape)
        return {name: found[name] for name in grads}, squares

    def _touched(self, grads: Params) -> dict[str, LayerMetric]:
        owners = {name: key for key, layer in self.layers.items() for name in (layer.weight, layer.bias) if name}
        odd = [name for name in grads if name not in owners]
        if odd:
            raise InvalidInput(
                f"the metric has no statistics for {', '.join(odd[:3])}; edit parameters of {', '.join(owners)[:200]}, "
                "or collect statistics for the others: linear and convolution layers have them, norms do not"
            )
        return {key: self.layers[key] for key in dict.fromkeys(owners[name] for name in grads)}


def _times(gradient: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """Return the product; by a basis of the gradient's rows where these are found to be few, to rounding."""
    rows, width = gradient.shape[-2:]
    if gradient.requires_grad or min(rows, width) < 4 * _RANK:
        return gradient @ inverse
    sketch = torch.randn(_RANK + 4, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr((sketch.to(gradient) @ gradient).mT).Q
    shares = gradient @ basis
    rest = (gradient - shares @ basis.mT).norm()
    if not float(rest) <= 8 * eps * float(gradient.norm()):
        return gradient @ inverse
    product: Tensor = shares @ (basis.mT @ inverse)
    return product
