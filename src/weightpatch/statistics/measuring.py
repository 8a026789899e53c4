"""Measures second moments of what linear and convolution layers are given, and of their outputs' gradients, on data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._calling import Inputs, call, check_batch, rows
from ..constraints import Constraint
from ..errors import InvalidInput
from ..likelihoods import Likelihood
from ..locality import Locality
from ..network import check_finite, is_linear, is_transposed, preserved_rng, select, structural_clone
from ..patches import fingerprint
from .halves import halved
from .layers import LayerMoments
from .moments import Moments
from .outputs import Probes

__all__ = ["called", "on_path", "second_moments"]

Layer: TypeAlias = "tuple[str, str | None, nn.Module]"  # the names of weight and bias, and the layer


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
    and no labels are needed. Each batch is run as two, one of either half of the items, see `halved`.

    Args:
        model: any eager module.
        inputs: reference items: one batch, which is taken apart, or batches, which are not. Of a `Locality`, only the
            positions of its mask count, (n, length), where a linear layer is given (n, length, width): no padding;
            and the likelihood is of its output.
        parameters: the layers are those with such a weight, as globs; `torch.nn.Linear`, `Conv1d`, `Conv2d`, and the
            `Conv1D` of transformers count where the model calls them as modules.
        batch_size: items a pass.
        likelihood: what the model's predictions mean: `Categorical` for classifiers and sequences, `Bernoulli` for
            multi-label and binary models, ``Gaussian(scale)`` for regressions, all of `weightpatch.likelihoods`, or one
            of your own with `sample` and `log_prob`. The log-likelihoods of an item's positions are summed; with a
            mask, of those that count.
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
    mask, output = (inputs.mask, inputs.output) if isinstance(inputs, Locality) else (None, None)
    passes = _Passes(clone, layers, None if likelihood is None else Probes(likelihood, seed, output))
    sums: dict[str, LayerMoments] = {}
    items = 0
    with closing(passes), _steady(clone):
        for batch in _batches(inputs, batch_size):
            rows_of = None if mask is None else mask[items : items + batch_size]
            items += check_batch(batch, "second_moments")
            for side, part, counted in halved(batch, rows_of):
                for name, layer in passes.run(part, counted).items():
                    found = replace(layer, half=layer) if side else layer
                    sums[name] = sums[name] + found if name in sums else found
    if not sums:
        some = ", ".join(weight for weight, _, _ in layers[:3])
        raise InvalidInput(f"second_moments gave the model {items} items, and it called none of the layers of {some}")
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
    with torch.no_grad(), _steady(clone):
        try:
            call(clone, rows(inputs, slice(1)))
        except ValueError:  # batch normalisation by the batch alone refuses a single item
            call(clone, rows(inputs, slice(2)))
    return tuple(seen)


def _chosen(model: nn.Module, names: Sequence[str], asked: object) -> list[Layer]:
    """Return the names of weight and bias, and the layer, of every layer with a chosen weight; several where tied."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[Layer] = []
    for module in model.modules():
        if (is_linear(module) or isinstance(module, (nn.Conv1d, nn.Conv2d))) and first.get(id(module.weight)) in names:
            bias = None if module.bias is None else first[id(module.bias)]
            found.append((first[id(module.weight)], bias, module))
    if not found:
        raise InvalidInput(f"no linear or convolution layer has its weight in parameters={asked!r}")
    return found


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

    with _steady(clone), torch.inference_mode(False), torch.enable_grad():
        bound = constraint.bind(clone)
        for weight, _, module in layers:
            module.register_forward_hook(lambda _, __, output, weight=weight: look(weight, output))
        violation = bound.violation(clone)
        grads = torch.autograd.grad(violation.sum(), [zero for _, zero in zeros], allow_unused=True)
    return frozenset(weight for (weight, _), grad in zip(zeros, grads, strict=True) if grad is not None)


def _steady(model: nn.Module) -> AbstractContextManager[object]:
    """Leave random generators as they were: some models draw from them in evaluation mode too."""
    return preserved_rng(next(model.parameters()).device)


class _Passes:
    """Runs a model on batches and notes what its layers are given."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], probes: Probes | None) -> None:
        self._model, self._probes = model, probes
        self._mask: Tensor | None = None
        self._seen: dict[str, LayerMoments] = {}
        self._handles = [
            module.register_forward_hook(partial(self._note, weight, bias), with_kwargs=True)
            for weight, bias, module in layers
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, batch: Inputs, mask: Tensor | None) -> dict[str, LayerMoments]:
        """Return the sums over these items, by the name of the weight."""
        self._mask, self._seen = mask, {}
        if self._probes is not None:
            fishers = self._probes.run(self._model, batch, mask)
            return {name: replace(layer, fisher=fishers[name]) for name, layer in self._seen.items()}
        with torch.no_grad():
            call(self._model, batch)
        return self._seen

    def _note(
        self,
        weight: str,
        bias: str | None,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        x, y, mask = (args[0] if args else kwargs["input"]).detach(), output.detach(), self._mask
        if mask is not None and is_linear(module) and x.shape[:-1] == mask.shape:
            x, y = x[mask], y[mask]
        keys = _keys(module, x).double()
        keys = torch.cat([keys, keys.new_ones(*keys.shape[:-1], 1)], -1)
        power = float(y.double().square().sum())
        found = LayerMoments(weight, bias, keys.mT @ keys, power, keys.shape[1], transposed=is_transposed(module))
        self._seen[weight] = self._seen[weight] + found if weight in self._seen else found
        return output if self._probes is None else self._probes.probed(weight, module, output)


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
    if isinstance(inputs, (Locality, Tensor, tuple, Mapping)):
        inputs = inputs.inputs if isinstance(inputs, Locality) else inputs
        n = check_batch(inputs, "second_moments")
        yield from (rows(inputs, slice(start, start + size)) for start in range(0, n, size))
    else:
        yield from inputs
