"""`weightpatch apply`: put a patch on a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ._output import Answer, console


def apply(
    patch: Annotated[Path, tyro.conf.Positional], weights: Path, output: Path | None = None, json: bool = False
) -> Answer:
    """Put a patch on a file of weights. What it takes to revert is kept in a folder beside the file that is written.

    Args:
        patch: The .patch.safetensors file.
        weights: The weights it was made for, .safetensors or .pt, with or without other patches.
        output: Where to write the patched weights as .safetensors; over the weights themselves when not given.
        json: Print facts as JSON alone.
    """
    from ..patches import Patch, load_weights, save_weights

    one = Patch.load(patch)
    patched = load_weights(weights).apply(one)
    target = weights if output is None else output
    save_weights(target, patched)
    console(json).print(
        f"applied  {one.id[:12]} ({len(one.operations)} tensors); {target} has {len(patched.patches)} patches"
    )
    return Answer({"patch": one.id, "output": str(target), "patches": [each.id for each in patched.patches]})
