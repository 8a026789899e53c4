"""Passes that record the module calls of a plan, and passes that hand the recorded outputs back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .flow import Flow, Place
from .probe import Event
from .tree import PLAIN, flatten_call

__all__ = ["CheckReplay", "Diverged", "Plan", "Record", "Recording", "Replay", "plan_of", "without_dead"]

Forward = Callable[..., Any]


class Diverged(BaseException):
    """The pass does not call what the plan says; a BaseException, so that no forward pass swallows it."""


@dataclass(eq=False)
class Plan:
    """Which module calls of a pass are recorded.

    Attributes:
        sequence: every module call up to the last recorded one, outside of recorded ones, as (module name, index of the
            recorded call or -1).
        dirty: the output leaves that the pass changes in place later, and so are stored and handed out as copies.
        mutated: per recorded call, which of its tensor arguments it changes in place.
        live: the output leaves that a replayed pass reads; None until it is known.
    """

    sequence: tuple[tuple[str, int], ...]
    dirty: set[Place]
    mutated: tuple[tuple[int, ...], ...]
    live: set[Place] | None = None
    arguments: list[Arguments] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        """The modules whose calls have to be watched."""
        return {name for name, _ in self.sequence}


def plan_of(events: Sequence[Event]) -> Plan:
    """Choose the outermost independent calls of a probe, and note the order of the calls around them."""
    sequence: list[tuple[str, int]] = []
    dirty: set[Place] = set()
    mutated: list[tuple[int, ...]] = []
    index = 0
    while index < len(events):
        event = events[index]
        if event.independent:
            call = len(mutated)
            dirty |= {(call, k) for k, (tensor, version) in enumerate(event.outputs) if tensor._version != version}
            mutated.append(event.mutated)
            sequence.append((event.name, call))
            index = event.end
        else:
            sequence.append((event.name, -1))
            index += 1
    while sequence and sequence[-1][1] < 0:
        sequence.pop()
    return Plan(tuple(sequence), dirty, tuple(mutated))


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a recorded call was given: where each tensor came from, else its shape and dtype, and all constants.

    Attributes:
        dims: the sizes of the pass's inputs, of all dimensions of all tensors in order.
    """

    sources: tuple[tuple[Place, ...], ...]
    shapes: tuple[tuple[torch.Size, torch.dtype], ...]
    rest: list[Any]
    dims: tuple[int, ...] = ()

    def like(self, other: Arguments) -> bool:
        """Say whether the same plan may serve both: sources and constants agree, sizes may differ."""
        return (
            self.sources == other.sources
            and len(self.rest) == len(other.rest)
            and all(a == b or self._sizes(a, b, other) for a, b in zip(self.rest, other.rest, strict=True))
            and all(a[1] == b[1] and len(a[0]) == len(b[0]) for a, b in zip(self.shapes, other.shapes, strict=True))
        )

    def _sizes(self, a: Any, b: Any, other: Arguments) -> bool:
        """Say whether two constants are the same size of the inputs, here and there: a length, or a number of items."""
        whole = type(a) is int and type(b) is int and len(self.dims) == len(other.dims)
        return whole and (a, b) in zip(self.dims, other.dims, strict=True)


