"""What a change of a layer costs: the mean square of what it adds to the layer's outputs on reference data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from .._calling import Params
from ..errors import InvalidInput
from ._factors import Factors

__all__ = ["LayerMetric", "Metric"]

_RANK = 8  # gradients of a linear layer have at most the rank of the items that are asked about, or of their tokens
_MOST, _COSTLY = 128, 1 << 28  # looked for where that fails, and the product of whole matrices takes so many operations


@final
@dataclass(frozen=True, eq=False)
class LayerMetric:
    """The metric of one linear or convolution layer: ``||Δ||² = tr(Δ C Δᵀ) = E ||Δ x||²`` over its reference inputs x.

    Two-sided, with G, it is ``||Δ||² = tr(G Δ C Δᵀ)``: the second-order estimate of 2 KL(before || after), in nats an
    item, that takes what the layer is given and how its outputs matter to be independent. Source: K-FAC (Martens and
    Grosse 2015), for convolutions Grosse and Martens 2016.

    Attributes:
        weight: the name of its weight.
        bias: the name of its bias, or None.
        second: E[x xᵀ] per group of channels, with a constant 1 as the last input, (groups, fan_in + 1, fan_in + 1),
            float64; of a convolution x is what the kernel covers at one position.
        power: E ||y||² of its outputs y at one position.
        shrinkage: C is ``second`` plus this share of its mean eigenvalue on the diagonal.
        energy: None, or the share of the inputs' energy that edits must not touch at all: C⁻¹ becomes the projector on
            the other directions.
        fisher: None, or E[Σ g gᵀ], summed over the positions of one item, with g the gradient of a sampled answer's
            log-likelihood with respect to y, per group of channels, (groups, out / groups, out / groups), float64.
        output_shrinkage: G is ``fisher`` plus this share of its mean eigenvalue on the diagonal.
        transposed: whether the weight is (fan_in, out), as that of the Conv1D of transformers: Δ is its transpose.
    """

    weight: str
    bias: str | None
    second: Tensor
    power: float
    shrinkage: float = 0.01
    energy: float | None = None
    fisher: Tensor | None = None
    output_shrinkage: float = 0.01
    transposed: bool = False
    _made: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def inverse(self, like: Tensor, *, with_weight: bool = True, with_bias: bool = True) -> Tensor:
        """Return C⁻¹, (groups, d, d), for the inputs of the parts that are edited, in the dtype of `like`."""
        key = (with_weight, with_bias, like.dtype, like.device)
        if key not in self._made:
            self._made[key] = self._inverse(self._of(with_weight, with_bias)).to(like)
        return self._made[key]

    def shrunk(self, like: Tensor, *, with_weight: bool = True, with_bias: bool = True) -> Tensor:
        """Return C itself, of the same shape."""
        key = ("C", with_weight, with_bias, like.dtype, like.device)
        if key not in self._made:
            second = self._of(with_weight, with_bias)
            mean = second.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
            self._made[key] = (second + (self.shrinkage * mean).expand(second.shape[:2]).diag_embed()).to(like)
        return self._made[key]

    def output_inverse(self, like: Tensor) -> Tensor | None:
        """Return G⁻¹, (groups, out / groups, out / groups), in the dtype of `like`; None for a one-sided metric."""
        if self.fisher is None:
            return None
        key = ("G", like.dtype, like.device)
        if key not in self._made:
            self._made[key] = _shrunk_inverse(self.fisher, self.output_shrinkage).to(like)
        return self._made[key]

    def moved(self, gradient: Factors, *, with_bias: bool) -> Factors:
        """Return ``G⁻¹ g C⁻¹`` of a linear layer's gradient g, with the bias's as its last column if that is edited."""
        (inverse,), left = self.inverse(gradient.right, with_bias=with_bias), self.output_inverse(gradient.left)
        return Factors(gradient.left if left is None else gradient.left @ left[0], gradient.right @ inverse)

    def _of(self, with_weight: bool, with_bias: bool) -> Tensor:
        last = self.second.shape[-1] - 1
        index = slice(None if with_weight else last, None if with_bias else last)
        return self.second[:, index, index]

    def _inverse(self, second: Tensor) -> Tensor:
        if self.energy is None:
            return _shrunk_inverse(second, self.shrinkage)
        values, vectors = torch.linalg.eigh(second)
        values = values.clamp_min(0)
        rest = values.cumsum(-1) / values.sum(-1, keepdim=True)  # ascending: what the weakest directions hold together
        free = (rest <= 1 - self.energy).to(values)
        projector: Tensor = (vectors * free[:, None, :]) @ vectors.mT
        return projector


def _shrunk_inverse(second: Tensor, shrinkage: float) -> Tensor:
    mean = second.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(second.dtype).tiny)
    shrunk = second + (shrinkage * mean)[:, None].expand(second.shape[:2]).diag_embed()
    factor, failed = torch.linalg.cholesky_ex(shrunk)
    if not bool(failed.any()):
        return torch.cholesky_inverse(factor)
    values, vectors = torch.linalg.eigh(second)  # shrinkage below the rounding of a moment without full rank
    shrunk = values.clamp_min(0) + (shrinkage * mean)[:, None]
    inverse: Tensor = (vectors * shrunk.reciprocal()[:, None, :]) @ vectors.mT
    return inverse


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
        how = "" if some is None else f"energy={some.energy}" if some.energy else f"shrinkage={self._shrinkage()}"
        how += f", output_shrinkage={some.output_shrinkage}" if some is not None and self.two_sided else ""
        return f"<Metric of {shown}, {how}>"

    def _shrinkage(self) -> str:
        least, most = (find(layer.shrinkage for layer in self.layers.values()) for find in (min, max))
        return f"{least:.2g}" if least == most else f"{least:.2g} to {most:.2g}"

    @property
    def two_sided(self) -> bool:
        """Whether it weighs what the outputs' directions matter too."""
        return any(layer.fisher is not None for layer in self.layers.values())

    def applied(self, grads: Params, eps: float | None = None) -> tuple[Params, dict[str, Tensor]]:
        """Return ``d = G⁻¹ g C⁻¹``, and the squares ``tr(gᵀ d)`` of each layer, a scalar each.

        Both are differentiable in the gradients. One-sided, G is 1.

        Args:
            grads: by name.
            eps: how exact they are, relative; by default as their dtype can be.

        Raises:
            InvalidInput: a gradient is of a parameter that belongs to none of the layers.
        """
        found: Params = {}
        squares: dict[str, Tensor] = {}
        for name, layer in self._touched(grads).items():
            gradient, parts = _joined(layer, grads)
            inverse = layer.inverse(gradient, **parts)
            moved = _times(gradient, inverse, eps or torch.finfo(gradient.dtype).eps, layer.output_inverse(gradient))
            squares[name] = (gradient * moved).sum()
            found |= _apart(layer, moved, grads)
        return {name: found[name] for name in grads}, squares

    def spreads(self, change: Params) -> dict[str, Tensor]:
        """Return ``tr(Δ C Δᵀ)`` of each layer, a scalar each: what a change adds to its outputs, a mean square.

        Args:
            change: Δ, by name.

        Raises:
            InvalidInput: a part of it is of a parameter that belongs to none of the layers.
        """
        found = {}
        for name, layer in self._touched(change).items():
            delta, parts = _joined(layer, change)
            spread = _times(delta, layer.shrunk(delta, **parts), torch.finfo(delta.dtype).eps)
            found[name] = (delta * spread).sum()
        return found

    def _touched(self, grads: Params) -> dict[str, LayerMetric]:
        owners = {name: key for key, layer in self.layers.items() for name in (layer.weight, layer.bias) if name}
        odd = [name for name in grads if name not in owners]
        if odd:
            raise InvalidInput(
                f"the metric has no statistics for {', '.join(odd[:3])}; edit parameters of {', '.join(owners)[:200]}, "
                "or collect statistics for the others: linear and convolution layers have them, norms do not"
            )
        return {key: self.layers[key] for key in dict.fromkeys(owners[name] for name in grads)}


