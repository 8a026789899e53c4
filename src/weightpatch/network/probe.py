"""The probe: one observed pass that finds the module calls whose outputs cannot depend on the edited parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .state import Place, unchanged, watch
from .tree import flatten_call, leaves_of, tensors_in

__all__ = ["Event", "Probe", "WriteGuard", "WritesParameter"]

# Functions that hand a tensor's values to Python, where they may decide what runs next.
ESCAPES = {
    "item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "argwhere", "nonzero", "masked_select", "unique",
    "unique_consecutive", "_unique2", "_return_output", "_consecutive_return_output", "bincount", "repeat_interleave",
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__contains__", "__dlpack__",
}  # fmt: skip


@dataclass(eq=False)
class Event:
    """One module call of the probe."""

    name: str
    end: int = 0  # index of the first event after this call
    independent: bool = False
    mutated: tuple[int, ...] = ()  # which of its tensor arguments it changes in place
    outputs: list[tuple[Tensor, int]] = field(default_factory=list)  # with their versions at return


class Probe(TorchFunctionMode):
    """Observe one pass in which only the edited parameters require grad.

    A call is independent when nothing computed during it depends on the edited parameters: neither through gradients
    nor through what does not carry them (argmax, detach, no_grad), and no dependent value was handed to Python before
    its end. `strict` also leaves out calls that change their arguments in place. `places` are attributes that passes
    change; a call that changes one of them is not independent.
    """

    def __init__(self, *, strict: bool = False, places: list[Place] | None = None) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._strict, self._places = strict, places or []
        self._token = object()  # marks this probe's dependent tensors
        self._quiet, self._escaped, self._dependent_steps = False, False, 0

    def again(self) -> Probe:
        """Return a new probe of the same kind."""
        return Probe(strict=self._strict, places=self._places)

    def call(self, name: str, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one module's forward and note what it was."""
        event, index = Event(name), len(self.events)
        self.events.append(event)
        self._quiet = True
        given, rest, known = flatten_call(args, kwargs)
        versions = [tensor._version for tensor in given]
        steps, seen = self._dependent_steps, watch(self._places)
        self._quiet = False
        output = inner(*args, **kwargs)
        self._quiet = True
        event.end = len(self.events)
        same = known and _same_arguments(args, kwargs, given, rest)
        if same and steps == self._dependent_steps and not self._escaped and unchanged(seen, watch(self._places)):
            event.mutated = tuple(i for i, tensor in enumerate(given) if tensor._version != versions[i])
            self._finish(event, self.events[index + 1 :], output)
        self._quiet = False
        return output

    def _finish(self, event: Event, inside: list[Event], output: Any) -> None:
        tensors, plain = leaves_of(output)
        free = plain and bool(tensors) and not any(map(self.depends, tensors))
        event.independent = free and not (self._strict and event.mutated)
        if event.independent:
            event.outputs = [(tensor, tensor._version) for tensor in tensors]
            for other in inside:
                other.outputs = []  # only outermost calls are recorded: let go of the memory

    def depends(self, tensor: Tensor) -> bool:
        """Say whether a tensor's values may depend on the edited parameters."""
        parts = (tensor,) if tensor._base is None else (tensor, tensor._base)
        return any(part.requires_grad or getattr(part, "_depends_for", None) is self._token for part in parts)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs), [])
        if not any(map(self.depends, given)):
            return func(*args, **kwargs)
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        made = tensors_in(output, [])
        written = [tensor for tensor, version in zip(given, versions, strict=True) if tensor._version != version]
        self._escaped |= self._escapes(func, args, given)
        if made or written:
            self._dependent_steps += 1
        for tensor in (*made, *written):
            self._taint(tensor)
        return output

    def _taint(self, tensor: Tensor) -> None:
        for part in (tensor, tensor._base):
            if part is not None and not part.requires_grad:
                part._depends_for = self._token  # type: ignore[attr-defined]

    def _escapes(self, func: Any, args: tuple[Any, ...], given: list[Tensor]) -> bool:
        name = getattr(func, "__name__", "")
        if name == "where":
            return len(args) == 1
        if name in ("__getitem__", "index"):
            return any(tensor.dtype in (torch.bool, torch.uint8) and self.depends(tensor) for tensor in given[1:])
        return name in ESCAPES


def _same_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], rest: list[Any]) -> bool:
    """Say whether the containers among a call's arguments hold what they held before it."""
    now, rest_now, _ = flatten_call(args, kwargs)
    return rest == rest_now and len(now) == len(tensors) and all(a is b for a, b in zip(now, tensors, strict=True))


class WritesParameter(BaseException):
    """A forward pass was about to change a weight in place; nothing was written. Holds the weight's name."""


class WriteGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stop a pass before it writes to the memory of a weight, which the clone shares with the user's model."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {weight.untyped_storage()._cdata: name for name, weight in weights.items()}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler at the first call, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[position] if position < len(args) else kwargs.get(argument.name)
                    for tensor in tensors_in(value, []):
                        if self._owner(tensor) is not None:
                            raise WritesParameter(self._owner(tensor))
        return func(*args, **kwargs)

    def _owner(self, tensor: Tensor) -> str | None:
        try:
            return self._names.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
            return None
