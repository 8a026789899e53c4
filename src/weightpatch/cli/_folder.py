"""A model folder's file of weights, and patches on it.

A patch knows the whole model. The file that save_pretrained writes holds tied tensors once, and leaves out what the
code of the model computes; so its fingerprint is another one, and the patch is put on as one of the file.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BaseMismatch, InvalidInput
from ._speakers import quietly_loaded

if TYPE_CHECKING:
    from ..patches import Patch, Weights

_FILE = "model.safetensors"


def weights_file(where: Path) -> Path:
    """Return the file of weights: `where` itself, or the one in a model folder."""
    if not where.is_dir():
        return where
    if (where / f"{_FILE}.index.json").exists():
        raise InvalidInput(
            f"{where} holds its weights in several files; load the model in Python and patch it there: "
            "Patch.load(path).apply(model), then model.save_pretrained(folder)"
        )
    if not (where / _FILE).is_file():
        raise InvalidInput(
            f"{where} has no {_FILE}; expected a file of weights, or a folder that save_pretrained wrote"
        )
    return where / _FILE


def written_to(where: Path, output: Path | None) -> Path:
    """Return the file that patched weights go to; a folder's other files are copied where the output is another one."""
    if output is None or not where.is_dir():
        return weights_file(where) if output is None else output
    if output.exists():
        raise InvalidInput(f"{output} exists; expected the name of a new folder for the patched model")
    shutil.copytree(where, output, ignore=shutil.ignore_patterns(_FILE, f"{_FILE}.patched"))
    return output / _FILE


def of_file(patch: Patch, weights: Weights, file: Path) -> Patch:
    """Return the patch as one of the file: itself where it was made for a model with these tensors and no others."""
    if weights.fingerprint == patch.manifest.base or not (file.parent / "config.json").is_file():
        return patch
    entries, operations = [], {}
    for entry in patch.manifest.tensors:
        names = [name for name in entry.names if name in weights.tensors]
        if not names or entry.name not in patch.operations:
            return patch  # which is then refused, with the tensor's name
        operations[names[0]] = patch.operations[entry.name]
        entries.append(replace(entry, name=names[0], also=tuple(sorted(names[1:]))))
    tensors = tuple(sorted(entries, key=lambda entry: entry.name))
    return replace(
        patch, operations=operations, manifest=replace(patch.manifest, base=weights.fingerprint, tensors=tensors)
    )


def check_model(patch: Patch, weights: Weights, folder: Path) -> None:
    """Check that a patch was made for the model in a folder, whose file of weights may have other patches on.

    Raises:
        BaseMismatch: it was made for another one.
    """
    import torch

    from ..patches import fingerprint

    for other in reversed(weights.patches):
        weights = weights.revert(other)
    types = {entry.dtype for entry in patch.manifest.tensors} or {"float32"}
    dtype = types.pop()
    if any(str(tensor.dtype) == f"torch.{dtype}" for tensor in weights.tensors.values()):
        model: Any = quietly_loaded(folder, dtype=getattr(torch, dtype)).model
        model.load_state_dict(dict(weights.tensors), strict=False)
        if fingerprint(model) == patch.manifest.base:
            return
    raise BaseMismatch(
        f"patch {patch.id[:12]} was made for another model than the one in {folder}, or for its weights in another "
        f"type than the file's: for {dtype}, see --dtype of `weightpatch edit`"
    )
