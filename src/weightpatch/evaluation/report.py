"""What a set of edits did: one row an edit, and a summary with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from .._calling import Name
from .._terminal import console
from ..editing import Result
from ..errors import InvalidInput
from ._plain import finite
from .metrics import Estimate, Flips, bootstrap_mean, wilson

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Checkpoint", "Impact", "Report", "Row", "Summary"]


@final
@dataclass(frozen=True)
class Impact:
    """What an edited model answers on the whole test set.

    Attributes:
        error: the figure of the report's likelihood, such as % of classes wrong; an answer that is NaN is wrong.
        flips: the items whose answers differ from those of the unedited model.
        drift: mean KL(before || after) on the test set, nats, see `Report.drift_items`; None where it is not finite.
        changed: the share of positions (tokens, pixels) that changed; None where an item is one of them.
    """

    error: float
    flips: Flips
    drift: float | None
    changed: float | None = None


@final
@dataclass(frozen=True)
class Row:
    """One edit.

    Attributes:
        index: its place in the sequence of edits.
        result: how it ended, checked on the final weights in the model's own dtype.
        steps: the updates made; an edit that fails has made all its editor allows.
        violation: the largest violation on the final weights; None where it is not finite.
        seconds: what the edit took, without the test set.
        peak_bytes: growth of peak memory during the edit; None where it cannot be measured.
        generality: the share of altered copies of its inputs that are answered as demanded; None where not measured.
        impact: on the test set; None where the protocol does not measure it after every edit.
        item: what the edit is about: a row of the user's data, or a file; None where it was not told.
    """

    index: int
    result: Result
    steps: int
    violation: float | None
    seconds: float
    peak_bytes: int | None
    generality: float | None
    impact: Impact | None
    item: Name | None = None


@final
@dataclass(frozen=True)
class Checkpoint:
    """The model after several edits, one on another.

    Attributes:
        edits: how many.
        retained: how many of them hold now.
        impact: of all of them together, against the unedited model.
    """

    edits: int
    retained: int
    impact: Impact

    @property
    def retention(self) -> Estimate:
        """The share of these edits that hold now."""
        return wilson(self.retained, self.edits)


@final
@dataclass(frozen=True)
class Summary:
    """Means over the edits that had something to do; 95 % intervals (Wilson for shares, seeded bootstrap for means).

    Attributes:
        edits: how many edits there were, without those whose demand held already.
        already_satisfied: how many held already: 0-step no-ops, in no mean.
        success: share of edits that hold on the final weights.
        steps: mean number of updates; failures count with all the updates they made.
        drawdown: mean of err(edited) - err(base), signed, in percentage points or units of the outputs.
        drawdown_absolute: mean of its absolute value.
        drawdown_max: its largest value.
        broken: mean number of test items that change for the worse, as from right to wrong.
        repaired: mean number that change for the better, as from wrong to right.
        other: mean number that change otherwise, as from wrong to another wrong answer.
        changed: mean share of positions that change; None where an item is one of them.
        drift: mean KL(before || after) on the test set, nats, over the edits where it is finite.
        generality: mean share of altered copies that are answered as demanded.
        seconds: mean seconds an edit.
        peak_bytes: the largest growth of memory; None where it was not measured.
    """

    edits: int
    already_satisfied: int
    success: Estimate
    steps: Estimate
    drawdown: Estimate | None
    drawdown_absolute: Estimate | None
    drawdown_max: float | None
    broken: Estimate | None
    repaired: Estimate | None
    other: Estimate | None
    changed: Estimate | None
    drift: Estimate | None
    generality: Estimate | None
    seconds: Estimate
    peak_bytes: int | None


@final
@dataclass(frozen=True, repr=False)
class Report:
    """Success, locality, generality and cost of a set of edits.

    Attributes:
        editor: what made the edits.
        parameters: what they might change.
        protocol: how they were applied.
        test_items: how many items the test set has.
        drift_items: on how many of them, a seeded sample, the drift comes from float32 logits. Where these are not all,
            it is the mean over all items from bfloat16 logits, corrected by what those are off by on the sample.
        base_error: of the unedited model, in the figure of the likelihood, such as % of classes wrong.
        rows: one for every edit, in order.
        checkpoints: of edits that were applied one on another.
        likelihood: what the outputs mean, with what it took from them.
        error_name: what errors are called.
        unit: of errors; that of their differences is percentage points where it is %.
    """

    editor: str
    parameters: tuple[str, ...]
    protocol: str
    test_items: int
    drift_items: int
    base_error: float
    rows: tuple[Row, ...]
    checkpoints: tuple[Checkpoint, ...] = ()
    likelihood: str = "Categorical()"
    error_name: str = "error"
    unit: str = "%"

    @cached_property
    def summary(self) -> Summary:
        """Means over the edits, with intervals."""
        rows = [row for row in self.rows if row.result is not Result.already_satisfied]
        impacts = [row.impact for row in rows if row.impact is not None]
        drawdowns = [impact.error - self.base_error for impact in impacts]
        peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
        return Summary(
            edits=len(rows),
            already_satisfied=len(self.rows) - len(rows),
            success=wilson(sum(row.result.held for row in rows), len(rows)),
            steps=bootstrap_mean([row.steps for row in rows]),
            drawdown=_mean(drawdowns),
            drawdown_absolute=_mean(map(abs, drawdowns)),
            drawdown_max=max(drawdowns, default=None),
            broken=_mean(impact.flips.broken for impact in impacts),
            repaired=_mean(impact.flips.repaired for impact in impacts),
            other=_mean(impact.flips.other for impact in impacts),
            changed=_mean(impact.changed for impact in impacts if impact.changed is not None),
            drift=_mean(impact.drift for impact in impacts if impact.drift is not None),
            generality=_mean(row.generality for row in rows if row.generality is not None),
            seconds=bootstrap_mean([row.seconds for row in rows]),
            peak_bytes=max(peaks, default=None),
        )

    def __repr__(self) -> str:
        found, text = self.summary, f"Report({self.editor} on {', '.join(self.parameters)}, {self.protocol}: "
        text += f"{found.edits} edits, success {100 * found.success.value:.1f} %, {found.steps.value:.2f} steps"
        if found.drawdown is not None:
            text += f", drawdown {self.moved(found.drawdown.value)}"
        if self.checkpoints:
            last = self.checkpoints[-1]
            text += f", {last.retained} of {last.edits} retained"
        return text + f", base {self.error_name} {self.told(self.base_error)})"

    def told(self, error: float) -> str:
        """Return an error with its unit."""
        return f"{error:.2f} %" if self.unit == "%" else f"{error:.4g} {self.unit}".rstrip()

    def moved(self, difference: float) -> str:
        """Return a difference of errors with its sign and unit."""
        return f"{difference:+.3f} pp" if self.unit == "%" else f"{difference:+.3g} {self.unit}".rstrip()

    def __str__(self) -> str:
        shown = console(width=100, record=False, force_terminal=False, no_color=True)
        with shown.capture() as capture:
            shown.print(self)
        return capture.get().rstrip("\n")

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Table]:
        """Yield the tables that rich prints."""
        yield _summary_table(self)
        if self.checkpoints:
            yield _checkpoint_table(self)

    def to_json(self) -> str:
        """Return the report as JSON: the summary, then all rows; `from_json` reads it back."""
        content = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("rows", "checkpoints")
        }
        content["summary"] = asdict(self.summary)
        content["rows"] = [encode_row(row) for row in self.rows]
        content["checkpoints"] = [asdict(checkpoint) for checkpoint in self.checkpoints]
        return json.dumps(finite(content), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote; the summary is computed again from the rows."""
        try:
            content = json.loads(text)
            content.pop("summary")
            content["parameters"] = tuple(content["parameters"])
            content["rows"] = tuple(map(decode_row, content["rows"]))
            content["checkpoints"] = tuple(map(decode_checkpoint, content["checkpoints"]))
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"this is not a report that weightpatch wrote ({error}); expected what Report.to_json returns"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to a file, making its folder; return the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path


