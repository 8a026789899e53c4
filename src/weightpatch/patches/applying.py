"""Applying patches to a live model, and taking them off again, bit for bit.

What reverting needs travels with the model as one private attribute, outside of its state dict. Everything is computed
and checked before the first write; an error or interrupt between two writes puts everything back.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .composition import Layer
from .hashing import combined, digests, named_tensors
from .stack import State, with_layer, without_layer

_ATTRIBUTE = "_weightpatch"


def state_of(model: nn.Module) -> State | None:
    """What the model remembers of its patches; None for a model without."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, State) else None


def base_fingerprint(model: nn.Module) -> str:
    """The fingerprint of the model's weights as they were before any patch was applied."""
    state = state_of(model)
    return combined(digests(named_tensors(model)) if state is None else state.root)


def apply(model: nn.Module, layer: Layer) -> None:
    """Apply a patch in place; see `Patch.apply`."""
    tensors = named_tensors(model)
    _write(model, tensors, *with_layer(tensors, state_of(model), layer))


def revert(model: nn.Module, layer: Layer) -> None:
    """Take a patch off in place; see `Patch.revert`."""
    tensors = named_tensors(model)
    _write(model, tensors, *without_layer(tensors, state_of(model), layer))


def _write(model: nn.Module, tensors: Mapping[str, Tensor], state: State, values: Mapping[str, Tensor]) -> None:
    before = {name: tensors[name].detach().clone() for name in values}
    earlier = state_of(model)
    try:
        for name, value in values.items():
            _put(tensors[name], value)
        _remember(model, state)
    except BaseException:
        for name, value in before.items():
            _put(tensors[name], value)
        _remember(model, earlier)
        raise


def _put(tensor: Tensor, value: Tensor) -> None:
    # Into the same storage: tied names stay tied, optimisers and compiled graphs keep their tensors
    with torch.no_grad():
        tensor.copy_(value)


def _remember(model: nn.Module, state: State | None) -> None:
    if state is None or not state.layers:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state
