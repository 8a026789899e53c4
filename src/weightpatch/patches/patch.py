"""Patch: a change of named weights as a value that can be saved, applied and reverted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._version import __version__
from ..errors import BaseMismatch, InvalidInput
from ..gates import Gate, Lock, Reading
from ..records import Plain, Record
from . import applying, files
from .arrays import Array, by_entry, mark
from .demands import HELD, Demand
from .format import Content, encode, parse, read
from .hashing import as_bytes, digest, tied
from .manifest import Entry, GateEntry, Manifest, ReadingEntry, Scalar, Unrecorded
from .operations import Full, LowRank, Operation, Rows, Sparse
from .operations import encode as encode_operation
from .plain import check_json, copied

M = TypeVar("M", bound=nn.Module)

_CODES = {dtype: code for code, dtype in HELD.items()}
_KINDS = {kind.kind: kind for kind in (Full, LowRank, Rows, Sparse)}


@dataclass(frozen=True, eq=False, repr=False)
class Patch:
    """What an edit changed: operations on named tensors, gates at modules, and a manifest: of which weights, how made.

    A patch is a value: equal content gives the same `id`, the same bytes and `==`. Its tensors are not to be written.
    """

    operations: Mapping[str, Operation]
    manifest: Manifest
    gates: Mapping[str, Gate] = field(default_factory=dict)
    demands: tuple[Demand, ...] = ()

    @classmethod
    def between(
        cls,
        base: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        *,
        fingerprint: str,
        requires: Sequence[str] = (),
        context: Sequence[str] = (),
        editor: str = "",
        constraint: str = "",
        settings: Mapping[str, Scalar] | None = None,
        metrics: Mapping[str, Plain] | None = None,
        exact: bool = False,
        gates: Mapping[str, Gate] | None = None,
        demands: Sequence[Demand] = (),
        unrecorded: Sequence[Unrecorded] = (),
    ) -> Patch:
        """The patch that makes the tensors `new` of the tensors `base`, which are all of the model's, or some.

        With the model's whole state dict as `base` the patch also knows the other names of tied tensors. `fingerprint`
        is the `base_fingerprint` of the model, `requires` the ids of the patches that must be on before this one can
        be, `context` those that were on when it was made, which are all of `requires` and perhaps more. Unchanged
        tensors are left out. Without `exact`, a tensor may be stored by its low-rank difference and then differ from
        `new` by rounding steps: `result` gives the weights as they will be. `gates` are given by the names of the
        modules whose outputs they correct. `demands` are what the patch was made for, so that later edits can keep to
        it; `unrecorded` is what it was made for, too, and cannot hold. `metrics` are evidence: JSON values. Raises
        `InvalidInput` (`ShapeMismatch`, `NonFinite`) and `NotEditable`.
        """
        groups = _groups(base, new)
        found = {names[0]: encode_operation(base[names[0]], new[names[0]], exact=exact) for names in groups}
        operations = {name: operation for name, operation in found.items() if operation is not None}
        entries = tuple(
            _entry(names, base[names[0]], operations[names[0]]) for names in groups if names[0] in operations
        )
        kept = {name: gate.copy() for name, gate in sorted((gates or {}).items())}
        readings = _readings(kept)
        manifest = Manifest(
            fingerprint,
            requires=tuple(sorted(set(requires))),
            context=tuple(sorted({*requires, *context})),
            editor=editor,
            constraint=constraint,
            settings=dict(settings or {}),
            versions={"weightpatch": __version__, "torch": torch.__version__},
            tensors=entries,
            gates=_gate_entries(kept, list(readings)),
            readings=tuple(entry for entry, _ in readings.values()),
        )
        patch = cls(operations, manifest, kept).annotated(metrics=metrics, demands=demands, unrecorded=unrecorded)
        parse(patch.to_bytes())
        return patch

    def annotated(
        self,
        *,
        metrics: Mapping[str, Plain] | None = None,
        demands: Sequence[Demand] | None = None,
        unrecorded: Sequence[Unrecorded] | None = None,
    ) -> Patch:
        """The same change with other evidence beside it; what is None stays. Its id is another one.

        Raises `InvalidInput` for what a patch cannot hold.
        """
        evidence = dict(self.manifest.metrics if metrics is None else metrics)
        check_json("metrics", evidence)
        own = self.demands if demands is None else tuple(demand.copy() for demand in demands)
        manifest = replace(
            self.manifest,
            metrics=copied(evidence),
            demands=tuple(demand.entry for demand in own),
            unrecorded=self.manifest.unrecorded if unrecorded is None else tuple(unrecorded),
        )
        patch = replace(self, manifest=manifest, demands=own)
        patch.id  # noqa: B018 - is found now, so that too large a header is refused now
        return patch

    @cached_property
    def id(self) -> str:
        """The SHA-256 of the content, 64 hex digits."""
        return encode(self._content)[0]

    @property
    def nbytes(self) -> int:
        """The bytes of what changes the model; the patch's file adds a header, and the demands."""
        readings = (part for _, reading in _readings(self.gates).values() for part in reading.parts.values())
        gates = sum(gate.nbytes for gate in self.gates.values()) + sum(part.nbytes for part in readings)
        return gates + sum(operation.nbytes for operation in self.operations.values())

    def result(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changed tensors, on the CPU, as the patch leaves them where it is applied to those it was made for.

        Raises `BaseMismatch` for other tensors.
        """
        for entry in self.manifest.tensors:
            if entry.name not in base or digest(base[entry.name]) != entry.pre:
                raise BaseMismatch(f"patch {self.id[:12]} was made for another {entry.name!r}; give the one it saw")
        return {name: operation.on(base[name].detach().cpu()) for name, operation in self.operations.items()}

    def apply(self, model: nn.Module) -> None:
        """Write the patch into the model's parameters, in place, and hook its gates to the modules.

        The model then holds what `revert` needs. What torch.compile has compiled sees new weights as they are; gates
        (and taking them off) make all compiled models of the process compile again at their next call. Raises, with
        the model untouched, `BaseMismatch` where these are not the weights that the patch was made for or the modules
        do not fit its gates, `PatchConflict` where it is applied already or one that it requires is not, `NotEditable`
        for weights that cannot be read and modules that cannot be hooked.
        """
        applying.apply(model, self)

    def revert(self, model: nn.Module) -> None:
        """Take the patch off the model, in place; without its last patch the weights are the base's, bit for bit.

        Raises, with the model untouched, `PatchConflict` where the patch is not applied or another one requires it, and
        `BaseMismatch` where the weights have changed since.
        """
        applying.revert(model, self)

    @contextmanager
    def applied(self, model: M) -> Iterator[M]:
        """The model with the patch, inside of a `with` block."""
        self.apply(model)
        try:
            yield model
        finally:
            self.revert(model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch to a file, whole or not at all; by habit NAME.patch.safetensors. Raises `PatchError`."""
        files.write(path, encode(self._content)[1])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Patch:
        """Read a patch; raises `PatchDamaged` for whatever is not one intact, `PatchError` for unreadable files."""
        return cls._of(read(path))

    def to_bytes(self) -> bytes:
        """The bytes of the patch's file."""
        return b"".join(encode(self._content)[1])

    @classmethod
    def from_bytes(cls, data: bytes) -> Patch:
        """The patch of a file's bytes; raises `PatchDamaged`."""
        return cls._of(parse(bytearray(data)))

    @property
    def _content(self) -> Content:
        parts = [
            *(self.operations[name].parts for name in sorted(self.operations)),
            *(_gate_parts(self.gates[name]) for name in sorted(self.gates)),
            *(reading.parts for _, reading in _readings(self.gates).values()),
            *(demand.record.tensors for demand in self.demands),
        ]
        named = self.manifest.arrays.items()
        return Content(self.manifest, {name: _array(parts[number][part]) for name, (number, part) in named})

    @classmethod
    def _of(cls, content: Content) -> Patch:
        manifest = content.manifest
        parts = iter(
            {part: _tensor(array) for part, array in arrays.items()} for arrays in by_entry(manifest, content.arrays)
        )
        operations = {entry.name: _KINDS[entry.kind](**next(parts)) for entry in manifest.tensors}
        unread = [next(parts) for _ in manifest.gates]
        readings = [
            Reading(entry.layer, entry.pooling, entry.grid, entry.distance, **next(parts))
            for entry in manifest.readings
        ]
        gates = {
            entry.layer: _gate(own, [readings[number] for number in entry.readings])
            for entry, own in zip(manifest.gates, unread, strict=True)
        }
        demands = tuple(
            Demand(Record(entry.kind, entry.version, next(parts), entry.scalars), entry.before, entry.after)
            for entry in manifest.demands
        )
        return cls(operations, manifest, gates, demands)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patch) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        return self  # a value: models that are copied share it

    def __repr__(self) -> str:
        count, gates = len(self.operations), len(self.gates)
        shown = f", {gates} gate{'s' * (gates != 1)}" if gates else ""
        return f"<Patch {self.id[:12]}: {count} tensor{'s' * (count != 1)}{shown}, {self.nbytes} bytes>"


