"""What a command answers: facts for --json, an exit code; and how it speaks on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Answer:
    """The outcome of a command: its facts, and 0 (good) or 1 (a demand or gate is not met, or the verdict is red)."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    code: int = 0


def console(as_json: bool) -> Console:
    """Return where a command speaks: the terminal, or nowhere when --json owns the output."""
    from rich.console import Console

    return Console(quiet=as_json, highlight=False, soft_wrap=True)


def complain(message: str, as_json: bool, code: int = 2) -> int:
    """Say what went wrong, on the error stream; return the exit code."""
    if as_json:
        print(json.dumps({"error": message, "code": code}))
    else:
        print(f"weightpatch: {message}", file=sys.stderr)
    return code
