"""Room for gates: a copy of a model, one of whose layers has keys, radii and values that edits can set."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._calling import Function, Inputs, call
from ..errors import InvalidInput
from ..gates import KEY, gate_of, gated
from .clone import structural_clone
from .linear import is_transposed

__all__ = ["GATE", "given", "noted", "with_slots"]

GATE = "gate"  # the parameters are {layer}.gate.keys, .radii and .values
_SEEN: ContextVar[tuple[str, list[Tensor], list[Tensor] | None] | None] = ContextVar("seen", default=None)


def _gated(x: Tensor, y: Tensor, keys: Tensor, radii: Tensor, values: Tensor) -> Tensor:
    used = radii >= 0
    if not bool(used.any()):
        return y
    return gated(x, y, keys, radii, values) if bool(used.all()) else gated(x, y, keys[used], radii[used], values[used])


fx.wrap("_gated")  # one step of a traced model


def with_slots(model: nn.Module, layer: str, slots: int) -> nn.Module:
    """Return a structural clone whose `layer` has `slots` free keys; it answers as the model does, bit for bit.

    The keys are parameters, so that everything that edits, replays and judges parameters works for them. As in every
    structural clone no parameter needs a gradient: whoever asks which may move has to ask of the model itself.

    Args:
        model: any eager module.
        layer: a module that maps (..., width) to (..., out) and has a weight of shape (out, width), as linear ones do,
            or (width, out), as the Conv1D of transformers does.
        slots: how many keys there is room for.

    Raises:
        InvalidInput: there is no such layer, or it has no such weight.
    """
    clone = structural_clone(model)
    module = dict(clone.named_modules()).get(layer)
    weight = getattr(module, "weight", None)
    if module is None or module is clone or not isinstance(weight, Tensor) or weight.ndim != 2:
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name]
        near = difflib.get_close_matches(layer, linear, 3, 0.3) or linear[-3:]
        raise InvalidInput(f"a gate was asked for at layer={layer!r}; the model's linear layers are {', '.join(near)}")
    out, width = reversed(weight.shape) if is_transposed(module) else weight.shape
    room = _Room(layer)
    if (earlier := gate_of(module)) is not None:  # of patches that are on: one book with the new keys, as when applied
        module._forward_hooks.pop(KEY)
        module._forward_hooks_with_kwargs.pop(KEY)
        for name, part in earlier.parts.items():
            room.register_buffer(f"earlier_{name}", part.to(weight.device), persistent=False)
    for name, value in (
        ("keys", weight.new_zeros(slots, width)),
        ("radii", weight.new_full((slots,), -1.0)),
        ("values", weight.new_zeros(slots, out)),
    ):
        room.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))
    module.add_module(GATE, room)
    kind: Any = type(module)
    module.__class__ = _with_gate(kind)
    return clone


class _Room(nn.Module):
    """Holds the keys, radii and values of a layer."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer


@cache
def _with_gate(kind: Any) -> Any:
    """Return a kind of module that answers as `kind` and its gate do."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen = _SEEN.get()
        room = getattr(self, GATE)
        y = kind.forward(self, x, *args, **kwargs)
        if seen is not None and seen[0] == room.layer:
            seen[1].append(x.detach())
            if seen[2] is not None:
                y = y.detach().requires_grad_()
                seen[2].append(y)
        book = [room.keys, room.radii, room.values]
        if hasattr(room, "earlier_keys"):  # of equally near keys the first one counts: the new ones
            earlier = (room.earlier_keys, room.earlier_radii, room.earlier_values)
            book = [torch.cat(parts) for parts in zip(book, earlier, strict=True)]
        return _gated(x, y, *book)

    return type(f"Gated{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


@contextmanager
def noted(layer: str, answers: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """Collect what a layer with slots is given, call by call, inside of the block.

    Args:
        layer: its name.
        answers: gets what the layer answers without its gate, as leaves that gradients can be taken of.
    """
    seen: list[Tensor] = []
    token = _SEEN.set((layer, seen, answers))
    try:
        yield seen
    finally:
        _SEEN.reset(token)


@torch.no_grad()
def given(function: Function, layer: str, inputs: Inputs) -> Tensor:
    """Return what a layer with slots is given for a batch, (n, width).

    Args:
        function: the model.
        layer: its name.
        inputs: one batch.
    """
    call(function, inputs)  # a first pass may be run several times, to be recorded
    with noted(layer) as seen:
        call(function, inputs)
    return torch.cat([part.flatten(0, -2) for part in seen])
