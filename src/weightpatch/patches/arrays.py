"""The arrays of a patch file, checked against what the manifest says of them; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import PatchDamaged
from .manifest import CODES, DemandEntry, Entry, GateEntry, Manifest, ReadingEntry

SIZES = {"BOOL": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}

_INDEX = {"U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_EXPONENT = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
_CHUNK = 2**20


@dataclass(frozen=True)
class Array:
    """The bytes of one tensor: little-endian, C order, with their safetensors type code."""

    code: str
    shape: tuple[int, ...]
    data: memoryview


Arrays = Mapping[str, Array]


def index_code(largest: int) -> str:
    """The smallest type code that holds every index up to `largest`."""
    return next(code for code, top in (("U8", 2**8), ("I16", 2**15), ("I32", 2**31), ("I64", 2**63)) if largest < top)


def by_entry(manifest: Manifest, arrays: Arrays) -> list[dict[str, Array]]:
    """The arrays of each of the manifest's entries, by part; raises `PatchDamaged` where there are others, or fewer."""
    expected = manifest.arrays
    if unknown := sorted(arrays.keys() - expected.keys()):
        refuse(f"there are tensors that nothing uses: {', '.join(unknown[:8])}")
    if missing := sorted(expected.keys() - arrays.keys()):
        refuse(f"a part is missing: {', '.join(missing[:8])}")
    found: list[dict[str, Array]] = [{} for _ in manifest.entries]
    for name, (number, part) in expected.items():
        found[number][part] = arrays[name]
    return found


def check_arrays(manifest: Manifest, arrays: Arrays) -> None:
    """Refuse (`PatchDamaged`) arrays that are not as the manifest's entries want them."""
    parts = by_entry(manifest, arrays)
    first = len(manifest.tensors) + len(manifest.gates)
    readings = parts[first : first + len(manifest.readings)]
    for entry, own in zip(manifest.entries, parts, strict=True):
        if isinstance(entry, Entry):
            check_operation(entry, own)
        elif isinstance(entry, GateEntry):
            check_gate(entry, own, [readings[number] for number in entry.readings])
        elif isinstance(entry, ReadingEntry):
            check_reading(entry, own)
        else:
            check_demand(entry, own)
    marks = [mark(entry, own) for entry, own in zip(manifest.readings, readings, strict=True)]
    if len(set(marks)) != len(marks):
        refuse("it holds a reading twice")


def mark(entry: ReadingEntry, parts: Arrays) -> bytes:
    """What tells one reading from another."""
    facts = [entry.layer, entry.pooling, entry.grid, entry.distance]
    facts += [(part, array.code, array.shape) for part, array in sorted(parts.items())]
    found = sha256(json.dumps(facts).encode())
    for _, array in sorted(parts.items()):
        found.update(array.data)
    return found.digest()


def check_operation(entry: Entry, arrays: Arrays) -> None:
    """Refuse (`PatchDamaged`) parts that are ill-shaped, not finite, out of range or not in rising order."""
    where = f"tensor {entry.name!r}"
    wanted = _wanted(entry, arrays)
    for part, array in arrays.items():
        if (array.code, array.shape) != wanted[part]:
            refuse(f"{where} has {array.code} {array.shape} for its {part}; expected {wanted[part]}")
        _check_finite(array, f"{where}, {part},")
    if "index" in arrays:
        limit = entry.shape[0] if entry.kind == "rows" else prod(entry.shape)
        index = np.frombuffer(arrays["index"].data, dtype=_INDEX[arrays["index"].code])
        if index[0] < 0 or index[-1] >= limit or not np.all(index[1:] > index[:-1]):
            refuse(f"{where} has an index that is out of range or not in rising order")


