"""The driver of many edits against making each of them by hand."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, Kept, Within
from weightpatch.editors import GradientDescent, RMSProp
from weightpatch.evaluation import Independent, Sequential
from weightpatch.evaluation.metrics import Flips, flips

EDITOR = RMSProp(lr=5e-2, max_steps=8)


def blobs(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Five overlapping clouds of points."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (n,), generator=random)
    centres = torch.randn(5, 6, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 0.8 * torch.randn(n, 6, generator=random), labels


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net, (x, y) = zoo.mlp(), blobs(400)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


def counted(before: Tensor, after: Tensor, y: Tensor) -> Flips:
    was, now = before.argmax(1), after.argmax(1)
    return flips(was != now, (was != y).double(), (now != y).double())


def random_edits(n: int) -> list[wp.constraints.Constraint]:
    x, y = blobs(n, seed=7)
    return [Classified(x[i : i + 1], (y[i : i + 1] + i % 3) % 5) for i in range(n)]  # a third holds, or nearly


def by_hand(model: nn.Module, edit: wp.Edit) -> nn.Module:
    edited = copy.deepcopy(model).eval()
    if edit.patch is not None:
        edited.load_state_dict({**edited.state_dict(), **edit.patch.result(edited.state_dict())})
    return edited


def test_independent_edits_are_those_made_by_hand(model: nn.Module) -> None:
    x, y = blobs(150, seed=1)
    edits, before = random_edits(9), zoo.digest(model)
    report = wp.evaluate(model, edits, EDITOR, test=(x, y), parameters="3.*")
    assert zoo.digest(model) == before
    plain = copy.deepcopy(model).eval()
    base = plain(x).detach()
    assert report.base_error == pytest.approx(100 * float((base.argmax(1) != y).double().mean()))
    assert 0 < report.base_error < 50
    assert (report.test_items, report.drift_items, len(report.rows)) == (150, 150, 9)
    for index, (row, constraint) in enumerate(zip(report.rows, edits, strict=True)):
        edit = wp.edit(model, constraint, EDITOR, parameters="3.*")
        after = by_hand(model, edit)(x).detach()
        assert row.impact is not None
        assert (row.index, row.result, row.steps) == (index, edit.result, edit.steps)
        assert row.violation == pytest.approx(edit.violation, abs=1e-5)
        assert row.impact.error == pytest.approx(100 * float((after.argmax(1) != y).double().mean()))
        assert row.impact.flips == counted(base, after, y)
        drift = nn.functional.kl_div(after.log_softmax(1), base.softmax(1), reduction="batchmean")
        assert row.impact.drift == pytest.approx(float(drift), rel=1e-4, abs=1e-6)
        assert row.seconds > 0
    results = {row.result for row in report.rows}
    assert {wp.Result.satisfied, wp.Result.already_satisfied} <= results


def test_edits_that_hold_already_are_counted_apart(model: nn.Module) -> None:
    test = blobs(60, seed=1)
    edits = random_edits(9)
    report = wp.evaluate(model, edits, EDITOR, test=test, parameters="3.*")
    real = [row for row in report.rows if row.result is not wp.Result.already_satisfied]
    noops = [row for row in report.rows if row.result is wp.Result.already_satisfied]
    assert noops
    assert report.summary.already_satisfied == len(noops)
    assert report.summary.edits == len(real)
    assert report.summary.steps.value == pytest.approx(sum(row.steps for row in real) / len(real))
    for row in noops:
        assert row.steps == 0
        assert row.impact is not None
        assert row.impact.flips.total == 0
        assert row.impact.drift == 0


def test_failures_count_with_their_steps_and_their_damage(model: nn.Module) -> None:
    edits = [c for c, row in zip(random_edits(9), _rows(model, random_edits(9)), strict=True) if row.steps > 1]
    report = wp.evaluate(model, edits, RMSProp(lr=1e-6, max_steps=4), test=blobs(60), parameters="3.*")
    assert report.summary.success.value == 0
    assert report.summary.steps.value == 4
    assert {row.result for row in report.rows} == {wp.Result.unsatisfied}


def _rows(model: nn.Module, edits: list[wp.constraints.Constraint]) -> tuple[Any, ...]:
    return wp.evaluate(model, edits, EDITOR, test=blobs(20), parameters="3.*").rows


def test_weights_that_are_not_finite_are_a_failure_with_wrong_answers(model: nn.Module) -> None:
    edits = [e for e, row in zip(random_edits(9), _rows(model, random_edits(9)), strict=True) if row.steps][:1]
    report = wp.evaluate(model, edits, GradientDescent(lr=1e38), test=blobs(60), parameters="*")
    (row,) = report.rows
    assert row.result is wp.Result.nonfinite
    assert row.violation is None
    assert row.impact is not None
    assert row.impact.drift is None
    assert report.summary.success.value == 0
    assert wp.Report.from_json(report.to_json()) == report


def test_generality_is_the_share_of_altered_copies_that_hold(model: nn.Module) -> None:
    def shifted(x: Tensor) -> Tensor:
        return torch.cat([x, x + 0.3, x - 5.0])

    edits = random_edits(6)
    report = wp.evaluate(model, edits, EDITOR, test=blobs(60), parameters="3.*", altered=shifted)
    for row, edit in zip(report.rows, edits, strict=True):
        if row.result is wp.Result.already_satisfied:
            assert row.generality is None
            continue
        found = by_hand(model, wp.edit(model, edit, EDITOR, parameters="3.*"))
        assert isinstance(edit, Classified)
        answers = found(shifted(edit.inputs)).argmax(1)  # type: ignore[arg-type]
        assert row.generality == pytest.approx(float((answers == edit.labels.repeat(3)).double().mean()))
        assert row.result is not wp.Result.satisfied or row.generality >= 1 / 3  # the first copy is the input itself
    assert any(row.result is wp.Result.satisfied for row in report.rows)


def test_random_alterations_are_the_same_in_every_run(model: nn.Module) -> None:
    def noisy(x: Tensor) -> Tensor:
        return x.repeat(20, 1) + torch.randn(20, 6)

    def generality() -> list[float | None]:
        report = wp.evaluate(model, random_edits(4), EDITOR, test=blobs(20), parameters="3.*", altered=noisy)
        return [row.generality for row in report.rows]

    state = torch.get_rng_state()
    first = generality()
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    assert generality() == first


def test_generality_of_regression_and_of_joined_demands(model: nn.Module) -> None:
    x, _ = blobs(2)
    joined = Within(x[:1], torch.zeros(1, 5), 0.1) & Kept(x[1:])
    report = wp.evaluate(model, [joined], EDITOR, test=blobs(20), altered=lambda x: torch.cat([x, x]))
    assert report.rows[0].generality in (0.0, 1.0)
    with pytest.raises(wp.errors.InvalidInput, match="demands of kind Kept"):
        wp.evaluate(model, [Nothing()], EDITOR, test=blobs(20), altered=lambda x: x)
    with pytest.raises(wp.errors.ShapeMismatch, match="m times as many"):
        wp.evaluate(model, [joined], EDITOR, test=blobs(20), altered=lambda x: x[:0])


@dataclass(frozen=True, eq=False)
class Nothing(wp.constraints.Constraint):
    """Asks for something, of no known kind."""

    @property
    def kind(self) -> str:
        return "Kept"

    def violation(self, function: Any) -> Tensor:
        return function(torch.ones(1, 6))[:, 0].abs() + 1


def test_sequential_edits_are_those_made_by_hand(model: nn.Module) -> None:
    x, y = blobs(150, seed=1)
    edits = random_edits(9)
    protocol = Sequential(checkpoints=(1, 4, 20))
    report = wp.evaluate(model, edits, EDITOR, test=(x, y), parameters="3.*", protocol=protocol)
    current, base, points = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()(x), []
    for count, (row, constraint) in enumerate(zip(report.rows, edits, strict=True), start=1):
        edit = wp.edit(current, constraint, EDITOR, parameters="3.*")
        assert (row.result, row.steps, row.impact) == (edit.result, edit.steps, None)
        current = by_hand(current, edit)
        if count in (1, 4, 9):
            after = current(x)
            held = sum(bool(c.met(current).all()) for c in edits[:count])
            points.append((count, held, counted(base, after, y)))
    assert [(p.edits, p.retained, p.impact.flips) for p in report.checkpoints] == points
    assert report.summary.drawdown is None
    assert report.checkpoints[-1].retention.value == points[-1][1] / 9
    assert "retained" in repr(report)


@pytest.mark.parametrize("remember", [False, True])
def test_failed_edits_are_left_out_where_that_is_asked(model: nn.Module, remember: bool) -> None:
    x, y = blobs(150, seed=1)
    edits, brief = random_edits(9), RMSProp(lr=2e-2, max_steps=2)
    protocol = Sequential(checkpoints=(9,), remember=remember, skip_failed=True)
    report = wp.evaluate(model, edits, brief, test=(x, y), parameters="3.*", protocol=protocol)
    current, base, taken = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()(x), list[Classified]()
    for row, constraint in zip(report.rows, edits, strict=True):
        fix = constraint
        if remember and taken:
            inputs, labels = torch.cat([c.inputs for c in taken]), torch.cat([c.labels for c in taken])
            fix = constraint & Classified(inputs, labels)
        edit = wp.edit(current, fix, brief, parameters="3.*")
        assert (row.result, row.steps) == (edit.result, edit.steps)
        if edit.result.held:
            current = by_hand(current, edit)
            taken.append(constraint)
    assert 2 < len(taken) < 9
    (point,) = report.checkpoints
    assert point.retained == sum(bool(c.met(current).all()) for c in edits)
    assert point.impact.flips == counted(base, current(x), y)


def test_an_edit_that_is_not_finite_is_not_built_upon(model: nn.Module) -> None:
    edits = random_edits(9)
    report = wp.evaluate(model, edits, GradientDescent(lr=1e38), test=blobs(20), protocol=Sequential((2,)))
    assert report.checkpoints[-1].impact.flips.total == 0
    assert {row.result for row in report.rows} <= {wp.Result.nonfinite, wp.Result.already_satisfied}


def test_many_parameters_patterns_and_a_kept_set(model: nn.Module) -> None:
    keep = wp.Locality(blobs(8, seed=3)[0])
    gentle = RMSProp(lr=3e-2, max_steps=6, keep_weight=10.0)
    report = wp.evaluate(model, random_edits(5), gentle, test=blobs(50), parameters=["0.weight", "3.*"], keep=keep)
    free = wp.evaluate(model, random_edits(5), EDITOR, test=blobs(50), parameters=["0.weight", "3.*"])
    assert report.parameters == ("0.weight", "3.*")
    assert report.summary.drift is not None
    assert free.summary.drift is not None
    assert report.summary.drift.value < free.summary.drift.value


def test_a_model_in_half_precision(case: zoo.Case) -> None:
    model = case.model()
    x = case.inputs(40)
    y = torch.arange(40) % 5
    edits = [Classified(x[i : i + 1], torch.tensor([i])) for i in range(3)]
    report = wp.evaluate(model, edits, RMSProp(lr=1e-2), test=(x, y), parameters=case.parameters)
    assert len(report.rows) == 3
    assert all(row.impact is not None and math.isfinite(row.impact.error) for row in report.rows)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "net"}, "model="),
        ({"editor": RMSProp}, "editor="),
        ({"protocol": Independent}, "protocol="),
        ({"edits": []}, "at least one constraint"),
        ({"edits": [3]}, "at least one constraint"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"test": (torch.zeros(0, 6), torch.zeros(0))}, "empty batch"),
        ({"test": (torch.zeros(3, 6), torch.zeros(3))}, "targets of the test set"),
        ({"test": (torch.zeros(3, 6), torch.tensor([0, 1]))}, "targets of the test set"),
        ({"test": (torch.zeros(3, 6), torch.tensor([0, 1, 5]))}, "targets go from .* to 5; .* expected 0 to 4"),
        ({"parameters": "4.*"}, "no parameter matches"),
    ],
)
def test_misuse_is_explained(model: nn.Module, changes: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"model": model, "edits": random_edits(1), "editor": EDITOR, "test": blobs(5), **changes}
    with pytest.raises(wp.errors.InvalidInput, match=says):
        wp.evaluate(given.pop("model"), given.pop("edits"), given.pop("editor"), **given)


FRESH = """
import random
import sys

import numpy as np
import torch
from torch import nn

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editors import RMSProp
from weightpatch.evaluation import edit_page


def state():
    return torch.get_rng_state().sum().item(), random.getstate(), np.random.get_state()[1].sum()


model, x, y = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(20, 4), torch.arange(20) % 3
before, editor = state(), RMSProp(lr=1e-2)
found = wp.edit(model, Classified(x[:1], y[1:2]), editor)
assert state() == before, "edit"
report = wp.evaluate(model, [Classified(x[:1], y[1:2])], editor, test=(x, y))
assert state() == before, "evaluate"
str(report)
assert state() == before, "str"
edit_page(sys.argv[1], model=model, edit=found, test=(x, y))
assert state() == before, "page"
"""


def test_what_is_imported_late_draws_no_numbers_of_the_callers(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "page.html")], check=True, timeout=200)


@pytest.mark.parametrize("points", [(0,), (3, 1), (2, 2)])
def test_checkpoints_increase(points: tuple[int, ...]) -> None:
    with pytest.raises(wp.errors.InvalidInput, match="increasing"):
        Sequential(points)