@final
@dataclass(frozen=True)
class Either:
    """A constant that may be one of two: whether it is a number of items cannot be told."""

    one: int
    other: int

    def __eq__(self, value: object) -> bool:
        return type(value) is int and value in (self.one, self.other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(eq=False)
class Recorded:
    """One recorded call: its arguments, and its output's tensors around a structure."""

    arguments: Arguments
    leaves: list[Tensor]
    rebuild: Callable[[Sequence[Tensor]], Any] | None  # None: the output is the one tensor
    copies: tuple[int, ...]  # leaves to hand out as copies


@dataclass(eq=False)
class Recording:
    """The outputs, on one batch, of the module calls that do not depend on the edited parameters.

    Attributes:
        inputs: the positional and keyword arguments of the pass; None where the caller brings them again.
        versions: of the inputs' tensors, to see that they are as they were.
        output: the unedited model's answer; None where it was not asked for.
    """

    plan: Plan | None = None
    calls: list[Recorded] = field(default_factory=list)
    guards: list[tuple[Tensor, int]] = field(default_factory=list)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    versions: int = 0
    output: Any = None

    @property
    def nbytes(self) -> int:
        """The memory of the stored outputs, in bytes."""
        storages = {
            leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
            for call in self.calls
            for leaf in call.leaves
            if leaf.layout is torch.strided
        }
        return sum(storages.values())

    def intact(self) -> bool:
        """Say whether no pass has changed a stored output in place."""
        return all(leaf._version == version for leaf, version in self.guards)

    def tensors(self) -> list[Tensor]:
        """Return the stored outputs that a replay reads."""
        return [leaf for leaf, _ in self.guards]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Recording:
        """Return the same recording with every stored output replaced."""
        guarded, guards = {id(leaf) for leaf, _ in self.guards}, []
        calls = []
        for call in self.calls:
            leaves = [change(leaf) for leaf in call.leaves]
            guards += [(new, new._version) for old, new in zip(call.leaves, leaves, strict=True) if id(old) in guarded]
            calls.append(replace(call, leaves=leaves))
        return replace(self, calls=calls, guards=guards)

    def items(self, index: slice, total: int) -> Recording:
        """Return the recording of some items of a batch of `total`: the first dimension is taken for that of items."""

        def some(tensor: Tensor) -> Tensor:
            return tensor[index] if tensor.ndim and len(tensor) == total else tensor

        found, size = self.mapped(some), len(range(*index.indices(total)))
        for call in found.calls:
            shapes = tuple(
                (torch.Size((size, *shape[1:])) if shape and shape[0] == total else shape, dtype)
                for shape, dtype in call.arguments.shapes
            )
            rest = [Either(total, size) if type(c) is int and c == total else c for c in call.arguments.rest]
            call.arguments = replace(call.arguments, shapes=shapes, rest=rest)
        return replace(found, inputs=None, output=None)


class Record:
    """A full pass that stores the outputs of the plan's calls.

    Args:
        plan: which calls.
        inputs: the tensors of the pass's inputs.
        trained: whether other parameters than the edited ones are differentiated too: then a gradient is no sign of
            the edit, and the plan is trusted.
    """

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], *, trained: bool = False) -> None:
        self.plan, self.recording, self._trained = plan, Recording(plan), trained
        self._position, self._inside = 0, False
        self._known: dict[int, tuple[weakref.ref[Tensor], tuple[Place, ...]]] = {}
        self._returned: list[tuple[weakref.ref[Tensor], int]] = []
        self._dims = tuple(size for tensor in inputs for size in tensor.shape)
        for i, tensor in enumerate(inputs):
            self._remember(tensor, (-1, i))

    def call(self, name: str, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one module's forward; keep its output where the plan says so."""
        if self._inside or self._position == len(self.plan.sequence):
            return inner(*args, **kwargs)
        expected, index = self.plan.sequence[self._position]
        if expected != name:
            raise Diverged(f"{name} is called where {expected} was")
        self._position += 1
        if index < 0:
            return inner(*args, **kwargs)
        arguments = self._arguments(name, index, args, kwargs)
        self._inside = True
        try:
            output = inner(*args, **kwargs)
        finally:
            self._inside = False
        self.recording.calls.append(self._store(name, index, arguments, output))
        return output

    def close(self) -> Recording:
        """End the pass."""
        if self._position != len(self.plan.sequence):
            raise Diverged(f"{self.plan.sequence[self._position][0]} is not called")
        for ref, version in self._returned:
            tensor = ref()
            if tensor is not None and tensor._version != version:
                raise Diverged("another output is changed in place")
        return self.recording

    def _arguments(self, name: str, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        tensors, rest, known = flatten_call(args, kwargs)
        if not known or (not self._trained and any(tensor.requires_grad for tensor in tensors)):
            raise Diverged(f"{name} is given something that may depend on the edit")
        shapes = tuple((t.shape, t.dtype) for t in tensors)
        made = Arguments(tuple(map(self._source, tensors)), shapes, rest, self._dims)
        if len(self.plan.arguments) == index:
            self.plan.arguments.append(made)
        elif len(made.shapes) != len(self.plan.arguments[index].shapes) or not made.like(self.plan.arguments[index]):
            raise Diverged(f"{name} is given other arguments")
        return made

    def _source(self, tensor: Tensor) -> tuple[Place, ...]:
        ref, places = self._known.get(id(tensor), (None, ()))
        return places if ref is not None and ref() is tensor else ()

    def _remember(self, tensor: Tensor, place: Place) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), (*self._source(tensor), place))

    def _store(self, name: str, index: int, arguments: Arguments, output: Any) -> Recorded:
        parts, spec = pytree.tree_flatten(output)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        plain = all(isinstance(part, (Tensor, *PLAIN)) for part in parts)
        if not plain or (not self._trained and any(tensor.requires_grad for tensor in tensors)):
            raise Diverged(f"{name} returns something that may depend on the edit")
        leaves, copies = [], []
        for k, tensor in enumerate(tensors):
            self._remember(tensor, (index, k))
            dirty, live = (index, k) in self.plan.dirty, self.plan.live is None or (index, k) in self.plan.live
            if not dirty:
                self._returned.append((weakref.ref(tensor), tensor._version))
            elif live:
                copies.append(k)
            leaves.append(_placeholder(tensor) if not live else tensor.clone() if dirty else _compact(tensor))
            if live:
                self.recording.guards.append((leaves[-1], leaves[-1]._version))
        rebuild = None if isinstance(output, Tensor) else _rebuilder(parts, spec)
        return Recorded(arguments, leaves, rebuild, tuple(copies))