def encode_row(row: Row) -> dict[str, Any]:
    """Return a row as plain JSON values."""
    return {**asdict(row), "result": row.result.name}


def decode_row(content: dict[str, Any]) -> Row:
    """Read what `encode_row` returned."""
    impact = content["impact"]
    return Row(**{**content, "result": Result[content["result"]], "impact": impact and _decode_impact(impact)})


def decode_checkpoint(content: dict[str, Any]) -> Checkpoint:
    """Read a checkpoint from plain JSON values."""
    return Checkpoint(**{**content, "impact": _decode_impact(content["impact"])})


def _decode_impact(content: dict[str, Any]) -> Impact:
    return Impact(**{**content, "flips": Flips(**content["flips"])})


def _mean(values: Iterable[float]) -> Estimate | None:
    found = list(values)
    return bootstrap_mean(found) if found else None


def _summary_table(report: Report) -> Table:
    from rich.table import Table

    found = report.summary
    apart = f", {found.already_satisfied} more held already" if found.already_satisfied else ""
    table = Table(
        title=f"{found.edits} edits{apart} · {report.editor} on {', '.join(report.parameters)} · {report.protocol}"
    )
    for heading in ("", "value", "95 % interval"):
        table.add_column(heading, justify="left" if not heading else "right")

    def add(name: str, estimate: Estimate | None, show: Callable[[float], str]) -> None:
        if estimate is not None and not math.isnan(estimate.value):
            table.add_row(name, show(estimate.value), f"{show(estimate.low)} to {show(estimate.high)}")

    table.add_row(f"base {report.error_name}", report.told(report.base_error), f"{report.test_items} test items")
    add("success", found.success, _percent)
    add("steps", found.steps, "{:.2f}".format)
    add("drawdown, signed", found.drawdown, report.moved)
    add("drawdown, absolute", found.drawdown_absolute, report.moved)
    if found.drawdown_max is not None:
        table.add_row("drawdown, largest", report.moved(found.drawdown_max), "")
    for name in ("broken", "repaired", "other"):
        add(f"answers {name}", getattr(found, name), "{:.2f}".format)
    add("positions changed", found.changed, _percent)
    add("drift", found.drift, "{:.3g} nats".format)
    add("generality", found.generality, _percent)
    add("seconds an edit", found.seconds, "{:.3g}".format)
    if found.peak_bytes is not None:
        table.add_row("peak memory", f"{found.peak_bytes / 1e6:.1f} MB", "")
    return table


def _checkpoint_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(title="one edit on another")
    for heading in ("edits", "retained", "drawdown", "broken", "repaired", "other", "drift"):
        table.add_column(heading, justify="right")
    for point in report.checkpoints:
        impact = point.impact
        flipped = (str(getattr(impact.flips, name)) for name in ("broken", "repaired", "other"))
        drift = "not finite" if impact.drift is None else f"{impact.drift:.3g} nats"
        drawdown = report.moved(impact.error - report.base_error)
        table.add_row(str(point.edits), _percent(point.retention.value), drawdown, *flipped, drift)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
