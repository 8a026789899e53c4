"""Applying patches to a live model, and taking them off again, bit for bit.

What reverting needs travels with the model as one private attribute, outside of its state dict; gates are one forward
hook a module. Everything is computed and checked before the first write; an error or interrupt between two writes puts
everything back.
"""

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseMismatch, NotEditable, PatchError
from ..gates import KEY, Gate, GateHook, sizes
from .composition import Layer
from .hashing import combined, digests, named_tensors, uncompiled
from .stack import State, with_layer, without_layer

_ATTRIBUTE = "_weightpatch"

Hooks = Sequence[tuple[nn.Module, GateHook | None]]


def state_of(model: nn.Module) -> State | None:
    """What the model remembers of its patches; None for a model without."""
    found = _inner(model).__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, State) else None


def base_fingerprint(model: nn.Module) -> str:
    """The fingerprint of the model's weights as they were before any patch was applied."""
    state = state_of(model)
    return combined(digests(named_tensors(model)) if state is None else state.root)


def apply(model: nn.Module, layer: Layer) -> None:
    """Apply a patch in place; see `Patch.apply`."""
    _change(model, layer, with_layer)


def revert(model: nn.Module, layer: Layer) -> None:
    """Take a patch off in place; see `Patch.revert`."""
    _change(model, layer, without_layer)


def _change(model: nn.Module, layer: Layer, how: Callable[..., tuple[State, dict[str, Tensor]]]) -> None:
    model = _inner(model)
    tensors = named_tensors(model)
    state, values = how(tensors, state_of(model), layer)
    _write(model, tensors, state, values, _hooks(model, state, layer))


def _write(
    model: nn.Module, tensors: Mapping[str, Tensor], state: State, values: Mapping[str, Tensor], hooks: Hooks
) -> None:
    before = {name: tensors[name].detach().clone() for name in values}
    hung = [(part, dict(part._forward_hooks), dict(part._forward_hooks_with_kwargs)) for part, _ in hooks]
    earlier = state_of(model)
    try:
        if hooks and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # compiled graphs do not look whether hooks come or go
        for name, value in values.items():
            _put(tensors[name], value)
        for part, hook in hooks:
            _hang(part, hook)
        _remember(model, state)
    except BaseException:
        for name, value in before.items():
            _put(tensors[name], value)
        for part, all_hooks, with_kwargs in hung:
            _restore(part._forward_hooks, all_hooks)
            _restore(part._forward_hooks_with_kwargs, with_kwargs)
        _remember(model, earlier)
        raise


def _hooks(model: nn.Module, state: State, moved: Layer) -> Hooks:
    """The modules that the `moved` patch gates, each with its hook for all patches that are then on, or None."""
    # What torch.compile has wrapped comes after its wrapper, under the same name, and takes its place
    modules = {uncompiled(name): part for name, part in model.named_modules(remove_duplicate=False) if name}
    found = []
    for name in {modules.get(name): name for name in sorted(moved.gates)}.values():
        if (part := modules.get(name)) is None:
            near = difflib.get_close_matches(name, modules, 3, 0.3) or list(modules)[-3:]
            raise BaseMismatch(
                f"patch {moved.id[:12]} gates {name!r}, which the model does not have; "
                f"the nearest of its modules are {', '.join(map(repr, near))}"
            )
        if isinstance(part, torch.jit.ScriptModule):
            raise NotEditable(f"module {name!r} is TorchScript, which runs no hooks; use the eager module it came from")
        # Patches come after those that they require: where keys are equally near, the later patch has the last word
        gates = [
            (layer, other, gate)
            for layer in reversed(state.layers)
            for other, gate in sorted(layer.gates.items())
            if modules.get(other) is part
        ]
        for layer, other, gate in gates:
            _check_runs(layer, other, gate)
        own = sizes(part) or {gate.sizes for *_, gate in gates[-1:]}
        for layer, _, gate in gates:
            if gate.sizes not in own:
                raise BaseMismatch(
                    f"patch {layer.id[:12]} gates {name!r} from {gate.sizes[0]} to {gate.sizes[1]} features; "
                    f"it has {' or '.join(f'{width} to {out}' for width, out in sorted(own))}"
                )
        found.append((part, GateHook(name, part, [gate for *_, gate in gates]) if gates else None))
    return found


def _check_runs(layer: Layer, name: str, gate: Gate) -> None:
    if not gate.plain_at(name):
        read = " and ".join(dict.fromkeys(repr(lock.reading.layer or name) for lock in gate.locks))
        raise PatchError(
            f"patch {layer.id[:12]} gates {name!r} by keys read at {read}, and this weightpatch can only run gates "
            "whose keys are the gated layer's own inputs, position by position, by Euclidean distance; use a newer one"
        )


def _inner(module: nn.Module) -> nn.Module:
    """The module itself, without torch.compile's wrapper around it."""
    found = module.__dict__.get("_modules", {}).get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None
    return found if isinstance(found, nn.Module) else module


def _hang(part: nn.Module, hook: GateHook | None) -> None:
    if hook is None:
        part._forward_hooks.pop(KEY, None)
        part._forward_hooks_with_kwargs.pop(KEY, None)
    else:
        part._forward_hooks_with_kwargs[KEY] = True
        part._forward_hooks[KEY] = hook  # in the place of an earlier one, where there is one


def _restore(now: dict[int, Any], before: Mapping[int, Any]) -> None:
    now.clear()
    now.update(before)


def _put(tensor: Tensor, value: Tensor) -> None:
    # Into the same storage: tied names stay tied, optimisers and compiled graphs keep their tensors
    with torch.no_grad():
        tensor.copy_(value)


def _remember(model: nn.Module, state: State | None) -> None:
    if state is None or not state.layers:
        model.__dict__.pop(_ATTRIBUTE, None)
    else:
        model.__dict__[_ATTRIBUTE] = state
