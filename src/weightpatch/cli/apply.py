"""`weightpatch apply`: put a patch on a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ._folder import check_model, of_file, weights_file, written_to
from ._output import Answer, console


def apply(
    patch: Annotated[Path, tyro.conf.Positional], weights: Path, output: Path | None = None, json: bool = False
) -> Answer:
    """Put a patch on a file of weights. What it takes to revert is kept in a folder beside the file that is written.

    Args:
        patch: The .patch.safetensors file.
        weights: The weights it was made for, .safetensors or .pt, with or without other patches; or a model folder that
            save_pretrained wrote.
        output: Where to write the patched weights as .safetensors, or a new folder for the patched model; over the
            weights themselves when not given.
        json: Print facts as JSON alone.
    """
    from ..patches import Patch, load_weights, save_weights

    one, file = Patch.load(patch), weights_file(weights)
    loaded = load_weights(file)
    if (fitted := of_file(one, loaded, file)) is not one:
        check_model(one, loaded, file.parent)
    patched = loaded.apply(fitted)
    target = written_to(weights, output)
    save_weights(target, patched)
    console(json).print(
        f"applied  {one.id[:12]} ({len(one.operations)} tensors); {target} has {len(patched.patches)} patches"
    )
    return Answer({"patch": one.id, "output": str(target), "patches": [each.id for each in patched.patches]})
