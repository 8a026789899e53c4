from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import zoo
from test_contract import mistake
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Constraint, Kept, Within
from weightpatch.editing import Result
from weightpatch.editors import Editor, GradientDescent, RMSProp, Shrink, Solution
from weightpatch.errors import EditFailed, InvalidInput
from weightpatch.problem import Problem

RESNET = zoo.CASES[1]


def test_max_steps_zero_means_none():
    model = RESNET.model()
    found = wp.edit(model, mistake(model, RESNET.inputs(1)), RMSProp(max_steps=0), parameters="fc.*")
    assert found.result is Result.stalled
    assert found.steps == 0
    assert "at least one step" in found.result.value


def test_the_editor_stops_at_the_first_step_that_holds():
    """Against the paper's recursion written out naively on a copy."""
    model = RESNET.model().eval()
    fix = mistake(model, RESNET.inputs(1), margin=0.5)
    found = wp.edit(model, fix, GradientDescent(lr=0.05, max_steps=100), parameters="layer2.1.*")
    naive = RESNET.model().eval()
    moving = {n: p for n, p in naive.named_parameters() if n.startswith("layer2.1.")}
    steps = 0
    while float(loss := fix.violation(naive).relu().sum()) > 0:
        grads = torch.autograd.grad(loss, list(moving.values()))
        with torch.no_grad():
            for p, g in zip(moving.values(), grads, strict=True):
                p -= 0.05 * g
        steps += 1
    assert found.steps == steps > 1
    found.patch.apply(model)
    for (name, a), b in zip(model.named_parameters(), naive.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_editing_runs_in_eval_mode_while_the_model_trains():
    """Dropout would make the answer random, and BatchNorm's statistics would move."""
    model = RESNET.model().train()
    fix = mistake(RESNET.model(), RESNET.inputs(2))
    a = wp.edit(model, fix, parameters="layer2.*")
    b = wp.edit(RESNET.model().eval(), fix, parameters="layer2.*")
    assert a.patch.id == b.patch.id
    assert model.training


def test_keep_weight_trades_drift_for_steps():
    model = RESNET.model()
    fix, keep = mistake(model, RESNET.inputs(1), margin=1.0), wp.Locality(RESNET.inputs(64))
    free = wp.edit(model, fix, RMSProp(lr=1e-3, max_steps=300), keep=keep, parameters="layer2.*")
    held = wp.edit(model, fix, RMSProp(lr=1e-3, max_steps=300, keep_weight=30.0), keep=keep, parameters="layer2.*")
    assert free.result is held.result is Result.satisfied
    assert held.drift < free.drift


def test_weight_decay_pulls_to_the_start():
    model = RESNET.model()
    fix = mistake(model, RESNET.inputs(1), margin=100.0)
    far = wp.edit(model, fix, GradientDescent(lr=0.01, max_steps=20), parameters="fc.*")
    near = wp.edit(model, fix, GradientDescent(lr=0.01, max_steps=20, weight_decay=20.0), parameters="fc.*")

    def moved(found: wp.Edit) -> float:
        base = {n: p.detach() for n, p in model.named_parameters()}
        return sum(float((p - base[n]).square().sum()) for n, p in found.patch.result(base).items())

    assert moved(near) < 0.5 * moved(far)


def test_keep_weight_without_keep_is_refused():
    model = RESNET.model()
    with pytest.raises(InvalidInput, match="keep=wp.Locality"):
        wp.edit(model, mistake(model, RESNET.inputs(1)), RMSProp(keep_weight=1.0), parameters="fc.*")


def test_shrink_finds_the_smallest_step_that_holds():
    model = RESNET.model().eval()
    fix, keep = mistake(model, RESNET.inputs(1)), wp.Locality(RESNET.inputs(64))
    bold = GradientDescent(lr=1.0, max_steps=50)
    full = wp.edit(model, fix, bold, keep=keep, parameters="fc.*")
    small = wp.edit(model, fix, Shrink(bold, halvings=16), keep=keep, parameters="fc.*")
    assert small.result is Result.satisfied
    assert small.drift < full.drift
    base = {n: p.detach() for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, value in small.patch.result(base).items():
            model.get_parameter(name).copy_(torch.lerp(base[name].clone(), value, 0.995))
    assert not fix.satisfied(model)


def test_an_unsatisfied_edit_is_a_value_with_advice():
    model = RESNET.model()
    found = wp.edit(model, mistake(model, RESNET.inputs(1), margin=1e6), RMSProp(lr=1e-4), parameters="fc.*")
    assert found.result is Result.unsatisfied
    assert found.violation > 0
    with pytest.raises(EditFailed, match="larger learning rate"):
        found.raise_for_result()


def test_a_runaway_edit_is_non_finite_and_has_no_patch():
    model = RESNET.model()
    found = wp.edit(model, mistake(model, RESNET.inputs(1)), GradientDescent(lr=3e38), parameters="layer2.*")
    assert found.result is Result.nonfinite
    assert found.patch is None
    assert "smaller learning rate" in found.result.value


def test_joint_constraints_hold_together():
    model = RESNET.model()
    inputs = RESNET.inputs(12)
    fix = mistake(model, inputs[:2]) & Kept(inputs[2:])
    found = wp.edit(model, fix, RMSProp(lr=1e-3, max_steps=500), parameters="layer2.*").raise_for_result()
    answers = model.eval()(inputs).argmax(1)
    found.patch.apply(model)
    assert torch.equal(model(inputs[2:]).argmax(1), answers[2:])
    assert fix.parts[0].satisfied(model)
    assert found.patch.manifest.constraint == "Classified & Classified"


def test_a_regression_is_edited_within_a_tolerance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    fix = Within(torch.randn(2, 3), torch.tensor([[2.0], [-2.0]]), tolerance=1e-4)
    found = wp.edit(model, fix, GradientDescent(lr=0.05, max_steps=500), parameters="2.*").raise_for_result()
    found.patch.apply(model)
    assert fix.satisfied(model)


def test_a_constraint_of_ones_own_is_a_few_lines():
    class Below(Constraint):
        def __init__(self, inputs: Tensor, limit: float) -> None:
            self.inputs, self.limit = inputs, limit

        def violation(self, function) -> Tensor:
            return function(self.inputs).amax(1) - self.limit

    model = RESNET.model().eval()
    fix = Below(RESNET.inputs(3), -0.5)
    assert not fix.satisfied(model)
    wp.edit(model, fix, GradientDescent(lr=0.1, max_steps=200), parameters="fc.*").raise_for_result().patch.apply(model)
    assert fix.satisfied(model)


def test_an_editors_word_is_not_taken():
    class Liar(Editor):
        def run(self, problem: Problem) -> Solution:
            return Solution(problem.start, 3)

    model = RESNET.model()
    assert wp.edit(model, mistake(model, RESNET.inputs(1)), Liar(), parameters="fc.*").result is Result.stalled


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_editing_works_inside_no_grad_and_inference_mode(mode):
    model = RESNET.model()
    fix = mistake(model, RESNET.inputs(1))
    with mode():
        found = wp.edit(model, fix, parameters="layer2.*")
    assert found.result is Result.satisfied


def test_a_second_edit_can_be_made_on_a_patched_model():
    model = RESNET.model().eval()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = mistake(model, RESNET.inputs(3)[:1]), mistake(model, RESNET.inputs(3)[1:2])
    first = wp.edit(model, one, parameters="layer2.*").raise_for_result().patch
    first.apply(model)
    second = wp.edit(model, one & two, parameters="fc.*").raise_for_result().patch
    assert second.manifest.requires == second.manifest.context == (first.id,)
    second.apply(model)
    assert (one & two).satisfied(model)
    second.revert(model)
    first.revert(model)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


def test_randomness_inside_the_model_does_not_touch_the_callers_generators():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            random.random()
            np.random.rand()
            return self.fc(x) + 1e-6 * torch.randn(len(x), 5)

    torch.manual_seed(0)
    model = Noisy()
    fix = mistake(model, torch.randn(1, 6))
    untouched = zoo.digest(model)
    assert wp.edit(model, fix, parameters="fc.*").result is Result.satisfied
    assert zoo.digest(model) == untouched


def test_a_repr_says_what_matters():
    model = RESNET.model()
    found = wp.edit(model, mistake(model, RESNET.inputs(1)), keep=wp.Locality(RESNET.inputs(4)), parameters="fc.*")
    assert repr(found).startswith("Edit(satisfied, steps=")
    assert "drift=" in repr(found)
    assert repr(found).endswith("B)")
