"""A report in one line of a table."""

from __future__ import annotations

from .metrics import Estimate
from .report import Report

__all__ = ["figures"]


def figures(report: Report) -> dict[str, str]:
    """Return the columns of a table that compares reports, as text: drawdown in points or units, times in ms."""
    found = report.summary
    flips = "/".join(_show(value, "{:.1f}") for value in (found.broken, found.repaired, found.other))
    return {
        f"base {report.error_name}": report.told(report.base_error),
        "success": f"{100 * found.success.value:.1f} %",
        "steps": _show(found.steps, "{:.2f}"),
        "drawdown": _show(found.drawdown, "{:+.3f}" if report.unit == "%" else "{:+.3g}"),
        "absolute": _interval(found.drawdown_absolute),
        "max": "" if found.drawdown_max is None else f"{found.drawdown_max:+.2f}",
        "broken/repaired/other": flips,
        "KL": _show(found.drift, "{:.2g}"),
        "generality": "" if found.generality is None else f"{100 * found.generality.value:.1f} %",
        "ms/edit": f"{1000 * found.seconds.value:.1f}",
    }


def _show(estimate: Estimate | None, form: str) -> str:
    return "" if estimate is None else form.format(estimate.value)


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.3f} ±{(estimate.high - estimate.low) / 2:.3f}"
