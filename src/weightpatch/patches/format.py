"""The bytes of a patch file: one canonical safetensors file, in which any changed bit is noticed; needs no torch.

    u64 length of the header | header (JSON, padded with spaces to 8 bytes) | the tensors, without holes

The header is what safetensors expects, with one metadata key that holds the manifest as canonical JSON. The manifest's
`id` is the SHA-256 of the whole file with the id written as 64 zeros. The rules are in docs/patch-format.md.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput, PatchDamaged
from . import files
from .manifest import CODES, DEMAND, GATE, KINDS, LIMIT, PARTS, Entry, Manifest

KEY = "weightpatch-patch"
HEADER_LIMIT = 2**20
SIZES = {"U8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}

_INDEX = {"U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
_EXPONENT = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
_NAME = re.compile(r"[0-9]{4}\.(left|right|index|values|keys|radii|inputs|wanted)")
_BLANK = "0" * 64
_CHUNK = 2**20


@dataclass(frozen=True)
class Array:
    """The bytes of one tensor: little-endian, C order, with their safetensors type code."""

    code: str
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True)
class Content:
    """All that a patch file holds; `arrays` maps names such as "0007.left" to bytes."""

    manifest: Manifest
    arrays: Mapping[str, Array]
    id: str = ""


def index_code(largest: int) -> str:
    """The smallest type code that holds every index up to `largest`."""
    return next(code for code, top in (("U8", 2**8), ("I16", 2**15), ("I32", 2**31), ("I64", 2**63)) if largest < top)


def encode(content: Content) -> tuple[str, list[memoryview | bytes]]:
    """(id, the file's bytes in chunks) of a manifest and its arrays; a given `content.id` is not looked at."""
    names = _in_file_order(content.arrays)
    digest = hashlib.sha256(_prefix(content, names, _BLANK))
    for name in names:
        digest.update(content.arrays[name].data)
    identity = digest.hexdigest()
    head = _prefix(content, names, identity)
    if len(head) - 8 > HEADER_LIMIT:
        raise InvalidInput(
            f"the patch's header has {len(head) - 8} bytes; at most {HEADER_LIMIT} are allowed. "
            "Edit fewer tensors (about 2,000 fit), or put less text into the manifest"
        )
    return identity, [head, *(content.arrays[name].data for name in names)]


def parse(data: bytes | bytearray | memoryview) -> Content:
    """The content of a patch file's bytes; whatever `encode` would not have written is `PatchDamaged`."""
    view = memoryview(data).cast("B")
    start = _header_end(view[:8], len(view))
    header = _json(view[8:start], "the header")
    manifest, identity, shapes = _outline(header, len(view) - start)
    arrays, offset = {}, start
    for name in _in_file_order(shapes):
        code, shape, _ = shapes[name]
        arrays[name] = Array(code, shape, view[offset : (offset := offset + SIZES[code] * prod(shape))])
    content = Content(manifest, arrays, identity)
    for number, entry in enumerate(manifest.tensors):
        check_operation(entry, {part: arrays.get(f"{number:04}.{part}") for part in PARTS[entry.kind]})
    for number, name in enumerate(manifest.gates, len(manifest.tensors)):
        check_gate(name, [arrays.get(f"{number:04}.{part}") for part in GATE])
    for number, (kind, _) in enumerate(manifest.demands, len(manifest.tensors) + len(manifest.gates)):
        check_demand(kind, [arrays.get(f"{number:04}.{part}") for part in DEMAND])
    more = len(GATE) * len(manifest.gates) + len(DEMAND) * len(manifest.demands)
    if len(arrays) != sum(len(PARTS[entry.kind]) for entry in manifest.tensors) + more:
        _refuse("there are tensors that nothing uses")
    found, (head, *_) = encode(content)
    if found != identity:
        _refuse("its content is not what was saved (the SHA-256 differs)")
    if head != view[:start]:
        _refuse("its header is not written in the canonical way")
    return content


def read(path: str | os.PathLike[str]) -> Content:
    """The content of a patch file; raises `PatchDamaged`, or `PatchError` where the file cannot be read."""
    with files.reading(path) as (descriptor, size):
        data = files.read(descriptor, min(size, 8))
        try:
            # A file of another kind is refused here, before its gigabytes are read
            _header_end(data, size)
            data += files.read(descriptor, size - len(data) + 1)
            return parse(data)
        except PatchDamaged as error:
            raise PatchDamaged(f"{os.fspath(path)}: {error}") from None


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checked patch file's manifest as plain values, with its id and what each operation and gate takes."""
    content = read(path)
    plain = content.manifest.to_json() | {"id": content.id}
    for number, entry in enumerate(content.manifest.tensors):
        parts = [content.arrays[f"{number:04}.{part}"] for part in PARTS[entry.kind]]
        plain["tensors"][number] |= {
            "bytes": sum(len(part.data) for part in parts),
            "parts": {part: list(array.shape) for part, array in zip(PARTS[entry.kind], parts, strict=True)},
        }
    for number, name in enumerate(content.manifest.gates, len(content.manifest.tensors)):
        keys, radii, values = (content.arrays[f"{number:04}.{part}"] for part in GATE)
        plain["gates"][number - len(content.manifest.tensors)] = {
            "name": name,
            "keys": keys.shape[0],
            "width": keys.shape[1],
            "out": values.shape[1],
            "bytes": sum(len(part.data) for part in (keys, radii, values)),
        }
    for place, (kind, limit) in enumerate(content.manifest.demands):
        number = place + len(content.manifest.tensors) + len(content.manifest.gates)
        inputs, wanted = (content.arrays[f"{number:04}.{part}"] for part in DEMAND)
        size = len(inputs.data) + len(wanted.data)
        plain["demands"][place] = {"kind": kind, KINDS[kind]: limit, "items": inputs.shape[0], "bytes": size}
    return plain | {"bytes": os.stat(path).st_size}


def header(metadata: Mapping[str, str], tensors: Sequence[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Length and header of a safetensors file; `tensors` are (name, code, shape, bytes) in the order of the data."""
    plain: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, code, shape, size in tensors:
        plain[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end := end + size]}
    text = json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_operation(entry: Entry, parts: Mapping[str, Array | None]) -> None:
    """Refuse (`PatchDamaged`) parts that are missing, ill-shaped, not finite, out of range or not in rising order."""
    arrays = {part: array for part, array in parts.items() if array is not None}
    where = f"tensor {entry.name!r}"
    if set(arrays) != set(PARTS[entry.kind]):
        _refuse(f"{where} lacks a part of its {entry.kind} operation")
    wanted = _wanted(entry, arrays)
    for part, array in arrays.items():
        if (array.code, array.shape) != wanted[part]:
            _refuse(f"{where} has {array.code} {array.shape} for its {part}; expected {wanted[part]}")
        if array.code in _EXPONENT:
            _check_finite(array, f"{where}, {part},")
    if "index" in arrays:
        limit = entry.shape[0] if entry.kind == "rows" else prod(entry.shape)
        index = np.frombuffer(arrays["index"].data, dtype=_INDEX[arrays["index"].code])
        if index[0] < 0 or index[-1] >= limit or not np.all(index[1:] > index[:-1]):
            _refuse(f"{where} has an index that is out of range or not in rising order")


def check_gate(name: str, parts: Sequence[Array | None]) -> None:
    """Refuse (`PatchDamaged`) keys, radii and values that are missing, ill-shaped or not finite, and negative radii."""
    where = f"gate {name!r}"
    arrays = [array for array in parts if array is not None and array.code in _EXPONENT]
    shapes = [array.shape for array in arrays]
    if (
        [len(shape) for shape in shapes] != [2, 1, 2]
        or len({shape[0] for shape in shapes}) != 1
        or 0 in sum(shapes, ())
    ):
        _refuse(f"{where} has parts of the shapes {shapes}; expected keys (m, width), radii (m,), values (m, out)")
    for part, array in zip(GATE, arrays, strict=True):
        _check_finite(array, f"{where}, {part},")
    bits = np.frombuffer(arrays[1].data, dtype=_EXPONENT[arrays[1].code][0])
    if np.any(bits > 1 << (8 * bits.itemsize - 1)):  # the sign, and then more than a zero
        _refuse(f"{where} has a negative radius")


def check_demand(kind: str, parts: Sequence[Array | None]) -> None:
    """Refuse (`PatchDamaged`) inputs and what is wanted of them that are missing, ill-shaped or not finite."""
    arrays = [array for array in parts if array is not None]
    shapes, floats = [array.shape for array in arrays], [array.code in _EXPONENT for array in arrays]
    fine = len(arrays) == len(DEMAND) and all(shape and shape[0] > 0 for shape in shapes)
    if not fine or shapes[0][0] != shapes[1][0] or floats[1] == (kind == "Classified"):
        _refuse(
            f"a demand of kind {kind} has parts of the shapes {shapes}; expected inputs (n, ...) and wanted (n, ...)"
        )
    if kind == "Classified" and (
        len(shapes[1]) != 1 or np.frombuffer(arrays[1].data, _INDEX[arrays[1].code]).min() < 0
    ):
        _refuse("a demand of kind Classified wants no classes; expected n numbers of at least 0")
    for part, array in zip(DEMAND, arrays, strict=True):
        if array.code in _EXPONENT:
            _check_finite(array, f"a demand's {part}")


def _wanted(entry: Entry, arrays: Mapping[str, Array]) -> dict[str, tuple[str, tuple[int, ...]]]:
    own = CODES[entry.dtype]
    if entry.kind == "full":
        return {"values": (own, entry.shape)}
    if not entry.shape and entry.kind != "sparse":
        _refuse(f"tensor {entry.name!r} is a single number, which has no {entry.kind}")
    first = next(iter(arrays[PARTS[entry.kind][0]].shape[::-1]), 0)  # the rank, or how many rows or numbers change
    if first < 1:
        _refuse(f"tensor {entry.name!r} has an empty operation")
    if entry.kind == "lowrank":
        finer = own == "F32" and arrays["left"].code == "F64"
        factor = "F64" if own == "F64" or finer else "F32"
        return {"left": (factor, (entry.shape[0], first)), "right": (factor, (first, prod(entry.shape[1:])))}
    limit, rest = (entry.shape[0], entry.shape[1:]) if entry.kind == "rows" else (prod(entry.shape), ())
    return {"index": (index_code(min(limit, 2**63) - 1), (first,)), "values": (own, (first, *rest))}


def _check_finite(array: Array, what: str) -> None:
    kind, mask = _EXPONENT[array.code]
    bits = np.frombuffer(array.data, dtype=kind)
    for start in range(0, len(bits), _CHUNK):
        exponents: npt.NDArray[Any] = bits[start : start + _CHUNK] & bits.dtype.type(mask)
        if np.any(exponents == mask):
            _refuse(f"{what} holds NaN or infinity")


def _header_end(start: bytes | bytearray | memoryview, size: int) -> int:
    length = int.from_bytes(start, "little")
    if size < 8 or length > HEADER_LIMIT or 8 + length > size or length % 8:
        _refuse(f"it does not start like one (a header of at most {HEADER_LIMIT} bytes)")
    return 8 + length


def _json(data: memoryview, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            _refuse(f"{what} names a key twice")
        return found

    def constant(text: str) -> NoReturn:
        _refuse(f"{what} holds {text}")

    try:
        return json.loads(bytes(data).decode("ascii"), object_pairs_hook=unique, parse_constant=constant)
    except PatchDamaged:
        raise
    except (ValueError, RecursionError):
        _refuse(f"{what} is not JSON")


def _outline(plain: object, size: int) -> tuple[Manifest, str, dict[str, tuple[str, tuple[int, ...], int]]]:
    """(manifest, id, {name: (code, shape, bytes)}) of a header, its sizes checked before anything is allocated."""
    if not isinstance(plain, dict) or len(plain) > LIMIT + 1:
        _refuse(f"the header is not a list of at most {LIMIT} tensors")
    metadata = plain.pop("__metadata__", None)
    if not isinstance(metadata, dict) or list(metadata) != [KEY] or not isinstance(metadata[KEY], str):
        _refuse(f"it has other metadata than the one key {KEY!r}")
    manifest = _json(memoryview(metadata[KEY].encode("utf-8", "surrogatepass")), "the manifest")
    identity = manifest.pop("id", None) if isinstance(manifest, dict) else None
    shapes = {name: _shape(name, info) for name, info in plain.items()}
    end = 0
    for name in _in_file_order(shapes):
        begin, end = end, end + shapes[name][2]
        if [type(x) for x in plain[name]["data_offsets"]] != [int, int] or plain[name]["data_offsets"] != [begin, end]:
            _refuse(f"tensor {name} does not lie where it should")
    if end != size:
        _refuse(f"it should hold {end} bytes of tensors, and holds {size}")
    return Manifest.from_json(manifest), str(identity), shapes


def _shape(name: str, info: object) -> tuple[str, tuple[int, ...], int]:
    if not _NAME.fullmatch(name) or not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"its header holds something else than tensors: {name[:80]!r}")
    code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(code, str) or code not in SIZES:
        _refuse(f"tensor {name} has the type {code!r}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape) or len(shape) > 16:
        _refuse(f"tensor {name} has an impossible shape")
    if not isinstance(offsets, list):
        _refuse(f"tensor {name} has no place")
    return code, tuple(shape), SIZES[code] * prod(shape)


def _in_file_order(tensors: Mapping[str, Array] | Mapping[str, tuple[str, tuple[int, ...], int]]) -> list[str]:
    def code(name: str) -> str:
        found = tensors[name]
        return found.code if isinstance(found, Array) else found[0]

    return sorted(tensors, key=lambda name: (-SIZES[code(name)], name))  # wide types first: all stay aligned


def _prefix(content: Content, names: Sequence[str], identity: str) -> bytes:
    plain = content.manifest.to_json() | {"id": identity}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    arrays = [(name, content.arrays[name]) for name in names]
    return header({KEY: text}, [(name, a.code, a.shape, len(a.data)) for name, a in arrays])


def _refuse(why: str) -> NoReturn:
    raise PatchDamaged(f"not an intact patch: {why}. Get the file again from where it was made.")
