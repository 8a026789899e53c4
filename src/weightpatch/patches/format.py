"""The bytes of a patch file: one canonical safetensors file, in which any changed bit is noticed; needs no torch.

    u64 length of the header | header (JSON, padded with spaces to 8 bytes) | the tensors, without holes

The header is what safetensors expects, with one metadata key that holds the manifest as canonical JSON. The manifest's
`id` is the SHA-256 of the whole file with the id written as 64 zeros. The rules are in docs/patch-format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from ..errors import InvalidInput, PatchDamaged
from . import files
from .arrays import SIZES, Array, by_entry, check_arrays, refuse
from .manifest import LIMIT, NAME_LIMIT, Manifest

KEY = "weightpatch-patch"
HEADER_LIMIT = 2**20

_NAME = re.compile(r"[0-9]{4}\.[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_BLANK = "0" * 64
_DIGITS = 19  # those of the largest whole number that may be


@dataclass(frozen=True)
class Content:
    """All that a patch file holds; `arrays` maps names such as "0007.left" to bytes."""

    manifest: Manifest
    arrays: Mapping[str, Array]
    id: str = ""


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
            "Edit fewer tensors (about 2,000 fit), put less text into the manifest, or put demands together into one"
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
    check_arrays(manifest, arrays)
    found, (head, *_) = encode(content)
    if found != identity:
        refuse("its content is not what was saved (the SHA-256 differs)")
    if head != view[:start]:
        refuse("its header is not written in the canonical way")
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
    """A checked patch file's manifest as plain values, with its id and what each of its entries takes.

    Every entry of `tensors`, `gates`, `readings` and `demands` says its `bytes` and the shapes of its `parts`.
    """
    content = read(path)
    plain = content.manifest.to_json() | {"id": content.id, "bytes": os.stat(path).st_size}
    entries = [entry for name in ("tensors", "gates", "readings", "demands") for entry in plain[name]]
    for entry, arrays in zip(entries, by_entry(content.manifest, content.arrays), strict=True):
        entry["bytes"] = sum(len(array.data) for array in arrays.values())
        entry["parts"] = {part: list(array.shape) for part, array in arrays.items()}
    return plain


def header(metadata: Mapping[str, str], tensors: Sequence[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Length and header of a safetensors file; `tensors` are (name, code, shape, bytes) in the order of the data."""
    plain: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, code, shape, size in tensors:
        plain[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end := end + size]}
    text = json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_end(start: bytes | bytearray | memoryview, size: int) -> int:
    length = int.from_bytes(start, "little")
    if size < 8 or length > HEADER_LIMIT or 8 + length > size or length % 8:
        refuse(f"it does not start like one (a header of at most {HEADER_LIMIT} bytes)")
    return 8 + length


def _json(data: memoryview, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            refuse(f"{what} names a key twice")
        return found

    def constant(text: str) -> NoReturn:
        refuse(f"{what} holds {text}")

    def integer(text: str) -> int:
        if len(text) > _DIGITS + 1:  # and a sign
            refuse(f"{what} holds a whole number of {len(text)} digits")
        return int(text)

    try:
        text = bytes(data).decode("ascii")
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_int=integer)
    except PatchDamaged:
        raise
    except (ValueError, RecursionError):
        refuse(f"{what} is not JSON")


def _outline(plain: object, size: int) -> tuple[Manifest, str, dict[str, tuple[str, tuple[int, ...], int]]]:
    """(manifest, id, {name: (code, shape, bytes)}) of a header, its sizes checked before anything is allocated."""
    if not isinstance(plain, dict) or len(plain) > LIMIT + 1:
        refuse(f"the header is not a list of at most {LIMIT} tensors")
    metadata = plain.pop("__metadata__", None)
    if not isinstance(metadata, dict) or list(metadata) != [KEY] or not isinstance(metadata[KEY], str):
        refuse(f"it has other metadata than the one key {KEY!r}")
    manifest = _json(memoryview(metadata[KEY].encode("utf-8", "surrogatepass")), "the manifest")
    identity = manifest.pop("id", None) if isinstance(manifest, dict) else None
    shapes = {name: _shape(name, info) for name, info in plain.items()}
    end = 0
    for name in _in_file_order(shapes):
        begin, end = end, end + shapes[name][2]
        if [type(x) for x in plain[name]["data_offsets"]] != [int, int] or plain[name]["data_offsets"] != [begin, end]:
            refuse(f"tensor {name} does not lie where it should")
    if end != size:
        refuse(f"it should hold {end} bytes of tensors, and holds {size}")
    return Manifest.from_json(manifest), str(identity), shapes


def _shape(name: str, info: object) -> tuple[str, tuple[int, ...], int]:
    fine = len(name) <= 5 + NAME_LIMIT and _NAME.fullmatch(name) is not None
    if not fine or not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        refuse(f"its header holds something else than tensors: {name[:80]!r}")
    code, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(code, str) or code not in SIZES:
        refuse(f"tensor {name} has the type {code!r}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape) or len(shape) > 16:
        refuse(f"tensor {name} has an impossible shape")
    if prod(max(n, 1) for n in shape) >= 2**59:  # also where there is a 0: strides have to be numbers of 64 bits
        refuse(f"tensor {name} has an impossible shape")
    if not isinstance(offsets, list):
        refuse(f"tensor {name} has no place")
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
