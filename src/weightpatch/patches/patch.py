"""Patch: a change of named weights as a value that can be saved, applied and reverted."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._version import __version__
from ..errors import BaseMismatch, InvalidInput
from ..gates import Gate
from . import applying, files
from .format import Array, Content, encode, parse, read
from .hashing import as_bytes, digest, tied
from .manifest import CODES, DEMAND, GATE, KINDS, PARTS, Entry, Manifest, Scalar
from .operations import EDITABLE, INDEX, Full, LowRank, Operation, Rows, Sparse
from .operations import encode as encode_operation

_INTEGERS = tuple(INDEX.values())
M = TypeVar("M", bound=nn.Module)

_TYPES = INDEX | {code: getattr(torch, name) for name, code in CODES.items()}
_CODES = {dtype: code for code, dtype in _TYPES.items()}
_KINDS = {kind.kind: kind for kind in (Full, LowRank, Rows, Sparse)}


@dataclass(frozen=True, eq=False)
class Demand:
    """What a patch was made for: inputs and what is wanted of them, as `Classified` and `Within` say it.

    `kind` is the constraint's name, `limit` its margin or tolerance; `inputs` (n, ...) and `wanted`, classes (n,) or
    targets (n, ...), are tensors. Raises `InvalidInput` for other kinds and types.
    """

    kind: str
    limit: float
    inputs: Tensor
    wanted: Tensor

    def __post_init__(self) -> None:
        wanted = _INTEGERS if self.kind == "Classified" else EDITABLE
        if self.kind not in KINDS or self.inputs.dtype not in _TYPES.values() or self.wanted.dtype not in wanted:
            raise InvalidInput(
                f"a demand was given as {self.kind} of {self.inputs.dtype} inputs and {self.wanted.dtype}; expected "
                f"one of {', '.join(KINDS)}, with inputs and targets of floating-point numbers, or integers"
            )

    def copy(self) -> "Demand":
        """The same demand on the CPU, in memory of its own."""
        inputs, wanted = (
            part.detach().cpu().clone(memory_format=torch.contiguous_format) for part in (self.inputs, self.wanted)
        )
        return Demand(self.kind, self.limit, inputs, wanted)


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
        requires: tuple[str, ...] = (),
        editor: str = "",
        constraint: str = "",
        settings: Mapping[str, Scalar] | None = None,
        metrics: Mapping[str, Scalar] | None = None,
        exact: bool = False,
        gates: Mapping[str, Gate] | None = None,
        demands: Sequence[Demand] = (),
    ) -> "Patch":
        """The patch that makes the tensors `new` of the tensors `base`, which are all of the model's, or some.

        With the model's whole state dict as `base` the patch also knows the other names of tied tensors. `fingerprint`
        is the `base_fingerprint` of the model, `requires` the ids of the patches that are applied to it. Unchanged
        tensors are left out. Without `exact`, a tensor may be stored by its low-rank difference and then differ from
        `new` by rounding steps: `result` gives the weights as they will be. `gates` are given by the names of the
        modules whose outputs they correct. `demands` are what the patch was made for, so that later edits can keep to
        it. Raises `InvalidInput` (`ShapeMismatch`, `NonFinite`) and `NotEditable`.
        """
        groups = _groups(base, new)
        found = {names[0]: encode_operation(base[names[0]], new[names[0]], exact=exact) for names in groups}
        operations = {name: operation for name, operation in found.items() if operation is not None}
        entries = tuple(
            _entry(names, base[names[0]], operations[names[0]]) for names in groups if names[0] in operations
        )
        manifest = Manifest(
            fingerprint,
            tuple(sorted(set(requires))),
            editor,
            constraint,
            dict(settings or {}),
            dict(metrics or {}),
            {"weightpatch": __version__, "torch": torch.__version__},
            entries,
            gates=tuple(sorted(gates or {})),
            demands=tuple((demand.kind, demand.limit) for demand in demands),
        )
        own = tuple(demand.copy() for demand in demands)
        patch = cls(operations, manifest, {name: gate.copy() for name, gate in (gates or {}).items()}, own)
        parse(patch.to_bytes())
        return patch

    @cached_property
    def id(self) -> str:
        """The SHA-256 of the content, 64 hex digits."""
        return encode(self._content)[0]

    @property
    def nbytes(self) -> int:
        """The bytes of what changes the model; the patch's file adds a header, and the demands."""
        gates = sum(gate.nbytes for gate in self.gates.values())
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
    def load(cls, path: str | os.PathLike[str]) -> "Patch":
        """Read a patch; raises `PatchDamaged` for whatever is not one intact, `PatchError` for unreadable files."""
        return cls._of(read(path))

    def to_bytes(self) -> bytes:
        """The bytes of the patch's file."""
        return b"".join(encode(self._content)[1])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Patch":
        """The patch of a file's bytes; raises `PatchDamaged`."""
        return cls._of(parse(bytearray(data)))

    @property
    def _content(self) -> Content:
        arrays = {}
        for number, name in enumerate(sorted(self.operations)):
            for part, tensor in self.operations[name].parts.items():
                arrays[f"{number:04}.{part}"] = _array(tensor)
        for number, name in enumerate(sorted(self.gates), len(self.operations)):
            for part, tensor in self.gates[name].parts.items():
                arrays[f"{number:04}.{part}"] = _array(tensor)
        for number, demand in enumerate(self.demands, len(self.operations) + len(self.gates)):
            arrays |= {f"{number:04}.{part}": _array(getattr(demand, part)) for part in DEMAND}
        return Content(self.manifest, arrays)

    @classmethod
    def _of(cls, content: Content) -> "Patch":
        operations: dict[str, Operation] = {}
        for number, entry in enumerate(content.manifest.tensors):
            parts = {part: _tensor(content.arrays[f"{number:04}.{part}"]) for part in PARTS[entry.kind]}
            operations[entry.name] = _KINDS[entry.kind](**parts)
        gates = {
            name: Gate(*(_tensor(content.arrays[f"{number:04}.{part}"]) for part in GATE))
            for number, name in enumerate(content.manifest.gates, len(operations))
        }
        demands = tuple(
            Demand(kind, limit, *(_tensor(content.arrays[f"{number:04}.{part}"]) for part in DEMAND))
            for number, (kind, limit) in enumerate(content.manifest.demands, len(operations) + len(gates))
        )
        return cls(operations, content.manifest, gates, demands)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patch) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patch":
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


def _array(tensor: Tensor) -> Array:
    return Array(_CODES[tensor.dtype], tuple(tensor.shape), as_bytes(tensor))


def _tensor(array: Array) -> Tensor:
    return torch.frombuffer(array.data, dtype=_TYPES[array.code]).reshape(array.shape)
