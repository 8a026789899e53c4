"""What a patch says about itself: the manifest, checked field by field; needs no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any

from ..errors import InvalidInput, PatchDamaged

FORMAT = "weightpatch-patch/1"
LIMIT = 10_000  # tensors in a patch, and patches that one may require
GATE = ("keys", "radii", "values")  # the parts of a gate
DEMAND = ("inputs", "wanted")  # the parts of a demand
KINDS = {"Classified": "margin", "Within": "tolerance"}  # of demands, and what their limit is called
PARTS = {"full": ("values",), "lowrank": ("left", "right"), "rows": ("index", "values"), "sparse": ("index", "values")}
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}

Scalar = str | int | float | bool

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST = 2**63 - 1


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
        _check(isinstance(self.also, tuple) and len(self.also) <= LIMIT, "also", self.also, "a tuple of names")
        for name in self.names:
            check_name(name)
        _check(_rising(self.also), "also", self.also, "each name once, in rising order")
        _check(isinstance(self.kind, str) and self.kind in PARTS, "kind", self.kind, f"one of {', '.join(PARTS)}")
        _check(isinstance(self.dtype, str) and self.dtype in CODES, "dtype", self.dtype, f"one of {', '.join(CODES)}")
        _check(isinstance(self.shape, tuple) and len(self.shape) <= 16, "shape", self.shape, "a tuple of <= 16 sizes")
        for size in self.shape:
            _check(type(size) is int and 0 < size <= _LARGEST, "shape", self.shape, "positive integers")
        _check_digest("pre", self.pre)
        _check_digest("post", self.post)

    def to_json(self) -> dict[str, Any]:
        """The entry as plain lists and scalars."""
        plain = {name: getattr(self, name) for name in _ENTRY}
        return plain | {"shape": list(self.shape), "also": list(self.also)}

    @classmethod
    def from_json(cls, plain: object) -> "Entry":
        """The entry of `to_json`; raises `InvalidInput` for anything else."""
        fields = _fields(plain, _ENTRY, "a tensor's entry")
        return cls(**fields | {name: _tuple(fields[name], name) for name in ("shape", "also")})


@dataclass(frozen=True)
class Manifest:
    """Which base a patch changes, after which others, made how, what it does to each tensor, and what it gates."""

    base: str
    requires: tuple[str, ...] = ()
    editor: str = ""
    constraint: str = ""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    metrics: Mapping[str, Scalar] = field(default_factory=dict)
    versions: Mapping[str, Scalar] = field(default_factory=dict)
    tensors: tuple[Entry, ...] = ()
    format: str = FORMAT
    gates: tuple[str, ...] = ()
    demands: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        _check(self.format == FORMAT, "format", self.format, f"{FORMAT}; a newer weightpatch may read it")
        _check_digest("base", self.base)
        _check(isinstance(self.requires, tuple) and len(self.requires) <= LIMIT, "requires", self.requires, "a tuple")
        for required in self.requires:
            _check_digest("requires", required)
        _check(_rising(self.requires), "requires", self.requires, "each id once, in rising order")
        for name in ("editor", "constraint"):
            _check_text(name, getattr(self, name))
        for name in ("settings", "metrics", "versions"):
            _check_scalars(name, getattr(self, name))
        _check(isinstance(self.tensors, tuple) and len(self.tensors) <= LIMIT, "tensors", "...", f"at most {LIMIT}")
        names = [entry.name for entry in self.tensors]
        _check(_rising(names), "tensors", names, "each name once, in rising order")
        every = [name for entry in self.tensors for name in entry.names]
        _check(len(set(every)) == len(every), "tensors", every, "no name under two tensors")
        most = LIMIT - len(self.tensors)
        _check(isinstance(self.gates, tuple) and len(self.gates) <= most, "gates", "...", f"at most {most}")
        for name in self.gates:
            check_name(name, "module name")
        _check(_rising(self.gates), "gates", self.gates, "each module once, in rising order")
        most -= len(self.gates)
        _check(isinstance(self.demands, tuple) and len(self.demands) <= most, "demands", "...", f"at most {most}")
        for demand in self.demands:
            pair = isinstance(demand, tuple) and len(demand) == 2 and demand[0] in KINDS
            fine = pair and isinstance(demand[1], (int, float)) and 0 <= demand[1] < float("inf")
            _check(fine, "a demand", demand, f"one of {', '.join(KINDS)}, and its {' or '.join(KINDS.values())}")

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain dicts, lists and scalars."""
        plain = {name: getattr(self, name) for name in _MANIFEST}
        plain |= {name: dict(plain[name]) for name in ("settings", "metrics", "versions")}
        plain |= {"requires": list(self.requires), "tensors": [entry.to_json() for entry in self.tensors]}
        more = {"gates": list(plain.pop("gates")), "demands": [list(demand) for demand in plain.pop("demands")]}
        return plain | {name: value for name, value in more.items() if value}  # without them as before there were any

    @classmethod
    def from_json(cls, plain: object) -> "Manifest":
        """The manifest of `to_json`; anything else is `PatchDamaged`."""
        try:
            wanted = [name for name in _MANIFEST if name not in _MORE or (isinstance(plain, dict) and name in plain)]
            fields = _fields(plain, wanted, "the manifest")
            fields |= {name: _tuple(fields[name], name) for name in ("requires", *_MORE) if name in fields}
            if "demands" in fields:
                fields["demands"] = tuple(_tuple(item, "a demand") for item in fields["demands"])
            fields["tensors"] = tuple(Entry.from_json(item) for item in _tuple(fields["tensors"], "tensors"))
            return cls(**fields)
        except InvalidInput as error:
            raise PatchDamaged(f"not a patch: {error}") from None


