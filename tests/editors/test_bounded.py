"""FT-L: no parameter goes further than the bound, and Editable Training goes through it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, Within
from weightpatch.editing import Result, solve
from weightpatch.editors import (
    Adam,
    Bounded,
    GradientDescent,
    IterativeEditor,
    Momentum,
    Preconditioned,
    RMSProp,
    RProp,
    ScaledGradientDescent,
    Shrink,
)
from weightpatch.errors import InvalidInput
from weightpatch.network import Network
from weightpatch.statistics import second_moments

EDITORS = (GradientDescent, ScaledGradientDescent, RProp, RMSProp, Momentum, Adam)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def perceptron(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def out_of_reach(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> Classified:
    x = drawn(2, 4, seed=seed, dtype=dtype)
    return Classified(x, (model(x).float().argmax(1) + 1) % 3, margin=1000.0)


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from(EDITORS),
    st.sampled_from(DTYPES),
    st.floats(1e-4, 1.0),
    st.floats(1e-3, 10.0),
    st.integers(1, 6),
)
def test_the_bound_is_kept_to_the_models_rounding(seed: int, kind, dtype, radius: float, lr: float, steps: int):
    model = perceptron(seed % 100, dtype)
    fix, editor = out_of_reach(model, dtype, seed), Bounded(kind(lr=lr, max_steps=steps), radius)
    solved = solve(Network(model), fix, editor)
    assert solved.steps == steps
    own, finest = model.state_dict(), torch.finfo(dtype)
    for name, value in solved.params.items():
        moved = (value.double() - own[name].double()).abs()
        half = finest.eps / 2 * (own[name].double().abs() + radius) + finest.smallest_normal * finest.eps
        working = max(finest.eps, torch.finfo(torch.float32).eps) if dtype != torch.float64 else finest.eps
        assert (moved <= radius + half + working * (own[name].double().abs() + radius)).all(), name
    composed = wp.edit(model, fix, editor).patch.result(own)  # low rank may be 8 steps off, at a tensor's scale
    for name, value in composed.items():
        scale = float(own[name].double().abs().max()) + radius
        assert float((value.double() - own[name].double()).abs().max()) <= radius + 9 * finest.eps * scale, name


def test_the_bound_is_reached_and_each_step_is_the_editors_own():
    """Against the loop written out: step, then clamp."""
    torch.manual_seed(0)
    model, radius = nn.Linear(5, 3).double(), 0.15
    x, y = drawn(4, 5), drawn(4, 3, seed=1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    inner = Momentum(lr=0.01, max_steps=8)
    params, state = dict(start), inner.init(start)
    for _ in range(8):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss = (F.linear(x, leaves["weight"], leaves["bias"]) - y).square().sum()
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        params, state = inner.step(params, grads, state)
        params = {n: torch.minimum(torch.maximum(p, start[n] - radius), start[n] + radius) for n, p in params.items()}
    found = solve(Network(model), Within(x, y, 0.0), Bounded(inner, radius)).params
    moved = torch.cat([(found[name] - value).reshape(-1).abs() for name, value in start.items()])
    assert 3 < int((moved > radius - 1e-12).sum()) < len(moved)  # else this test shows nothing
    assert all(torch.allclose(found[name], params[name], rtol=1e-10, atol=1e-12) for name in start)


@pytest.mark.parametrize("case", zoo.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", EDITORS)
def test_without_a_bound_it_is_the_editor_itself(kind, case: zoo.Case):
    model = case.model().eval()
    with torch.no_grad():
        top = model(case.inputs(1)).float().argsort(1, descending=True)[:, 1]
    fix, editor = Classified(case.inputs(1), top, 0.1), kind(max_steps=6, keep_weight=1.0, weight_decay=0.1)
    network, keep = Network(model, case.parameters), wp.Locality(case.inputs(4))
    plain = solve(network, fix, editor, keep)
    for radius in (float("inf"), 1e30):
        bounded = solve(network, fix, Bounded(editor, radius), keep)
        assert (plain.result, plain.steps, plain.after) == (bounded.result, bounded.steps, bounded.after)
        assert all(torch.equal(plain.params[name], bounded.params[name]) for name in plain.params)


def test_a_bound_that_leaves_no_room_ends_unsatisfied():
    model = perceptron()
    x = drawn(1, 4)
    fix = Classified(x, (model(x).argmax(1) + 1) % 3, margin=0.1)
    editor = Adam(lr=0.05, max_steps=100)
    assert wp.edit(model, fix, Bounded(editor, radius=1e-4)).result is Result.unsatisfied
    assert wp.edit(model, fix, Bounded(editor, radius=1.0)).result is Result.satisfied
    half = perceptron(dtype=torch.float16)
    near = Classified(x.half(), (half(x.half()).argmax(1) + 1) % 3, margin=0.1)
    assert wp.edit(half, near, Bounded(editor, radius=1e-9), parameters="2.weight").result is Result.stalled


def test_an_editor_that_diverges_is_held():
    model = perceptron()
    fix = Within(drawn(2, 4), drawn(2, 3, seed=1), 0.0)
    assert wp.edit(model, fix, GradientDescent(lr=1e200, max_steps=5)).result is Result.nonfinite
    found = wp.edit(model, fix, Bounded(GradientDescent(lr=1e200, max_steps=5), radius=0.1))
    assert found.result is Result.unsatisfied


@pytest.mark.parametrize("way", [{}, {"graph_bytes": 0.0}], ids=["graph", "adjoint"])
@pytest.mark.parametrize("inner", [GradientDescent(lr=0.1), Momentum(lr=0.1), RMSProp(lr=0.03)], ids=repr)
def test_editable_training_goes_through_the_bound(inner: IterativeEditor, way: dict):
    model = perceptron()
    x, y = drawn(12, 4), torch.arange(12) % 3
    fix = Classified(x[:1], (model(x[:1]).argmax(1) + 1) % 3, margin=2.0)
    editor = Bounded(replace(inner, max_steps=4), radius=0.05)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("2.")}
    moved = solve(Network(model, "2.*"), fix, editor).params
    change = torch.cat([(moved[name] - value).reshape(-1).abs() for name, value in start.items()])
    assert 3 < int((change > 0.05 - 1e-12).sum()) < len(change)  # some are at the edge, some are not
    objective = wp.EditableObjective(model, editor, parameters="2.*", c_edit=0.7, c_loc=0.3, **way)

    def value() -> Tensor:
        return objective(fix, keep=wp.Locality(x), batch=(x, y))

    grads = torch.autograd.grad(value(), list(model.parameters()))
    reference = reference_of(model, objective, fix, x, y)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        flat = parameter.data.view(-1)
        for i in range(0, len(flat), 4):
            kept, ends = float(flat[i]), []
            for step in (1e-6, -1e-6):
                flat[i] = kept + step
                ends.append(reference())
            flat[i] = kept
            assert float(grad.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)


def reference_of(model: nn.Module, objective: Any, fix: Classified, x: Tensor, y: Tensor) -> Any:
    """The objective's value by the plain editor, with the reference of its locality term held where it is now."""
    with torch.no_grad():
        before = model(x).log_softmax(1)

    def value() -> float:
        found = solve(Network(model, "2.*"), fix, objective.editor)
        with torch.no_grad():
            edited = lambda inputs: torch.func.functional_call(model, found.params, (inputs,))  # noqa: E731
            drift = (before.exp() * (before - edited(x).log_softmax(1))).sum(1).mean()
            loss = F.cross_entropy(model(x), y) + 0.7 * fix.violation(edited).relu().mean() + 0.3 * drift
        return float(loss)

    return value


