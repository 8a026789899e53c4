"""Second moments of one layer, and how files hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["LayerMoments", "read", "tensors", "told"]

_FISHER, _HALF = "fisher", "half"  # after a weight's name: Σ g gᵀ, where it was measured; the sums of half of the items


@final
@dataclass(frozen=True, eq=False)
class LayerMoments:
    """Sums over what one layer saw.

    Attributes:
        weight: the name of its weight.
        bias: the name of its bias, or None.
        total: Σ [x; 1] [x; 1]ᵀ per group of channels, (groups, fan_in + 1, fan_in + 1), float64.
        power: Σ ||y||² of its outputs.
        count: over how many positions: items of a linear layer, items times positions of a convolution.
        fisher: Σ g gᵀ of the gradients g of sampled answers' log-likelihood with respect to the outputs, per group,
            (groups, out / groups, out / groups), float64; None where they were not asked for.
        transposed: whether the weight is (fan_in, out), as that of the Conv1D of transformers.
        half: the same sums over about half of the items; None where none of them fell to that half.
    """

    weight: str
    bias: str | None
    total: Tensor
    power: float
    count: int
    fisher: Tensor | None = None
    transposed: bool = False
    half: LayerMoments | None = None

    def __add__(self, other: LayerMoments) -> LayerMoments:
        fisher = None if self.fisher is None or other.fisher is None else self.fisher + other.fisher
        total, power, count = self.total + other.total, self.power + other.power, self.count + other.count
        half = self.half + other.half if self.half and other.half else self.half or other.half
        return replace(self, total=total, power=power, count=count, fisher=fisher, half=half)


def told(layer: LayerMoments) -> dict[str, Any]:
    """Return a layer's facts but for its tensors."""
    own = {"bias": layer.bias, "power": layer.power, "count": layer.count, "transposed": layer.transposed}
    return own | {_HALF: None if layer.half is None else told(layer.half)}


def tensors(name: str, layer: LayerMoments) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's tensors, with the names that they have in a file."""
    yield name, layer.total
    if layer.fisher is not None:
        yield f"{name}.{_FISHER}", layer.fisher
    if layer.half is not None:
        yield from tensors(f"{name}.{_HALF}", layer.half)


def read(name: str, facts: Mapping[str, Any], found: Mapping[str, Tensor], weight: str | None = None) -> LayerMoments:
    """Read what `told` and `tensors` wrote under a name, of the layer of this weight."""
    total, fisher, count = found[name], found.get(f"{name}.{_FISHER}"), int(facts["count"])
    for tensor in (total,) if fisher is None else (total, fisher):
        square = tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2] and len(tensor) == len(total)
        if not square or tensor.dtype != torch.float64 or count < 1 or not bool(tensor.isfinite().all()):
            raise ValueError(f"the moments of {name} are {tuple(tensor.shape)} {tensor.dtype} of {count} positions")
    half = None if facts[_HALF] is None else read(f"{name}.{_HALF}", facts[_HALF], found, weight or name)
    if half is not None and (half.total.shape != total.shape or (half.fisher is None) != (fisher is None)):
        raise ValueError(f"the moments of {name} and of half of its items do not fit together")
    power, transposed = float(facts["power"]), bool(facts["transposed"])
    return LayerMoments(weight or name, facts["bias"], total, power, count, fisher, transposed, half)
