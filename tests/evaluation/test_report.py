"""What a report says of its rows."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from weightpatch.editing import Result
from weightpatch.errors import InvalidInput
from weightpatch.evaluation import Checkpoint, Flips, Impact, Report, Row
from weightpatch.evaluation.metrics import bootstrap_mean, wilson


def row(index: int, result: Result, steps: int, error: float, flips: Flips, drift: float | None = 0.01) -> Row:
    return Row(index, result, steps, -0.1, 0.5, 1000 * index, 0.75, Impact(error, flips, drift))


REPORT = Report(
    editor="RMSProp(lr=0.001)",
    parameters=("layer3.*", "fc.*"),
    protocol="Independent()",
    test_items=200,
    drift_items=100,
    base_error=10.0,
    rows=(
        row(0, Result.satisfied, 2, 12.0, Flips(5, 1, 2)),
        row(1, Result.satisfied, 3, 9.0, Flips(0, 2, 0)),
        row(2, Result.already_satisfied, 0, 10.0, Flips(0, 0, 0), 0.0),
        row(3, Result.unsatisfied, 10, 10.0, Flips(3, 3, 0)),
        row(4, Result.nonfinite, 10, 90.0, Flips(160, 0, 0), None),
    ),
)


def test_the_summary_is_of_the_edits_that_had_something_to_do() -> None:
    found = REPORT.summary
    drawdowns = [2.0, -1.0, 0.0, 80.0]
    assert (found.edits, found.already_satisfied) == (4, 1)
    assert found.success == wilson(2, 4)
    assert found.steps.value == 25 / 4
    assert found.drawdown is not None
    assert found.drawdown.value == pytest.approx(np.mean(drawdowns))
    assert found.drawdown_absolute is not None
    assert found.drawdown_absolute.value == pytest.approx(np.mean(np.abs(drawdowns)))
    assert found.drawdown_max == pytest.approx(80.0)
    assert found.broken == bootstrap_mean([5, 0, 3, 160])
    assert found.repaired == bootstrap_mean([1, 2, 3, 0])
    assert found.other == bootstrap_mean([2, 0, 0, 0])
    assert found.drift == bootstrap_mean([0.01] * 3)
    assert found.generality == bootstrap_mean([0.75] * 4)
    assert found.seconds.value == 0.5
    assert found.peak_bytes == 4000


def test_a_report_of_nothing_but_no_ops() -> None:
    nothing = Report("E", ("*",), "Independent()", 10, 10, 50.0, (REPORT.rows[2],))
    assert nothing.summary.edits == 0
    assert nothing.summary.drawdown is None
    assert nothing.summary.peak_bytes is None
    assert "1 more held already" in str(nothing)
    assert Report.from_json(nothing.to_json()) == nothing


def test_json_comes_back_equal_and_is_strict(tmp_path: Path) -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT
    path = REPORT.save(tmp_path / "deep" / "report.json")
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert Report.from_json(path.read_text()) == REPORT
    assert content["summary"]["success"]["value"] == 0.5
    assert content["rows"][4]["impact"]["drift"] is None


def test_checkpoints_come_back_equal() -> None:
    points = (Checkpoint(1, 1, Impact(10.0, Flips(0, 0, 0), 0.0)), Checkpoint(4, 3, Impact(20.0, Flips(9, 1, 0), 0.5)))
    report = Report("E", ("*",), "Sequential((1,))", 10, 10, 10.0, REPORT.rows, points)
    assert Report.from_json(report.to_json()) == report
    assert points[1].retention == wilson(3, 4)
    assert "75.00 %" in str(report)
    assert "3 of 4 retained" in repr(report)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"summary": {}, "rows": 3, "parameters": [], "checkpoints": []}'])
def test_what_is_not_a_report_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a report"):
        Report.from_json(text)


def test_the_text_has_every_number_once_and_no_escape_codes() -> None:
    text = str(REPORT)
    for expected in ("4 edits, 1 more held already", "base error", "10.00 %", "50.00 %", "+20.250 pp", "+80.000 pp",
                     "42.00", "75.00 %", "0.01 nats", "drift"):  # fmt: skip
        assert expected in text
    assert "\x1b" not in text
    assert repr(REPORT).startswith("Report(RMSProp(lr=0.001) on layer3.*, fc.*, Independent(): 4 edits, success 50.0 %")
    console = Console(file=StringIO(), width=100)
    console.print(REPORT)
    assert "50.00 %" in console.file.getvalue()  # type: ignore[attr-defined]
