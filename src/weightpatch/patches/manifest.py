"""What a patch says about itself: the manifest, checked field by field; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from .._readings import check_reading
from ..errors import InvalidInput, PatchDamaged
from .plain import (
    LARGEST,
    as_tuple,
    check,
    check_digest,
    check_ids,
    check_json,
    check_name,
    check_scalars,
    check_text,
    copied,
    fields,
    rising,
)

if TYPE_CHECKING:
    from ..records import Plain

FORMAT = "weightpatch-patch/2"
LIMIT = 10_000  # tensors, gates, readings and demands in a patch, together; and patches that one may name
LOCKS = 8  # of a gate
NAME_LIMIT = 128  # characters in the name of a demand's tensor
PARTS = {"full": ("values",), "lowrank": ("left", "right"), "rows": ("index", "values"), "sparse": ("index", "values")}
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}

Scalar = str | int | float | bool

_KIND = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}/[a-z0-9][a-z0-9_.-]{0,63}")
_TENSOR = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_READING = (("centre",), ("centre", "metric"), ("metric",), ())


@dataclass(frozen=True)
class Entry:
    """One changed tensor: its name, the kind of operation, and the SHA-256 of its values before and after.

    `also` are the other names of a tied tensor; weights in which the tie is lost are changed under all of them.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    pre: str
    post: str
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the tensor, its own first."""
        return (self.name, *self.also)

    def __post_init__(self) -> None:
        check(isinstance(self.also, tuple) and len(self.also) <= LIMIT, "also", self.also, "a tuple of names")
        for name in self.names:
            check_name(name)
        check(rising(self.also), "also", self.also, "each name once, in rising order")
        check(isinstance(self.kind, str) and self.kind in PARTS, "kind", self.kind, f"one of {', '.join(PARTS)}")
        check(isinstance(self.dtype, str) and self.dtype in CODES, "dtype", self.dtype, f"one of {', '.join(CODES)}")
        check(isinstance(self.shape, tuple) and len(self.shape) <= 16, "shape", self.shape, "a tuple of <= 16 sizes")
        for size in self.shape:
            check(type(size) is int and 0 < size <= LARGEST, "shape", self.shape, "positive integers")
        check_digest("pre", self.pre)
        check_digest("post", self.post)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its arrays."""
        return PARTS[self.kind]

    @classmethod
    def from_json(cls, plain: object) -> Entry:
        """The entry of `to_json`; raises `InvalidInput` for anything else."""
        return cls(**_listed(cls, plain, "a tensor's entry", "shape", "also"))


@dataclass(frozen=True)
class GateEntry:
    """One gated module: its name, and for each of its locks which of the manifest's readings it is compared with."""

    layer: str
    readings: tuple[int, ...]

    def __post_init__(self) -> None:
        check_name(self.layer, "module name")
        fine = isinstance(self.readings, tuple) and 0 < len(self.readings) <= LOCKS
        fine = fine and all(type(n) is int and 0 <= n < LIMIT for n in self.readings)
        check(fine, "a gate's readings", self.readings, f"the numbers of 1 to {LOCKS} readings")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its arrays: the first lock's, those of further locks with their numbers, and the values."""
        more = (f"{part}.{n}" for n in range(1, len(self.readings)) for part in ("keys", "radii"))
        return ("keys", "radii", "values", *more)

    @classmethod
    def from_json(cls, plain: object) -> GateEntry:
        """The entry of `to_json`; raises `InvalidInput` for anything else."""
        return cls(**_listed(cls, plain, "a gate's entry", "readings"))


@dataclass(frozen=True)
class ReadingEntry:
    """What keys are compared with, as `weightpatch.gates.Reading` says it; `parts` names the arrays that are there."""

    layer: str
    pooling: str = "none"
    grid: tuple[int, ...] = ()
    distance: str = "euclidean"
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.layer, "module name")
        check_reading(self.pooling, self.grid, self.distance)
        check(self.parts in _READING, "a reading's parts", self.parts, "some of centre and metric, in this order")

    @classmethod
    def from_json(cls, plain: object) -> ReadingEntry:
        """The entry of `to_json`; raises `InvalidInput` for anything else."""
        return cls(**_listed(cls, plain, "a reading's entry", "grid", "parts"))