def _rebuilder(parts: list[Any], spec: pytree.TreeSpec) -> Callable[[Sequence[Tensor]], Any]:
    frame = [None if isinstance(part, Tensor) else part for part in parts]
    where = [i for i, part in enumerate(parts) if isinstance(part, Tensor)]

    def rebuild(leaves: Sequence[Tensor]) -> Any:
        filled: list[Any] = list(frame)
        for i, leaf in zip(where, leaves, strict=True):
            filled[i] = leaf
        return pytree.tree_unflatten(filled, spec)

    return rebuild


def _compact(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy where it is a small part of a larger memory that would be kept alive by it."""
    if tensor.layout is not torch.strided:
        return tensor
    own = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() <= 2 * own else tensor.clone()


def _placeholder(tensor: Tensor) -> Tensor:
    return torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def without_dead(recording: Recording, live: set[Place]) -> Recording:
    """Replace the outputs that no replayed pass reads by placeholders that take no memory."""
    calls = []
    for index, call in enumerate(recording.calls):
        leaves = [leaf if (index, k) in live else _placeholder(leaf) for k, leaf in enumerate(call.leaves)]
        copies = tuple(k for k in call.copies if (index, k) in live)
        calls.append(replace(call, leaves=leaves, copies=copies))
    kept = {id(leaf) for call in calls for leaf in call.leaves}
    return replace(recording, calls=calls, guards=[guard for guard in recording.guards if id(guard[0]) in kept])


class Replay:
    """A pass in which the plan's calls return what was recorded."""

    def __init__(self, recording: Recording, inputs: Sequence[Tensor]) -> None:
        assert recording.plan is not None
        self.recording, self._sequence, self._inputs = recording, recording.plan.sequence, inputs
        self._position, self._end = 0, len(recording.plan.sequence)
        self._handed: list[Sequence[Tensor]] = []

    def call(self, name: str, inner: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the recorded output of one module's forward, or run it."""
        position = self._position
        if position == self._end:
            return inner(*args, **kwargs)
        expected, index = self._sequence[position]
        if expected != name:
            raise Diverged(f"{name} is called where {expected} was")
        self._position = position + 1
        return inner(*args, **kwargs) if index < 0 else self._recall(name, self.recording.calls[index], args, kwargs)

    def close(self) -> None:
        """End the pass."""
        if self._position != self._end:
            raise Diverged(f"{self._sequence[self._position][0]} is not called")
        if not self.recording.intact():
            raise Diverged("a recorded output was changed in place")

    def _recall(self, name: str, call: Recorded, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors, rest, known = flatten_call(args, kwargs)
        if not known or not self._as_recorded(call.arguments, tensors, rest):
            raise Diverged(f"{name} is given other arguments")
        leaves: Sequence[Tensor] = call.leaves
        if call.copies:
            leaves = [leaf.clone() if k in call.copies else leaf for k, leaf in enumerate(leaves)]
        self._handed.append(leaves)
        return leaves[0] if call.rebuild is None else call.rebuild(leaves)

    def _as_recorded(self, arguments: Arguments, tensors: list[Tensor], rest: list[Any]) -> bool:
        if len(tensors) != len(arguments.sources) or rest != arguments.rest:
            return False
        for tensor, source, (shape, dtype) in zip(tensors, arguments.sources, arguments.shapes, strict=True):
            if source:
                if not any(tensor is (self._inputs[k] if i < 0 else self._handed[i][k]) for i, k in source):
                    return False
            elif tensor.shape != shape or tensor.dtype != dtype:
                return False
        return True


class CheckReplay(Replay):
    """A replay that spoils the arguments which the skipped calls would have changed in place.

    Such a call's result is right only if it is read through the call's output; who reads the argument instead gets NaN,
    and the comparison with the full pass sees it.
    """

    def __init__(self, recording: Recording, inputs: Sequence[Tensor]) -> None:
        super().__init__(recording, inputs)
        self.flow = Flow()

    def live(self, output: Any) -> set[Place]:
        """Name the recorded outputs that this pass read to find its own."""
        return self.flow.live([call.leaves for call in self.recording.calls], self._handed, output)

    def _recall(self, name: str, call: Recorded, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super()._recall(name, call, args, kwargs)
        plan = self.recording.plan
        assert plan is not None
        changed = plan.mutated[len(self._handed) - 1]
        if changed:
            tensors, _, _ = flatten_call(args, kwargs)
            for position in changed:
                spoilt = tensors[position]
                with torch.no_grad(), self.flow.paused():
                    spoilt.fill_(torch.nan if spoilt.is_floating_point() or spoilt.is_complex() else 1)
        return output
