"""`weightpatch doctor`: what in a model can be edited, what cannot, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ._model import load_model
from ._output import Answer, console


def doctor(
    model: str,
    weights: Path | None = None,
    parameters: tuple[str, ...] = ("*",),
    task: Literal["images", "translation", "lm", "text-classification"] = "images",
    json: bool = False,
) -> Answer:
    """Say what in a model can be edited, what cannot, and why.

    `weightpatch doctor --task translation --help` shows the options for text models, of which it tells more.

    Args:
        model: The model, as package.module:factory.
        weights: The model's weights, .safetensors or .pt; the factory's own when not given.
        parameters: Which parameters to look at: glob patterns of their names.
        task: What the model does.
        json: Print facts as JSON alone.
    """
    from fnmatch import fnmatchcase

    from rich.table import Table

    from ..network import explain
    from ..patches import fingerprint

    network = load_model(model, weights)
    rows = [row for row in explain(network) if any(fnmatchcase(row.name, pattern) for pattern in parameters)]
    good = [row for row in rows if row.editable]
    table = Table("parameter", "shape", "dtype", "editable", "why")
    for row in rows:
        table.add_row(row.name, "×".join(map(str, row.shape)), row.dtype, "yes" if row.editable else "no", row.reason)
    out = console(json)
    out.print(table)
    out.print(f"{len(good)} of {len(rows)} parameters can be edited; fingerprint {fingerprint(network)}")
    facts = {
        "fingerprint": fingerprint(network),
        "parameters": [
            {"name": r.name, "shape": list(r.shape), "dtype": r.dtype, "editable": r.editable, "reason": r.reason}
            for r in rows
        ],
    }
    return Answer(facts, 0 if good else 1)
