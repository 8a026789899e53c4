"""`weightpatch revert`: take a patch off a file of weights, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ._output import Answer, console


def revert(
    patch: Annotated[Path, tyro.conf.Positional], weights: Path, output: Path | None = None, json: bool = False
) -> Answer:
    """Take a patch off a file of weights; without its last patch the file holds the original, bit for bit.

    Args:
        patch: The .patch.safetensors file.
        weights: The patched weights, with the folder that `apply` wrote beside them.
        output: Where to write the weights as .safetensors; over the patched ones when not given.
        json: Print facts as JSON alone.
    """
    from ..patches import Patch, load_weights, save_weights

    one = Patch.load(patch)
    clean = load_weights(weights).revert(one)
    target = weights if output is None else output
    save_weights(target, clean)
    left = len(clean.patches)
    state = f"{left} patches are left" if left else f"bit for bit the base {clean.fingerprint[:12]}"
    console(json).print(f"reverted {one.id[:12]}; {target}: {state}")
    return Answer({"patch": one.id, "output": str(target), "patches": [each.id for each in clean.patches]})
