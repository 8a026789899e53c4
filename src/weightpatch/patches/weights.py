"""Files of weights with patches on: effective weights that any tool can load, and what it takes to go back.

    model.safetensors            the effective weights; one metadata key names the base and the patches
    model.safetensors.patched/   the patch files, and the base's values of the touched tensors

The folder's files are named by their SHA-256 and written first, so renaming the weights file is the one commit point.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from ..errors import BaseMismatch, InvalidInput, NotEditable, PatchDamaged, PatchError
from . import files
from .format import header
from .hashing import as_bytes, combined, digests, named_tensors, tied
from .patch import Patch
from .stack import State, check_gateless, compose, with_layer, without_layer

FORMAT = "weightpatch-weights/1"
KEY = "weightpatch"

_CODES = {
    **{torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16"},
    **{torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64"},
}
_OURS = re.compile(r"[0-9a-f]{64}\.(patch|originals)\.safetensors")


@dataclass(frozen=True, eq=False, repr=False)
class Weights:
    """Named tensors and the patches on them: a value; `apply` and `revert` give new ones."""

    tensors: Mapping[str, Tensor]
    state: State | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches that are on, in canonical order."""
        return tuple(p for p in self.state.layers if isinstance(p, Patch)) if self.state else ()

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the weights as they were before any patch."""
        return combined(self.state.root if self.state else digests(named_tensors(self.tensors)))

    def apply(self, patch: Patch) -> "Weights":
        """These weights with one more patch; raises as `Patch.apply` does, and `NotEditable` for one with gates."""
        check_gateless(patch)
        return self._with(*with_layer(named_tensors(self.tensors), self.state, patch))

    def revert(self, patch: Patch) -> "Weights":
        """These weights without a patch; raises as `Patch.revert` does."""
        return self._with(*without_layer(named_tensors(self.tensors), self.state, patch))

    def _with(self, state: State, values: Mapping[str, Tensor]) -> "Weights":
        first = tied(named_tensors(self.tensors))
        tensors = {name: values.get(first[name], tensor) for name, tensor in self.tensors.items()}
        return Weights(tensors, state if state.layers else None, self.metadata)

    def __repr__(self) -> str:
        return f"<Weights: {len(self.tensors)} tensors, {len(self.patches)} patches>"


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """The weights of a safetensors file, or of a state dict that torch saved (read with weights_only).

    Raises `PatchError` for unreadable files, `PatchDamaged` and `BaseMismatch` where a file with patches, or the folder
    beside it, is not as it was saved.
    """
    path = Path(path)
    try:
        tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_torch(path), {})
    except Exception as error:  # each reader has its own kinds
        raise PatchError(f"cannot read the weights in {path}: {error}") from error
    record = metadata.pop(KEY, None)
    return Weights(tensors, None, metadata) if record is None else _restored(path, tensors, metadata, record)


def save_weights(path: str | os.PathLike[str], weights: Weights) -> None:
    """Write weights to a safetensors file, and beside it what reverting their patches needs; raises `PatchError`.

    A file without patches is as safetensors would write it. The old file stays whole until the new one is.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidInput(f"weights are saved as safetensors; got {path.name!r}, expected NAME.safetensors")
    folder, kept = _folder(path), set()
    metadata = dict(weights.metadata)
    ties = {name: first for name, first in tied(named_tensors(weights.tensors)).items() if name != first}
    if weights.state:
        originals = b"".join(_chunks(weights.state.originals, {}))
        sha = hashlib.sha256(originals).hexdigest()
        contents = {f"{patch.id}.patch.safetensors": patch.to_bytes() for patch in weights.patches}
        contents[f"{sha}.originals.safetensors"] = originals
        _fill(folder, contents)
        kept = set(contents)
        record = {
            "format": FORMAT,
            "base": weights.fingerprint,
            "patches": [patch.id for patch in weights.patches],
            "originals": sha,
            "tied": ties,
        }
        metadata[KEY] = json.dumps(record, sort_keys=True, separators=(",", ":"))
    files.write(path, _chunks(weights.tensors, metadata))
    _sweep(folder, kept)


def _restored(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], record: str) -> Weights:
    found = _record(path, record)
    folder = _folder(path)
    patches = tuple(Patch.load(folder / f"{key}.patch.safetensors") for key in found["patches"])
    if [patch.id for patch in patches] != found["patches"]:
        raise PatchDamaged(f"a patch in {folder} is another one than its name says; restore the folder")
    originals = _originals(folder / f"{found['originals']}.originals.safetensors", found["originals"])
    for name, first in found["tied"].items():
        if name in tensors and first in tensors:
            tensors[name] = tensors[first]
    first = tied(named_tensors(tensors))
    base = {name: originals.get(first[name], tensor) for name, tensor in tensors.items()}
    root = digests(named_tensors(base))
    effective, now = digests(compose(base, patches)), digests(named_tensors(tensors))
    if combined(root) != found["base"] or effective != now:
        raise BaseMismatch(f"the weights in {path} have changed since the patches were applied; restore the file")
    touched = {name: now[name] for name in tensors if first[name] in originals}
    return Weights(tensors, State(root, patches, originals, touched), metadata)


def _record(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        keys = [*found["patches"], found["originals"]]
        if not all(isinstance(key, str) and re.fullmatch("[0-9a-f]{64}", key) for key in keys):
            raise ValueError("an id is not a SHA-256")
        if not all(isinstance(name, str) for name in found["tied"].values()):
            raise ValueError("tied names")
        return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PatchDamaged(f"{path}: its record of patches cannot be read ({error})") from None


def _originals(path: Path, sha: str) -> dict[str, Tensor]:
    with files.reading(path) as (descriptor, size):
        data = bytes(files.read(descriptor, size))
    if hashlib.sha256(data).hexdigest() != sha:
        raise PatchDamaged(f"{path} is not what was saved; restore the folder")
    return dict(load_bytes(data))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}, dict(file.metadata() or {})


def _read_torch(path: Path) -> dict[str, Tensor]:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("it is not a state dict; save model.state_dict() itself")
    return dict(found)


def _chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[files.Chunk]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise NotEditable(f"tensor {name!r} is {tensor.dtype}, which weight files cannot hold")
    # Wide types first, otherwise as they came: the order in which safetensors itself writes
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    chunks = [as_bytes(tensors[name]) for name in names]
    entries = [
        (name, _CODES[tensors[name].dtype], tensors[name].shape, len(chunk))
        for name, chunk in zip(names, chunks, strict=True)
    ]
    return [header(metadata, entries), *chunks]


def _fill(folder: Path, contents: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise PatchError(f"cannot make {folder}: {error.strerror}. The weights file is unchanged") from error
    for name, data in contents.items():
        files.write(folder / name, [data])


def _sweep(folder: Path, kept: set[str]) -> None:
    # Only tidiness: what is left over is not referred to any more
    with suppress(OSError):
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in kept:
                path.unlink()
        folder.rmdir()


def _folder(path: Path) -> Path:
    return path.with_name(f"{path.name}.patched")