def test_training_may_change_and_learn_its_settings():
    model = perceptron()
    x, y = drawn(8, 4), torch.arange(8) % 3
    editor = Bounded(GradientDescent(lr=0.1, max_steps=5), radius=0.1)
    shorter = replace(editor, max_steps=2, lr=0.5)
    assert (shorter.max_steps, shorter.editor.max_steps) == (2, 2)
    assert (shorter.lr, shorter.editor.lr, shorter.radius) == (0.5, 0.5, 0.1)
    objective = wp.EditableObjective(model, editor, parameters="2.*", learn=("lr",))
    fix = Classified(x[:1], (model(x[:1]).argmax(1) + 1) % 3, margin=1.0)
    objective(fix, batch=(x, y)).backward()
    assert objective.rates.lr.grad.abs().sum() > 0
    settled = objective.settled_editor()
    assert settled.editor.lr == settled.lr
    assert settled.lr == pytest.approx({"2.weight": 0.1, "2.bias": 0.1})


def test_directions_are_those_of_the_editor():
    model = perceptron()
    x = drawn(20, 4)
    metric = second_moments(model, x, parameters="2.*").metric()
    fix = Classified(x[:1], (model(x[:1]).argmax(1) + 1) % 3, margin=0.1)
    plain = Preconditioned(metric=metric, max_steps=20)
    one, two = (solve(Network(model, "2.*"), fix, e) for e in (plain, Bounded(plain, float("inf"))))
    assert one.result is Result.satisfied
    assert all(torch.equal(one.params[name], two.params[name]) for name in one.params)


def test_a_shrunk_edit_stays_within_the_bound():
    model = perceptron()
    x = drawn(1, 4)
    fix = Classified(x, (model(x).argmax(1) + 1) % 3, margin=0.1)
    found = wp.edit(model, fix, Shrink(Bounded(Adam(lr=0.1, max_steps=50), radius=0.3))).raise_for_result()
    own = model.state_dict()
    assert all(float((v - own[name]).abs().max()) <= 0.3 + 1e-12 for name, v in found.patch.result(own).items())


def test_an_editor_of_ones_own_can_be_bounded():
    @dataclass(frozen=True, kw_only=True)
    class Constant(IterativeEditor):
        lr: float = 1.0

        def init(self, params):
            return 0

        def step(self, params, grads, state):
            return {name: p + self.lr for name, p in params.items()}, state + 1

    model = perceptron()
    found = solve(Network(model), out_of_reach(model, torch.float64), Bounded(Constant(max_steps=3), 0.25))
    assert all(torch.equal(found.params[name], p.detach() + 0.25) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Bounded(Shrink(Adam()), 0.1), "IterativeEditor"),
        (lambda: Bounded("Adam", 0.1), "IterativeEditor"),
        (lambda: Bounded(Adam(), 0.0), "radius"),
        (lambda: Bounded(Adam(), -1.0), "radius"),
        (lambda: Bounded(Adam(), float("nan")), "radius"),
        (lambda: Bounded(Adam(), "small"), "radius"),
        (lambda: Bounded(Adam(), 0.1, lr=-1.0), "lr"),
        (lambda: Bounded(Adam(), 0.1, max_steps=1.5), "max_steps"),
    ],
)
def test_bad_settings_are_refused(make, said: str):
    with pytest.raises(InvalidInput, match=said):
        make()


def test_its_repr_can_be_pasted_back():
    editor = Bounded(Adam(lr=0.5, keep_weight=2.0), radius=0.01, max_steps=7)
    assert eval(repr(editor)) == editor
    assert eval(repr(editor)).max_steps == 7