def check_gate(entry: GateEntry, arrays: Arrays, readings: list[dict[str, Array]]) -> None:
    """Refuse (`PatchDamaged`) keys, radii and values that are ill-shaped or not finite, and negative radii."""
    where, values = f"gate {entry.layer!r}", arrays["values"]
    for part, array in arrays.items():
        _check_floats(array, f"{where}, {part},")
    for number, reading in enumerate(readings):
        keys, radii = (arrays[f"{part}.{number}" if number else part] for part in ("keys", "radii"))
        shapes = [array.shape for array in (keys, radii, values)]
        if (
            [len(shape) for shape in shapes] != [2, 1, 2]
            or len({shape[0] for shape in shapes}) != 1
            or 0 in sum(shapes, ())
        ):
            refuse(f"{where} has parts of the shapes {shapes}; expected keys (m, k), radii (m,), values (m, out)")
        if _width(reading) not in (None, keys.shape[1]):
            refuse(f"{where} has keys of {keys.shape[1]} numbers; its metric gives {_width(reading)}")
        bits = np.frombuffer(radii.data, dtype=_EXPONENT[radii.code][0])
        if np.any(bits > 1 << (8 * bits.itemsize - 1)):  # the sign, and then more than a zero
            refuse(f"{where} has a negative radius")


def check_reading(entry: ReadingEntry, arrays: Arrays) -> None:
    """Refuse (`PatchDamaged`) a metric or centre that is ill-shaped or not finite."""
    where = f"the reading of {entry.layer!r}"
    for part, array in arrays.items():
        _check_floats(array, f"{where}, {part},")
        if len(array.shape) != 1 + (part == "metric") or 0 in array.shape:
            refuse(f"{where} has {array.shape} for its {part}; expected metric (k, width) and centre (width,)")
    if len({array.shape[-1] for array in arrays.values()}) > 1:
        refuse(f"{where} has a metric and a centre of other widths")


def check_demand(entry: DemandEntry, arrays: Arrays) -> None:
    """Refuse (`PatchDamaged`) numbers that are not finite, and truths that are neither 0 nor 1."""
    for part, array in arrays.items():
        where = f"a demand of kind {entry.kind}, {part},"
        _check_finite(array, where)
        if array.code == "BOOL" and np.any(np.frombuffer(array.data, np.uint8) > 1):
            refuse(f"{where} holds something else than true and false")


def _width(reading: Arrays) -> int | None:
    shapes = (reading[part].shape for part in ("metric", "centre") if part in reading)
    return next((shape[0] for shape in shapes if shape), None)


def _wanted(entry: Entry, arrays: Arrays) -> dict[str, tuple[str, tuple[int, ...]]]:
    own = CODES[entry.dtype]
    if entry.kind == "full":
        return {"values": (own, entry.shape)}
    if not entry.shape and entry.kind != "sparse":
        refuse(f"tensor {entry.name!r} is a single number, which has no {entry.kind}")
    first = next(iter(arrays[entry.parts[0]].shape[::-1]), 0)  # the rank, or how many rows or numbers change
    if first < 1:
        refuse(f"tensor {entry.name!r} has an empty operation")
    if entry.kind == "lowrank":
        finer = own == "F32" and arrays["left"].code == "F64"
        factor = "F64" if own == "F64" or finer else "F32"
        return {"left": (factor, (entry.shape[0], first)), "right": (factor, (first, prod(entry.shape[1:])))}
    limit, rest = (entry.shape[0], entry.shape[1:]) if entry.kind == "rows" else (prod(entry.shape), ())
    return {"index": (index_code(min(limit, 2**63) - 1), (first,)), "values": (own, (first, *rest))}


def _check_floats(array: Array, what: str) -> None:
    if array.code not in _EXPONENT:
        refuse(f"{what} is of the type {array.code}; expected floating-point numbers")
    _check_finite(array, what)


def _check_finite(array: Array, what: str) -> None:
    if array.code not in _EXPONENT:
        return
    kind, exponent = _EXPONENT[array.code]
    bits = np.frombuffer(array.data, dtype=kind)
    for start in range(0, len(bits), _CHUNK):
        exponents: npt.NDArray[Any] = bits[start : start + _CHUNK] & bits.dtype.type(exponent)
        if np.any(exponents == exponent):
            refuse(f"{what} holds NaN or infinity")


def refuse(why: str) -> NoReturn:
    """Raise `PatchDamaged`."""
    raise PatchDamaged(f"not an intact patch: {why}. Get the file again from where it was made.")
