"""`weightpatch revert`: take a patch off a file of weights, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ._folder import of_file, weights_file, written_to
from ._output import Answer, console


def revert(
    patch: Annotated[Path, tyro.conf.Positional], weights: Path, output: Path | None = None, json: bool = False
) -> Answer:
    """Take a patch off a file of weights; without its last patch the file holds the original, bit for bit.

    Args:
        patch: The .patch.safetensors file.
        weights: The patched weights, with the folder that `apply` wrote beside them; or the folder of a patched model.
        output: Where to write the weights as .safetensors, or a new folder for the model; over the patched ones when
            not given.
        json: Print facts as JSON alone.
    """
    from ..patches import Patch, load_weights, save_weights

    one, file = Patch.load(patch), weights_file(weights)
    loaded = load_weights(file)
    clean = loaded.revert(of_file(one, loaded, file))
    target = written_to(weights, output)
    save_weights(target, clean)
    left = len(clean.patches)
    state = f"{left} patches are left" if left else f"bit for bit the base {clean.fingerprint[:12]}"
    console(json).print(f"reverted {one.id[:12]}; {target}: {state}")
    return Answer({"patch": one.id, "output": str(target), "patches": [each.id for each in clean.patches]})
