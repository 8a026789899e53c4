"""The command line: one file a command; torch is imported inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from ._output import Answer, complain
from ._speakers import TEXT_TASKS

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 good; 1 a demand or gate is not met, or the verdict is red; 2 bad input.
    """
    import tyro

    # Before torch starts its threads: ones that spin for long while they wait make a busy machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

    from .apply import apply
    from .demo import demo
    from .demo_text import demo_text
    from .diff import diff
    from .diff_text import diff_text
    from .doctor import doctor
    from .doctor_text import doctor_text
    from .edit import edit
    from .edit_text import edit_text
    from .evaluate import evaluate
    from .evaluate_text import evaluate_text
    from .inspect import inspect
    from .revert import revert
    from .train import train

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in arguments:
        from .._version import __version__

        print(__version__)
        return 0
    commands: dict[str, Any] = {
        f.__name__: f for f in (demo, edit, evaluate, train, diff, apply, revert, inspect, doctor)
    }
    if _task(arguments) in TEXT_TASKS:  # these commands have other options there
        commands |= {"demo": demo_text, "edit": edit_text, "evaluate": evaluate_text, "diff": diff_text}
        commands |= {"doctor": doctor_text}
    as_json = "--json" in arguments
    try:
        answer: Answer = tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="weightpatch",
            description="Fix a neural network's mistake without breaking the rest of it. Exit codes: 0 good, "
            "1 a demand or gate is not met or the verdict is red, 2 bad input.",
            args=arguments,
        )
    except KeyboardInterrupt:
        return complain("interrupted; nothing was written", as_json, code=130)
    except SystemExit as stop:  # tyro's own usage messages
        return stop.code if isinstance(stop.code, int) else 2
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, RuntimeError, TypeError, ImportError, LookupError)):
            traceback.print_exc()
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        return complain(f"{type(error).__name__}: {error}{notes}", as_json)
    if as_json:
        print(json.dumps(answer.facts, indent=2, sort_keys=True))
    return answer.code


def _task(arguments: Sequence[str]) -> str:
    """Return what `--task` says."""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if word.startswith("--task"):
            return after if word == "--task" else word.removeprefix("--task=")
    return "images"
