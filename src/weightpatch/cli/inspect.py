"""`weightpatch inspect`: explain a patch file without torch and without the model."""

from __future__ import annotations

from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ._output import Answer, console

if TYPE_CHECKING:
    from rich.table import Table


def inspect(patch: Annotated[Path, tyro.conf.Positional], json: bool = False) -> Answer:
    """Check a patch file and explain what it holds; neither torch nor the model is needed.

    Args:
        patch: The .patch.safetensors file.
        json: Print facts as JSON alone.
    """
    from ..patches.format import describe

    facts = describe(patch)
    out = console(json)
    for name, value in facts.items():
        if name not in _TABLES and value not in ([], {}):
            out.print(f"{name:12} {_text(value)}", markup=False)
    for name, (heads, row) in _TABLES.items():
        if facts[name]:
            out.print(_table(heads, [row(item) for item in facts[name]]))
    return Answer(facts)


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(*heads)
    for row in rows:
        table.add_row(*(escape(_text(value)) for value in row))
    return table


def _text(value: Any) -> str:
    """A value on one line, whatever it holds: a text of several lines could pass for other facts."""
    if isinstance(value, str):
        return value.replace("\n", "\\n").replace("\t", "\\t")
    return dumps(value, ensure_ascii=False)


def _sizes(shape: list[int]) -> str:
    return "×".join(map(str, shape))


def _tensor(item: dict[str, Any]) -> tuple[Any, ...]:
    return item["name"], item["kind"], _sizes(item["shape"]), item["dtype"], item["bytes"]


def _gate(item: dict[str, Any]) -> tuple[Any, ...]:
    (keys, width), (_, out) = item["parts"]["keys"], item["parts"]["values"]
    return item["layer"], keys, f"{width} to {out}", ", ".join(map(str, item["readings"])), item["bytes"]


def _reading(item: dict[str, Any]) -> tuple[Any, ...]:
    pooling = f"{item['pooling']} {_sizes(item['grid'])}".strip()
    return item["layer"], pooling, item["distance"], _sizes(item["parts"].get("metric", [])), item["bytes"]


def _demand(item: dict[str, Any]) -> tuple[Any, ...]:
    kind, parts = f"{item['kind']} {item['version']}", item["parts"].items()
    tensors = ", ".join(f"{name} {_sizes(shape)}".strip() for name, shape in parts)
    violations = ("unknown" if value is None else f"{value:.4g}" for value in (item["before"], item["after"]))
    return kind, tensors, item["scalars"], *violations, item["bytes"]


def _unrecorded(item: dict[str, Any]) -> tuple[Any, ...]:
    return item["kind"], item["reason"]


_TABLES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[Any, ...]]]] = {
    "tensors": (("tensor", "kind", "shape", "dtype", "bytes"), _tensor),
    "gates": (("gate at module", "keys", "features", "reading", "bytes"), _gate),
    "readings": (("key read at", "pooling", "distance", "metric", "bytes"), _reading),
    "demands": (("demand", "tensors", "scalars", "before", "after", "bytes"), _demand),
    "unrecorded": (("demand not recorded", "why"), _unrecorded),
}