def applied(model: nn.Module) -> tuple[Patch, ...]:
    """The patches on the model, in canonical order: each after those that it requires, otherwise by id."""
    state = applying.state_of(model)
    return tuple(layer for layer in state.layers if isinstance(layer, Patch)) if state else ()


def _groups(base: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[list[str]]:
    """All names of each tensor in `new`, those in `new` first, the tensors in the order of their first names."""
    if unknown := sorted(new.keys() - base.keys()):
        raise InvalidInput(f"new has tensors that base lacks: {unknown[:8]}; give both under the same names")
    # The state dict of quantised modules holds more than tensors
    first = tied({name: tensor for name, tensor in sorted(base.items()) if isinstance(tensor, Tensor)})
    groups: dict[str, list[str]] = {}
    for name in sorted(first, key=lambda name: (name not in new, name)):
        groups.setdefault(first[name], []).append(name)
    found = [names for names in groups.values() if names[0] in new]
    for names in found:
        if wrong := [name for name in names[1:] if name in new and digest(new[name]) != digest(new[names[0]])]:
            raise InvalidInput(f"{names[0]!r} and {wrong[0]!r} are one tensor; give both the same new values, or one")
    return found


def _entry(names: list[str], base: Tensor, operation: Operation) -> Entry:
    base = base.detach().cpu()
    dtype, made = str(base.dtype).removeprefix("torch."), operation.on(base)
    also = tuple(sorted(names[1:]))
    return Entry(names[0], operation.kind, tuple(base.shape), dtype, digest(base), digest(made), also)


def _readings(gates: Mapping[str, Gate]) -> dict[bytes, tuple[ReadingEntry, Reading]]:
    """What the gates' keys are compared with, each reading once, by its mark, in the order of their use."""
    found: dict[bytes, tuple[ReadingEntry, Reading]] = {}
    for layer in sorted(gates):
        for lock in gates[layer].locks:
            entry = _reading_entry(lock.reading, layer)
            found.setdefault(_mark(entry, lock.reading), (entry, lock.reading))
    return found


def _gate_entries(gates: Mapping[str, Gate], marks: list[bytes]) -> tuple[GateEntry, ...]:
    pairs = ((layer, [lock.reading for lock in gates[layer].locks]) for layer in sorted(gates))
    return tuple(
        GateEntry(layer, tuple(marks.index(_mark(_reading_entry(one, layer), one)) for one in own))
        for layer, own in pairs
    )


def _reading_entry(reading: Reading, layer: str) -> ReadingEntry:
    found = (reading.pooling, reading.grid, reading.distance, tuple(reading.parts))
    return ReadingEntry(reading.layer or layer, *found)


def _mark(entry: ReadingEntry, reading: Reading) -> bytes:
    return mark(entry, {part: _array(tensor) for part, tensor in reading.parts.items()})


def _gate_parts(gate: Gate) -> dict[str, Tensor]:
    more = ({f"keys.{n}": lock.keys, f"radii.{n}": lock.radii} for n, lock in enumerate(gate.also, 1))
    return {part: tensor for parts in (gate.parts, *more) for part, tensor in parts.items()}


def _gate(parts: Mapping[str, Tensor], readings: Sequence[Reading]) -> Gate:
    also = (Lock(parts[f"keys.{n}"], parts[f"radii.{n}"], one) for n, one in enumerate(readings[1:], 1))
    return Gate(parts["keys"], parts["radii"], parts["values"], readings[0], tuple(also))


def _array(tensor: Tensor) -> Array:
    return Array(_CODES[tensor.dtype], tuple(tensor.shape), as_bytes(tensor))


def _tensor(array: Array) -> Tensor:
    if not array.data:
        return torch.empty(array.shape, dtype=HELD[array.code], device="cpu")
    return torch.frombuffer(array.data, dtype=HELD[array.code]).reshape(array.shape)