def _joined(layer: LayerMetric, params: Params) -> tuple[Tensor, dict[str, bool]]:
    """Return weight and bias as one matrix per group, (groups, out / groups, d), and which of the two there are."""
    weight, bias = params.get(layer.weight), None if layer.bias is None else params.get(layer.bias)
    weight = weight.mT if weight is not None and layer.transposed else weight
    some = weight if weight is not None else bias
    assert some is not None
    groups, rows = len(layer.second), len(some)
    parts = [] if weight is None else [weight.reshape(groups, rows // groups, -1)]
    parts += [] if bias is None else [bias.reshape(groups, rows // groups, 1)]
    return torch.cat(parts, -1), {"with_weight": weight is not None, "with_bias": bias is not None}


def _apart(layer: LayerMetric, joined: Tensor, like: Params) -> Params:
    """Return weight and bias by name, with the shapes that they have in `like`."""
    found: Params = {}
    if layer.weight in like:
        shape = like[layer.weight].shape
        found[layer.weight] = (
            joined[0, :, : shape[0]].mT if layer.transposed else joined[..., : shape[1:].numel()].reshape(shape)
        )
    if layer.bias is not None and layer.bias in like:
        found[layer.bias] = joined[..., -1].reshape(like[layer.bias].shape)
    return found


def _times(gradient: Tensor, inverse: Tensor, eps: float, left: Tensor | None = None) -> Tensor:
    """Return ``left gradient inverse``; by a basis of the gradient's rows where these are found to be few, to rounding.

    Args:
        gradient: (groups, rows, width).
        inverse: (groups, width, width).
        eps: how exact the gradient is, relative.
        left: (groups, rows, rows), or None for 1.
    """
    rows, width = gradient.shape[-2:]
    most = min(_MOST, rows // 2, width // 2)
    costly = gradient.numel() * (width + (0 if left is None else rows)) >= _COSTLY
    tried = (_RANK, most) if costly else (_RANK,)
    for rank in () if gradient.requires_grad or most < 2 * _RANK else tried:
        basis = _basis(gradient, rank, eps)
        if basis is not None:
            shares = gradient @ basis
            shares = shares if left is None else left @ shares
            product: Tensor = shares @ (basis.mT @ inverse)
            return product
    return gradient @ inverse if left is None else left @ gradient @ inverse


def _basis(gradient: Tensor, most: int, eps: float) -> Tensor | None:
    """Return an orthonormal basis of the rows, (groups, width, rank), to rounding; None where more than `most` span."""
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(most + 4, gradient.shape[-2], generator=generator, dtype=torch.float64, device="cpu")
    basis, sizes = torch.linalg.qr((sketch.to(gradient) @ gradient).mT)
    sizes = sizes.diagonal(dim1=-2, dim2=-1).abs()
    if not bool((sizes[:, -1] <= math.sqrt(eps) * sizes[:, 0]).all()):
        return None
    basis = basis[..., : max(1, int((sizes > eps * sizes[:, :1]).sum(-1).max()))]
    rest = (gradient - gradient @ basis @ basis.mT).norm()
    return basis if float(rest) <= 8 * eps * float(gradient.norm()) else None
