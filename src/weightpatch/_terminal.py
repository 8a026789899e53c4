"""What is shown on a terminal; rich draws a random number when it is imported, and the caller's stay as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .network import preserved_rng

if TYPE_CHECKING:
    from rich.console import Console


def console(**settings: Any) -> Console:
    """Return a console of rich with these settings."""
    with preserved_rng():
        from rich.console import Console

        return Console(**settings)


@contextmanager
def bar(what: str, total: int, done: int, wanted: bool) -> Iterator[Callable[[int, str], None]]:
    """Show a progress bar where the error stream is a terminal; yield what moves it: (step, text)."""
    shown = console(stderr=True)
    if not (wanted and shown.is_terminal):
        yield lambda step, text: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=shown) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda step, text: progress.update(task, completed=step, description=text)
