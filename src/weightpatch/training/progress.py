"""What a run tells while it goes on: a file of JSON lines, and what is said beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from .validation import Figures

__all__ = ["History", "told"]


@final
class History:
    """A file with one JSON object a line, each with its `step`.

    Args:
        path: lines of later steps than `step` are dropped: a run that goes on from a checkpoint writes them again.
        step: where the run goes on.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if _step(line) <= step] if step else []
        path.write_text("".join(f"{line}\n" for line in kept))

    def add(self, facts: Mapping[str, Any]) -> None:
        """Append one line."""
        with self._path.open("a") as file:
            file.write(json.dumps({key: _finite(value) for key, value in facts.items()}) + "\n")


def told(loss: float, figures: Figures | None) -> str:
    """Say in a few words how it goes."""
    text = f"loss {loss:.3f}"
    if figures is None:
        return text
    return (
        f"{text}  base error {figures.base_error:.2f} %  edits hold {figures.success:.0%}  "
        f"drawdown {figures.drawdown:+.2f} pp"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _step(line: str) -> float:
    """Return the step of a line; infinity for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
