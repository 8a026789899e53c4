from __future__ import annotations

import json

import pytest
import torch
import zoo

import weightpatch as wp
from weightpatch.constraints import Classified, Kept
from weightpatch.errors import InvalidInput
from weightpatch.evaluation import Curve, Flips, compare, curve
from weightpatch.evaluation.curve import Point
from weightpatch.evaluation.metrics import Estimate


def edited(case: zoo.Case) -> tuple[torch.nn.Module, Classified, wp.Edit, tuple[torch.Tensor, torch.Tensor]]:
    model = case.model().eval()
    inputs = case.inputs(40)
    with torch.no_grad():
        answers = model(inputs).argmax(1)
    constraint = Classified(inputs[:1], (answers[:1] + 1) % 5, 0.1)
    found = wp.edit(model, constraint, wp.editors.RMSProp(lr=1e-2, max_steps=30), parameters=case.parameters)
    return model, constraint, found, (inputs, answers)


def test_each_point_is_the_model_with_interpolated_weights(case):
    model, constraint, found, test = edited(case)
    seen = zoo.digest(model)
    line = curve(model, found, constraint, test, strengths=(0.0, 0.4, 1.0), batch_size=16)
    assert zoo.digest(model) == seen
    patched = case.model().eval()
    patched.load_state_dict(model.state_dict())
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    found.patch.apply(patched)
    for point in line.points:
        between = case.model().eval()
        with torch.no_grad():
            for (name, p), q in zip(between.named_parameters(), patched.parameters(), strict=True):
                p.copy_((base[name].double() + point.strength * (q.double() - base[name].double())).float())
            slack = -float(constraint.violation(between).max())
        expected = compare(model, between, test, batch_size=16)
        tolerance = 0.05 if case.name == "bf16" else 1e-4
        assert point.slack == pytest.approx(slack, abs=tolerance)
        assert abs(point.drawdown.value - expected.drawdown.value) <= (5 if case.name == "bf16" else 1e-9)


def test_the_ends_are_the_base_and_the_patch(case):
    model, constraint, found, test = edited(case)
    line = curve(model, found.patch, constraint, test, strengths=(1.0, 0.0, 1.0))
    assert [p.strength for p in line.points] == [0.0, 1.0]
    assert line.points[0].flips == Flips(0, 0, 0)
    assert line.points[0].drawdown.value == 0
    assert line.points[-1].slack == pytest.approx(-found.violation, abs=1e-5)


def test_kept_is_bound_to_the_base():
    case = zoo.CASES[0]
    model, constraint, found, test = edited(case)
    line = curve(model, found, constraint & Kept(test[0][1:5]), test, strengths=(0.0,))
    assert line.points[0].slack < 0
    assert curve(model, found, Kept(test[0][1:5]), test, strengths=(0.0,)).points[0].slack >= 0


def test_numbers_survive_json():
    model, constraint, found, test = edited(zoo.CASES[0])
    plain = curve(model, found, constraint, test).to_json()
    assert len(plain["points"]) == 11
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


@pytest.mark.parametrize("strengths", [(), (-0.1,), (0.5, 1.5), (float("nan"),)])
def test_strengths_are_checked(strengths):
    model, constraint, found, test = edited(zoo.CASES[0])
    with pytest.raises(InvalidInput, match="0 to 1"):
        curve(model, found, constraint, test, strengths=strengths)


def test_an_empty_patch_has_no_curve():
    case = zoo.CASES[0]
    model = case.model().eval()
    inputs = case.inputs(8)
    with torch.no_grad():
        answers = model(inputs).argmax(1)
    found = wp.edit(model, Classified(inputs[:1], answers[:1]), wp.editors.RMSProp(lr=1e-2))
    with pytest.raises(InvalidInput, match="changes nothing"):
        curve(model, found, Classified(inputs[:1], answers[:1]), (inputs, answers))


def line_of(*slacks: float) -> Curve:
    step = 1 / (len(slacks) - 1)
    nothing = (Estimate(0.0, 0.0, 0.0), Flips(0, 0, 0))
    return Curve(tuple(Point(i * step, slack, *nothing) for i, slack in enumerate(slacks)))


@pytest.mark.parametrize(
    ("slacks", "threshold"),
    [
        ((-1, 1), 0.5),
        ((-3, -1, 1), 0.75),
        ((0, 1), 0.0),
        ((1, -1, 1), 0.75),
        ((-1, 0), 1.0),
        ((-1, -1), None),
        ((1, -1), None),
        ((-1, float("nan")), None),
        ((float("nan"), 1), 1.0),
        ((-float("inf"), 1), 1.0),
    ],
)
def test_threshold(slacks, threshold):
    assert line_of(*slacks).threshold == threshold
