"""Second moments of what linear and convolution layers are given, and of their outputs' gradients, over data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .._calling import Inputs, call, check_batch, rows
from ..constraints import Constraint
from ..editors import LayerMetric, Metric
from ..errors import InvalidInput
from ..locality import Locality
from ..network import check_finite, is_linear, is_transposed, select, structural_clone
from ..patches import fingerprint
from ..patches.files import write
from .outputs import Likelihood, Probes

__all__ = ["LayerMoments", "Moments", "called", "on_path", "second_moments"]

_FORMAT = "weightpatch moments 1"
_FISHER = "fisher"  # the tensor of that name after the weight's is Σ g gᵀ; files without it are of inputs alone


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
    """

    weight: str
    bias: str | None
    total: Tensor
    power: float
    count: int
    fisher: Tensor | None = None
    transposed: bool = False

    def __add__(self, other: LayerMoments) -> LayerMoments:
        fisher = None if self.fisher is None or other.fisher is None else self.fisher + other.fisher
        total, power, count = self.total + other.total, self.power + other.power, self.count + other.count
        return replace(self, total=total, power=power, count=count, fisher=fisher)


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of several layers, of one model on some data.

    Sums in float64: those of shards, added with ``+``, are those of all data, up to the rounding of a sum.

    Attributes:
        layers: by the name of the weight.
        fingerprint: of the weights of the model, see `weightpatch.patches.fingerprint`.
        items: over how many items.
    """

    layers: Mapping[str, LayerMoments]
    fingerprint: str
    items: int

    def __repr__(self) -> str:
        sides = ", inputs and outputs" if self.two_sided else ""
        return f"<Moments of {len(self.layers)} layers on {self.items} items{sides}>"

    @property
    def two_sided(self) -> bool:
        """Whether the outputs were measured too."""
        return all(layer.fisher is not None for layer in self.layers.values())

    def __add__(self, other: Moments) -> Moments:
        alike = self.layers.keys() == other.layers.keys() and self.two_sided == other.two_sided
        if self.fingerprint != other.fingerprint or not alike:
            raise InvalidInput(
                f"moments of {list(self.layers)} and of {list(other.layers)} cannot be added; expected the same layers "
                "of the same weights, and a likelihood for both or for neither"
            )
        layers = {name: layer + other.layers[name] for name, layer in self.layers.items()}
        return Moments(layers, self.fingerprint, self.items + other.items)

    def metric(
        self, shrinkage: float = 0.01, energy: float | None = None, *, output_shrinkage: float | None = None
    ) -> Metric:
        """Return the metric ``||Δ||² = E ||Δ x||²``, or two-sided ``E (gᵀ Δ x)²``, for `Preconditioned` and others.

        Args:
            shrinkage: how much of the mean eigenvalue of E[x xᵀ] is added to all: what is spent on directions that the
                reference data does not show.
            energy: edits stay in the directions that hold no more than 1 - energy of the inputs' energy together; in
                those all count alike. The metric itself when not given.
            output_shrinkage: makes it two-sided: how much of the mean eigenvalue of E[g gᵀ] is added to all. The larger
                it is, the more all directions of the outputs count alike.

        Raises:
            InvalidInput: a number is out of range, or there are no moments of the outputs.
        """
        positive = all(0 < value < float("inf") for value in (shrinkage, output_shrinkage or 1.0))
        if not positive or output_shrinkage == 0 or (energy is not None and not 0 < energy < 1):
            raise InvalidInput(
                f"metric was given shrinkage={shrinkage}, energy={energy}, output_shrinkage={output_shrinkage}; "
                "expected a positive shrinkage, an energy between 0 and 1 or None, and a positive output_shrinkage or "
                "None"
            )
        if output_shrinkage is not None:
            self._check_outputs()
        made = {}
        for name, layer in self.layers.items():
            fisher = None if output_shrinkage is None or layer.fisher is None else layer.fisher / self.items
            second, power = layer.total / layer.count, layer.power / layer.count
            shrunk = (shrinkage, energy, fisher, output_shrinkage or math.inf)
            made[name] = LayerMetric(name, layer.bias, second, power, *shrunk, transposed=layer.transposed)
        return Metric(made)

    def _check_outputs(self) -> None:
        if not self.two_sided:
            raise InvalidInput(
                "a two-sided metric needs moments of the outputs; measure them with "
                "second_moments(..., likelihood=weightpatch.statistics.categorical)"
            )
        dead = [name for name, layer in self.layers.items() if layer.fisher is not None and not layer.fisher.any()]
        if dead:
            raise InvalidInput(
                f"the model's answers do not depend on the outputs of {', '.join(dead[:3])}; choose other layers"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        told = {
            name: {"bias": layer.bias, "power": layer.power, "count": layer.count}
            | ({"transposed": True} if layer.transposed else {})
            for name, layer in self.layers.items()
        }
        fishers = {f"{n}.{_FISHER}": layer.fisher for n, layer in self.layers.items() if layer.fisher is not None}
        facts = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "items": str(self.items),
            "layers": json.dumps(told),
        }
        tensors = {name: layer.total for name, layer in self.layers.items()} | fishers
        write(path, [save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, facts)])

    @staticmethod
    def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Moments:
        """Read such a file.

        Args:
            path: of the file.
            model: refuse the file where it was made with other weights than these.

        Raises:
            InvalidInput: not such a file, or not of these weights.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if facts.get("format") != _FORMAT:
                raise InvalidInput(f"{path} is no file of moments; expected what Moments.save wrote")
            layers = {
                name: _layer(name, tensors[name], tensors.get(f"{name}.{_FISHER}"), **told)
                for name, told in json.loads(facts["layers"]).items()
            }
            found = Moments(layers, facts["fingerprint"], int(facts["items"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"{path} cannot be read as moments: {error}") from error
        if model is not None and fingerprint(model) != found.fingerprint:
            raise InvalidInput(f"{path} was made with other weights than this model has; run second_moments again")
        return found


def second_moments(
    model: nn.Module,
    inputs: Inputs | Iterable[Inputs] | Locality,
    *,
    parameters: str | Sequence[str] = "*",
    batch_size: int = 250,
    likelihood: Likelihood | None = None,
    seed: int = 0,
) -> Moments:
    """Measure E[x xᵀ] of the inputs x of layers, in evaluation mode; the model is left as it is.

    With a likelihood, E[g gᵀ] of the layers' outputs is measured too, by one backward pass a batch: g is the gradient
    of log p(y) for answers y that are drawn from the model's own prediction, so that this is the Fisher information,
    and no labels are needed.

    Args:
        model: any eager module.
        inputs: reference items: one batch, which is taken apart, or batches, which are not. Of a `Locality`, only the
            positions of its mask count, (n, length), where a linear layer is given (n, length, width): no padding.
        parameters: the layers are those with such a weight, as globs; `torch.nn.Linear`, `Conv1d`, `Conv2d`, and the
            `Conv1D` of transformers count where the model calls them as modules.
        batch_size: items a pass.
        likelihood: draws answers and returns their log-likelihood: `categorical` for classifiers, `gaussian` for
            regressions, or one of your own: from answers (n, ...) and a generator to (n,), differentiable. With a mask
            it is given the answers at its positions, (positions, ...).
        seed: of the answers that are drawn; another one for each shard of the data.

    Raises:
        InvalidInput: there is no such layer, no item, or a value that is not finite; or a layer has too many outputs
            for the moments of these.

    >>> moments = second_moments(model, images, parameters="layer3.*")
    >>> moments.save("model.moments.safetensors")
    """
    check_finite(model)
    clone = structural_clone(model)
    layers = _chosen(clone, select(model, parameters), parameters)
    sums: dict[str, LayerMoments] = {}
    mask, counted = inputs.mask if isinstance(inputs, Locality) else None, list[Tensor | None]([None])
    inputs = inputs.inputs if isinstance(inputs, Locality) else inputs
    probes = None if likelihood is None else Probes(likelihood, seed)
    handles = [
        module.register_forward_hook(_noting(sums, weight, bias, probes, counted), with_kwargs=True)
        for weight, bias, module in layers
    ]
    items = 0
    try:
        for batch in _batches(inputs, batch_size):
            counted[0] = None if mask is None else mask[items : items + batch_size]
            items += check_batch(batch, "second_moments")
            if probes is not None:
                probes.run(clone, batch, counted[0])
                continue
            with torch.no_grad():
                call(clone, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not sums:
        some = ", ".join(weight for weight, _, _ in layers[:3])
        raise InvalidInput(f"second_moments gave the model {items} items, and it called none of the layers of {some}")
    if probes is not None:
        sums = {name: replace(layer, fisher=probes.sums[name]) for name, layer in sums.items()}
    for name, layer in sums.items():
        if not bool(layer.total.isfinite().all()) or not (layer.fisher is None or bool(layer.fisher.isfinite().all())):
            raise InvalidInput(f"the inputs of {name}, or its outputs' gradients, are not finite on this data")
    return Moments(sums, fingerprint(model), items)


def called(model: nn.Module, inputs: Inputs, *, parameters: str | Sequence[str] = "*") -> tuple[str, ...]:
    """Return the weights of the layers that second moments can be taken of, in the order in which the model calls them.

    Args:
        model: any eager module.
        inputs: a batch, of which the first item is run.
        parameters: the layers are those with such a weight, as globs.
    """
    clone = structural_clone(model)
    try:
        layers = _chosen(clone, select(model, parameters), parameters)
    except InvalidInput:
        return ()
    seen: dict[str, None] = {}
    for weight, _, module in layers:
        module.register_forward_hook(lambda *_, weight=weight: seen.update({weight: None}))
    with torch.no_grad():
        call(clone, rows(inputs, slice(1)))
    return tuple(seen)


def on_path(model: nn.Module, constraint: Constraint) -> frozenset[str]:
    """Return the weights of the layers, as `called` names them, whose outputs the constraint's answers depend on."""
    clone = structural_clone(model)
    try:
        layers = _chosen(clone, select(model, "*"), "*")
    except InvalidInput:
        return frozenset()
    zeros: list[tuple[str, Tensor]] = []

    def look(weight: str, output: Tensor) -> Tensor:
        zeros.append((weight, torch.zeros_like(output).requires_grad_()))
        return output + zeros[-1][1]

    bound = constraint.bind(clone)
    for weight, _, module in layers:
        module.register_forward_hook(lambda _, __, output, weight=weight: look(weight, output))
    with torch.inference_mode(False), torch.enable_grad():
        violation = bound.violation(clone)
        grads = torch.autograd.grad(violation.sum(), [zero for _, zero in zeros], allow_unused=True)
    return frozenset(weight for (weight, _), grad in zip(zeros, grads, strict=True) if grad is not None)


def _chosen(model: nn.Module, names: Sequence[str], asked: object) -> list[tuple[str, str | None, nn.Module]]:
    """Return the names of weight and bias, and the layer, of every layer with a chosen weight; several where tied."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[tuple[str, str | None, nn.Module]] = []
    for module in model.modules():
        if (is_linear(module) or isinstance(module, (nn.Conv1d, nn.Conv2d))) and first.get(id(module.weight)) in names:
            bias = None if module.bias is None else first[id(module.bias)]
            found.append((first[id(module.weight)], bias, module))
    if not found:
        raise InvalidInput(f"no linear or convolution layer has its weight in parameters={asked!r}")
    return found


def _noting(
    sums: dict[str, LayerMoments], weight: str, bias: str | None, probes: Probes | None, counted: list[Tensor | None]
) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, y, mask = (args[0] if args else kwargs["input"]).detach(), output.detach(), counted[0]
        if mask is not None and is_linear(module) and x.shape[:-1] == mask.shape:
            x, y = x[mask], y[mask]
        keys = _keys(module, x).double()
        ones = keys.new_ones(*keys.shape[:-1], 1)
        keys = torch.cat([keys, ones], -1)
        count = keys.shape[1]
        power = float(y.double().square().sum())
        found = LayerMoments(weight, bias, keys.mT @ keys, power, count, transposed=is_transposed(module))
        sums[weight] = sums[weight] + found if weight in sums else found
        return output if probes is None else probes.probed(weight, module, output)

    return note


def _keys(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what the weight is multiplied with, (groups, positions, fan_in)."""
    if is_linear(module):
        return inputs.flatten(0, -2)[None]
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    flat = isinstance(module, nn.Conv1d)
    edges = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, edges, mode=mode) if any(edges) else inputs
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if flat:
        padded = padded.unsqueeze(-2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    patches = F.unfold(padded, kernel, dilation=dilation, stride=stride)  # (n, channels · kernel, positions)
    n, _, positions = patches.shape
    parts = patches.view(n, module.groups, -1, positions)
    return parts.permute(1, 0, 3, 2).reshape(module.groups, n * positions, -1)


def _batches(inputs: Any, size: int) -> Iterator[Inputs]:
    if isinstance(inputs, (Tensor, tuple, Mapping)):
        n = check_batch(inputs, "second_moments")
        yield from (rows(inputs, slice(start, start + size)) for start in range(0, n, size))
    else:
        yield from inputs


def _layer(
    name: str,
    total: Tensor,
    fisher: Tensor | None,
    bias: str | None,
    power: float,
    count: int,
    transposed: bool = False,
) -> LayerMoments:
    for tensor in (total,) if fisher is None else (total, fisher):
        square = tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2] and len(tensor) == len(total)
        if not square or tensor.dtype != torch.float64 or count < 1 or not bool(tensor.isfinite().all()):
            raise ValueError(f"the moments of {name} are {tuple(tensor.shape)} {tensor.dtype} of {count} positions")
    return LayerMoments(name, bias, total, float(power), int(count), fisher, bool(transposed))