@dataclass(frozen=True)
class DemandEntry:
    """One demand's record without its tensors' values, and its violation before and after; None where not known."""

    kind: str
    version: int
    tensors: tuple[str, ...] = ()
    scalars: Mapping[str, Plain] = field(default_factory=dict)
    before: float | None = None
    after: float | None = None

    def __post_init__(self) -> None:
        fine = isinstance(self.kind, str) and _KIND.fullmatch(self.kind) is not None
        check(fine, "a demand's kind", self.kind, "AUTHOR/NAME, each 1 to 64 of a-z, 0-9, '_', '.' and '-'")
        fine = type(self.version) is int and 0 < self.version < 2**31
        check(fine, "a demand's version", self.version, "a whole number of at least 1")
        fine = isinstance(self.tensors, tuple) and len(self.tensors) <= LIMIT
        check(fine, "a demand's tensors", self.tensors, f"at most {LIMIT} names")
        for name in self.tensors:
            fine = isinstance(name, str) and len(name) <= NAME_LIMIT and _TENSOR.fullmatch(name) is not None
            check(fine, "the name of a demand's tensor", name, "128 of A-Z, a-z, 0-9 and '_', in dotted parts")
        check(rising(self.tensors), "a demand's tensors", self.tensors, "each name once, in rising order")
        check_json("a demand's scalars", self.scalars)
        for when in ("before", "after"):
            value = getattr(self, when)
            fine = value is None or (isinstance(value, float) and isfinite(value))
            check(fine, f"a demand's violation {when}", value, "a finite float, or None")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its arrays."""
        return self.tensors

    @classmethod
    def from_json(cls, plain: object) -> DemandEntry:
        """The entry of `to_json`; raises `InvalidInput` for anything else."""
        return cls(**_listed(cls, plain, "a demand's entry", "tensors"))


@dataclass(frozen=True)
class Unrecorded:
    """A demand that a patch was made for and does not hold: its kind, and why, each one printable line."""

    kind: str
    reason: str

    def __post_init__(self) -> None:
        for name, most in (("kind", 200), ("reason", 1000)):
            value = getattr(self, name)
            fine = isinstance(value, str) and 0 < len(value) <= most and value.isprintable()
            check(fine, f"the {name} of what was not recorded", value, f"1 to {most} printable characters")

    @classmethod
    def from_json(cls, plain: object) -> Unrecorded:
        """The value of `to_json`; raises `InvalidInput` for anything else."""
        return cls(**fields(plain, tuple(cls.__dataclass_fields__), "what was not recorded"))


@dataclass(frozen=True)
class Manifest:
    """Which base a patch changes, after which others, made how, what it does to each tensor, and what it gates.

    `requires` are the patches that must be on; `context`, which holds them too, those that were on when this one was
    made, so that it can be understood only with their files.
    """

    base: str
    requires: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    editor: str = ""
    constraint: str = ""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    metrics: Mapping[str, Plain] = field(default_factory=dict)
    versions: Mapping[str, Scalar] = field(default_factory=dict)
    tensors: tuple[Entry, ...] = ()
    gates: tuple[GateEntry, ...] = ()
    readings: tuple[ReadingEntry, ...] = ()
    demands: tuple[DemandEntry, ...] = ()
    unrecorded: tuple[Unrecorded, ...] = ()
    format: str = FORMAT

    def __post_init__(self) -> None:
        check(self.format == FORMAT, "format", self.format, f"{FORMAT}; another weightpatch may read it")
        check_digest("base", self.base)
        check_ids("requires", self.requires, LIMIT)
        check_ids("context", self.context, LIMIT)
        check(set(self.requires) <= set(self.context), "requires", self.requires, "no id that is not in context")
        check_text("editor", self.editor)
        check_text("constraint", self.constraint)
        check_scalars("settings", self.settings)
        check_json("metrics", self.metrics)
        check_scalars("versions", self.versions)
        for name in _ENTRIES:
            given = getattr(self, name)
            check(isinstance(given, tuple) and len(given) <= LIMIT, name, "...", f"a tuple of at most {LIMIT}")
        check(len(self.entries) <= LIMIT, "tensors, gates, readings and demands", "...", f"at most {LIMIT} together")
        names = [entry.name for entry in self.tensors]
        check(rising(names), "tensors", names, "each name once, in rising order")
        every = [name for entry in self.tensors for name in entry.names]
        check(len(set(every)) == len(every), "tensors", every, "no name under two tensors")
        layers = [entry.layer for entry in self.gates]
        check(rising(layers), "gates", layers, "each module once, in rising order")
        used = list(dict.fromkeys(number for entry in self.gates for number in entry.readings))
        check(used == list(range(len(self.readings))), "gates", used, "all readings, numbered in order of use")

    @property
    def entries(self) -> tuple[Entry | GateEntry | ReadingEntry | DemandEntry, ...]:
        """Whatever has arrays, in the order of its numbers in the file."""
        return (*self.tensors, *self.gates, *self.readings, *self.demands)

    @property
    def arrays(self) -> dict[str, tuple[int, str]]:
        """The arrays that the file holds: (number of the entry, part) by name, as in "0007.left"."""
        pairs = ((number, part) for number, entry in enumerate(self.entries) for part in entry.parts)
        return {f"{number:04}.{part}": (number, part) for number, part in pairs}

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain dicts, lists and scalars."""
        return {name: _plain(getattr(self, name)) for name in _MANIFEST}

    @classmethod
    def from_json(cls, plain: object) -> Manifest:
        """The manifest of `to_json`; anything else is `PatchDamaged`."""
        try:
            found = _listed(cls, plain, "the manifest", "requires", "context", *_ENTRIES)
            return cls(**found | {name: tuple(map(kind, found[name])) for name, kind in _ENTRIES.items()})
        except InvalidInput as error:
            raise PatchDamaged(f"not a patch: {error}") from None


_MANIFEST = tuple(Manifest.__dataclass_fields__)
_ENTRIES: dict[str, Any] = {
    "tensors": Entry.from_json,
    "gates": GateEntry.from_json,
    "readings": ReadingEntry.from_json,
    "demands": DemandEntry.from_json,
    "unrecorded": Unrecorded.from_json,
}


def _listed(cls: Any, plain: object, what: str, *lists: str) -> dict[str, Any]:
    """Return a JSON object with a dataclass's fields, and tuples for some lists in it."""
    found = fields(plain, tuple(cls.__dataclass_fields__), what)
    return found | {name: as_tuple(found[name], name) for name in lists}


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return copied(dict(value)) if isinstance(value, Mapping) else value
