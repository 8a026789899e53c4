"""`weightpatch inspect`: explain a patch file without torch and without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ._output import Answer, console


def inspect(patch: Annotated[Path, tyro.conf.Positional], json: bool = False) -> Answer:
    """Check a patch file and explain what it holds; neither torch nor the model is needed.

    Args:
        patch: The .patch.safetensors file.
        json: Print facts as JSON alone.
    """
    from rich.table import Table

    from ..patches.format import describe

    facts = describe(patch)
    out = console(json)
    table = Table("tensor", "kind", "shape", "dtype", "bytes")
    for tensor in facts["tensors"]:
        row = (
            tensor["name"],
            tensor["kind"],
            "×".join(map(str, tensor["shape"])),
            tensor["dtype"],
            str(tensor["bytes"]),
        )
        table.add_row(*row)
    for name, value in facts.items():
        if name not in ("tensors", "gates"):
            out.print(f"{name:12} {value}")
    out.print(table)
    if "gates" in facts:
        table = Table("gate at module", "keys", "features", "bytes")
        for gate in facts["gates"]:
            table.add_row(gate["name"], str(gate["keys"]), f"{gate['width']} to {gate['out']}", str(gate["bytes"]))
        out.print(table)
    return Answer(facts)