_MANIFEST = tuple(Manifest.__dataclass_fields__)
_MORE = ("gates", "demands")  # what the manifest has only where there are some
_ENTRY = tuple(Entry.__dataclass_fields__)


def check_name(name: object, what: str = "tensor name") -> None:
    """Refuse (`InvalidInput`) what no parameter or module is called: path-like, unprintable or very long names."""
    fine = isinstance(name, str) and 0 < len(name) <= 256 and name.isprintable() and not re.search(r"[/\\]", name)
    wanted = "1 to 256 printable characters, dots between non-empty parts, no slash"
    _check(fine and all(str(name).split(".")), what, name, wanted)


def _check(fine: bool, what: str, given: object, wanted: str) -> None:
    if not fine:
        raise InvalidInput(f"{what} is {repr(given)[:300]}; expected {wanted}")


def _check_digest(what: str, value: object) -> None:
    fine = isinstance(value, str) and _DIGEST.fullmatch(value) is not None
    _check(fine, what, value, "a SHA-256 as 64 lower-case hex digits")


def _check_text(what: str, value: object) -> None:
    # Control characters could drive the terminal that shows them
    fine = isinstance(value, str) and all(c.isprintable() or c in "\n\t" for c in value)
    _check(fine, what, value, "printable text")


def _check_scalars(what: str, values: object) -> None:
    _check(isinstance(values, Mapping), what, values, "a mapping of names to numbers or text")
    assert isinstance(values, Mapping)
    for key, value in values.items():
        _check_text(f"a name in {what}", key)
        if isinstance(value, str):
            _check_text(f"{what}[{key!r}]", value)
        else:
            number = abs(value) <= _LARGEST if isinstance(value, int) else isinstance(value, float) and isfinite(value)
            _check(number, f"{what}[{key!r}]", value, "a finite number or text")


def _rising(values: list[str] | tuple[str, ...]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _fields(plain: object, names: Sequence[str], what: str) -> dict[str, Any]:
    if not isinstance(plain, dict) or set(plain) != set(names):
        found = sorted(map(str, plain)) if isinstance(plain, dict) else plain
        raise InvalidInput(f"{what} has the fields {found!r}"[:300] + f"; expected {sorted(names)}")
    return dict(plain)


def _tuple(values: object, what: str) -> tuple[Any, ...]:
    _check(isinstance(values, list), what, values, "a list")
    assert isinstance(values, list)
    return tuple(values)
