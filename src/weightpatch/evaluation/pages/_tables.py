"""Reports of many edits, as tables of a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from ..metrics import Estimate
from ..report import Report
from ._words import Scale, count, decimal, percent, plural, points, seconds, size

__all__ = ["Table", "table"]


@final
@dataclass(frozen=True)
class Table:
    """A title, what was run, and rows of a name, a value and its 95 % interval."""

    title: str
    about: str
    rows: tuple[tuple[str, str, str], ...]


def table(title: str, report: Report) -> Table:
    """Sum up a report."""
    found = report.summary
    about = f"{plural(found.edits, 'edit')} with {report.editor} on {', '.join(report.parameters)}, {report.protocol}"
    if found.already_satisfied:
        about += f"; {count(found.already_satisfied)} more held already"
    return Table(title, about, tuple(_rows(report)))


def _rows(report: Report) -> Iterator[tuple[str, str, str]]:
    found = report.summary
    scale = Scale(report.unit)
    yield f"base {report.error_name}", scale.value(report.base_error), f"{count(report.test_items)} test items"

    def moved(value: float) -> str:
        return f"{points(value, 3) if report.unit == '%' else scale.change(value)} {scale.points}".rstrip()

    estimates = (
        ("success", found.success, lambda v: percent(v)),
        ("steps", found.steps, lambda v: decimal(v)),
        ("drawdown, signed", found.drawdown, moved),
        ("drawdown, absolute", found.drawdown_absolute, lambda v: moved(v).lstrip("+")),
        ("broken answers", found.broken, lambda v: decimal(v)),
        ("repaired answers", found.repaired, lambda v: decimal(v)),
        ("other flips", found.other, lambda v: decimal(v)),
        ("positions changed", found.changed, lambda v: percent(v, 2)),
        ("drift", found.drift, lambda v: f"{v:.2g} nats"),
        ("generality", found.generality, lambda v: percent(v)),
        ("time an edit", found.seconds, seconds),
    )
    for name, estimate, show in estimates:
        if isinstance(estimate, Estimate) and estimate.value == estimate.value:
            yield name, show(estimate.value), f"{show(estimate.low)} to {show(estimate.high)}"
        if name == "drawdown, absolute" and found.drawdown_max is not None:
            yield "drawdown, largest", moved(found.drawdown_max), ""
    if found.peak_bytes is not None:
        yield "peak memory", size(found.peak_bytes), ""
