"""Any editor on factors: against LoRA written with torch.optim, and what the rank promises."""

from __future__ import annotations

from dataclasses import dataclass, field
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
from weightpatch.editing import Result
from weightpatch.editors import (
    Adam,
    Auto,
    Bounded,
    Editor,
    Gate,
    GradientDescent,
    IterativeEditor,
    LowRank,
    MinimumNorm,
    Preconditioned,
    Retry,
    RMSProp,
    Shrink,
    Solution,
)
from weightpatch.errors import InvalidInput, NotEditable
from weightpatch.problem import Problem
from weightpatch.statistics import second_moments

SHAPES = {"linear": (7, 5), "wide": (3, 9), "kernel": (6, 2, 3, 3), "bias": (7,), "scalar": ()}


@dataclass(frozen=True)
class Watched(Editor):
    """Notes the problem it is given, and returns what it is told in place of the start."""

    told: dict[str, Tensor] = field(default_factory=dict)
    seen: list[Problem] = field(default_factory=list)

    def run(self, problem: Problem) -> Solution:
        self.seen.append(problem)
        return Solution({**problem.start, **self.told}, 1)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def affine(start: dict[str, Tensor]) -> Problem:
    """A problem whose answers are all of the parameters, each demanded to be another number."""

    def at(params: dict[str, Tensor]) -> Any:
        return lambda x: torch.cat([params[name].reshape(-1) for name in start])[None] * x

    size = sum(value.numel() for value in start.values())
    return Problem(start, at, Within(torch.ones(1, 1), drawn(1, size, seed=9), 0.0))


def starts(seed: int = 0) -> dict[str, Tensor]:
    return {name: drawn(*shape, seed=seed + place) for place, (name, shape) in enumerate(SHAPES.items())}


def rank_of(change: Tensor) -> int:
    return int(torch.linalg.matrix_rank(change.reshape(len(change), -1), rtol=1e-9))


def perceptron(dtype: torch.dtype = torch.float32, width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, width), nn.Tanh(), nn.Linear(width, 96), nn.Tanh(), nn.Linear(96, 10)).to(dtype)


def second(model: nn.Module, inputs: Tensor, margin: float = 0.1) -> Classified:
    with torch.no_grad():
        return Classified(inputs, model(inputs).float().argsort(1, descending=True)[:, 1], margin)


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.sampled_from([GradientDescent(lr=0.01, max_steps=5), RMSProp(lr=0.1, max_steps=3), Adam(lr=0.2, max_steps=4)]),
    st.booleans(),
)
def test_no_change_is_of_higher_rank(seed: int, rank: int, editor: IterativeEditor, vectors: bool):
    start = starts(seed)
    found = LowRank(editor, rank, vectors=vectors).run(affine(start))
    assert found.steps == editor.max_steps
    assert list(found.params) == list(start)
    for name, value in start.items():
        change = found.params[name] - value
        if value.ndim > 1:
            most = min(value.reshape(len(value), -1).shape)
            assert rank_of(change) == min(rank, most)  # an editor of several steps leaves none unused
        else:
            assert bool((change != 0).any()) == vectors


@pytest.mark.parametrize(("kind", "name"), [(torch.optim.SGD, "sgd"), (torch.optim.Adam, "adam")])
def test_it_is_lora(kind: type[torch.optim.Optimizer], name: str):
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 8).double(), drawn(5, 6), drawn(5, 8, seed=1)
    A = drawn(2, 6, seed=0) / 6**0.5  # by the seed that LowRank is given
    left, right = torch.zeros(8, 2, dtype=torch.float64), A.clone()
    left.requires_grad_()
    right.requires_grad_()
    optimiser = kind([left, right], lr=0.05)
    for _ in range(6):
        optimiser.zero_grad()
        answer = F.linear(x, model.weight.detach() + 3.0 / 2 * left @ right, model.bias.detach())
        (answer - y).square().sum().backward()
        optimiser.step()
    editor = {"sgd": GradientDescent, "adam": Adam}[name](lr=0.05, max_steps=6)
    found = wp.edit(model, Within(x, y, 0.0), LowRank(editor, rank=2, alpha=3.0))
    weight = found.patch.result(model.state_dict())["weight"]
    assert torch.allclose(weight, (model.weight + 1.5 * left @ right).detach(), rtol=1e-9, atol=1e-10)


def test_nothing_is_another_bit_before_the_first_step():
    start = {name: value.float() for name, value in starts().items()}
    start["linear"][0, :2] = torch.tensor([-0.0, 0.0])
    watched = Watched()
    for editor in (GradientDescent(max_steps=0), watched):
        found = LowRank(editor, rank=2, vectors=True).run(affine(start))
        for name, value in start.items():
            assert torch.equal(found.params[name].view(torch.int32), value.view(torch.int32)), name
    problem = watched.seen[0]
    assert float(problem.distance(problem.start)) == 0
    assert torch.equal(problem.violation(problem.start), affine(start).violation(start))


@pytest.mark.parametrize("name", ["linear", "wide", "kernel"])
def test_any_target_is_reached_at_full_rank_and_not_below(name: str):
    start = {name: starts()[name]}
    shape = start[name].reshape(len(start[name]), -1).shape
    target = affine(start).constraint.targets
    for rank, reached in ((min(shape), True), (max(shape), True), (min(shape) - 1, False)):
        found = LowRank(GradientDescent(lr=0.03, max_steps=700), rank).run(affine(start))
        assert (float((found.params[name].reshape(-1) - target).abs().max()) < 1e-6) == reached, rank
    best = target.reshape(shape) - start[name].reshape(shape)
    least = torch.linalg.svdvals(best)[-1]  # by Eckart and Young
    rest = (found.params[name].reshape(-1) - target).norm()
    assert float(rest) == pytest.approx(float(least), rel=1e-3)


@pytest.mark.parametrize("case", zoo.CASES, ids=lambda case: case.name)
def test_with_full_rank_it_is_the_editor_itself(case: zoo.Case):
    model = case.model().eval()
    fix, editor = second(model, case.inputs(1)), RMSProp(lr=0.01, max_steps=20)
    plain = wp.edit(model, fix, editor, parameters=case.parameters)
    full = wp.edit(model, fix, LowRank(editor, rank=1000, vectors=True), parameters=case.parameters)
    own = model.state_dict()
    assert (plain.result, plain.steps, plain.violation) == (full.result, full.steps, full.violation)
    one, two = plain.patch.result(own), full.patch.result(own)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_factors_start_as_loras():
    watched = Watched()
    start = {
        "weight": drawn(300, 40, 5, 5, dtype=torch.float32),
        "small": drawn(3, 50),
        "edge": drawn(20, 8),
        "bias": drawn(300),
    }
    problem, matrices = affine(start), ["weight", "small", "edge"]
    LowRank(watched, rank=8, seed=1).run(problem)
    factors = watched.seen[0].start
    assert {name: tuple(value.shape) for name, value in factors.items()} == {
        "weight.left": (300, 8),
        "weight.right": (8, 1000),
        "small": (3, 50),
        "edge": (20, 8),
    }
    assert factors["weight.left"].dtype == factors["weight.right"].dtype == torch.float32
    assert not factors["weight.left"].any()
    A = factors["weight.right"].double()
    assert float(A.var()) == pytest.approx(1 / 1000, rel=0.05)
    assert torch.allclose(A @ A.T, torch.eye(8, dtype=torch.float64), atol=0.2)
    LowRank(watched, rank=8, seed=2).run(problem)
    assert not torch.equal(watched.seen[1].start["weight.right"], factors["weight.right"])
    # so that weight_decay is about ½ ||θ - θ_start||² near the start, at α = r
    B = 0.1 * drawn(300, 8, dtype=torch.float32)
    moved = {**factors, "weight.left": B}
    told = LowRank(Watched({"weight.left": B}), rank=8, alpha=8.0, seed=1).run(problem.part(matrices))
    own = problem.part(matrices).distance(told.params)
    assert float(watched.seen[0].distance(moved)) == pytest.approx(float(own), rel=0.1)


def test_answers_are_differentiable_in_the_factors():
    watched, start = Watched(), {name: value for name, value in starts().items() if value.ndim > 1}
    LowRank(watched, rank=2, alpha=3.0).run(affine(start))
    problem = watched.seen[0]
    names = list(problem.start)
    values = [drawn(*p.shape, seed=place).requires_grad_() for place, p in enumerate(problem.start.values())]
    assert len(values) == 6
    assert torch.autograd.gradcheck(
        lambda *given: problem.violation(dict(zip(names, given, strict=True))) / 100, values, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_patch_is_stored_as_factors_and_still_holds(dtype: torch.dtype, tmp_path):
    model = perceptron(dtype)
    x = drawn(6, 48, dtype=dtype)
    fix = second(model, x)
    found = wp.edit(model, fix, LowRank(Adam(lr=0.01, max_steps=100), rank=2), parameters=("0.weight", "2.*"))
    assert found.result is Result.satisfied
    assert set(found.patch.operations) == {"0.weight", "2.weight"}  # and no bias
    for name, operation in found.patch.operations.items():
        out, fan_in = model.state_dict()[name].shape
        assert operation.kind == "lowrank"
        assert operation.nbytes <= 2 * (out + fan_in) * torch.float32.itemsize, name
    found.patch.save(tmp_path / "fix.patch.safetensors")
    fresh = perceptron(dtype)
    wp.Patch.load(tmp_path / "fix.patch.safetensors").apply(fresh)
    assert fix.satisfied(fresh)
    plain = wp.edit(model, fix, Adam(lr=0.01, max_steps=100), parameters=("0.weight", "2.weight"))
    assert found.patch.nbytes < 0.2 * plain.patch.nbytes


def test_convolutions_are_read_as_patches_read_them():
    case = next(case for case in zoo.CASES if case.name == "resnet")
    model = case.model().eval()
    found = wp.edit(
        model, second(model, case.inputs(1)), LowRank(Adam(lr=0.02, max_steps=100), rank=2), parameters="layer2.*"
    ).raise_for_result()
    weights = {
        name: value for name, value in model.state_dict().items() if name.startswith("layer2") and "conv" in name
    }
    for name, value in weights.items():
        operation = found.patch.operations[name]
        assert operation.kind == "lowrank"
        assert operation.nbytes <= 2 * (len(value) + value[0].numel()) * 4


def test_vectors_move_when_asked():
    model = perceptron()
    fix = second(model, drawn(4, 48, dtype=torch.float32))
    for vectors in (False, True):
        editor = LowRank(Adam(lr=0.01, max_steps=50), rank=2, vectors=vectors)
        found = wp.edit(model, fix, editor, parameters="2.*").raise_for_result()
        assert ("2.bias" in found.patch.operations) == vectors
    with pytest.raises(NotEditable, match="vectors=True"):
        wp.edit(model, fix, LowRank(Adam()), parameters="*.bias")
    biases = LowRank(Adam(lr=0.05, max_steps=100), vectors=True)
    assert wp.edit(model, second(model, drawn(1, 48, dtype=torch.float32)), biases, parameters="*.bias").steps > 0


def test_what_is_kept_weighs_in_the_whole_models_answers():
    model, x, kept = perceptron(), drawn(1, 48, dtype=torch.float32), drawn(64, 48, seed=3, dtype=torch.float32)
    fix, keep = second(model, x, 1.0), wp.Locality(kept, judge=wp.Locality(kept))  # all of it is searched on
    free, held = (
        wp.edit(
            model,
            fix,
            LowRank(Adam(lr=3e-3, max_steps=300, keep_weight=weight), rank=2),
            keep=keep,
            parameters="2.weight",
        ).raise_for_result()
        for weight in (0.0, 1000.0)
    )
    assert held.drift < 0.7 * free.drift
    watched = Watched({"2.weight.left": drawn(96, 2, dtype=torch.float32)})
    found = wp.edit(model, fix, LowRank(watched, rank=2), keep=keep, parameters="2.weight")
    inner = watched.seen[0]
    assert float(inner.drift({**inner.start, **watched.told})) == pytest.approx(found.drift, rel=1e-4)
    assert float(inner.drift(inner.start)) == 0


def test_weight_decay_pulls_the_change_to_nothing():
    start = starts()
    sizes = []
    for decay in (0.0, 3.0, 100.0):
        found = LowRank(GradientDescent(lr=5e-3, max_steps=300, weight_decay=decay), rank=2).run(affine(start))
        sizes.append(sum(float((found.params[name] - value).square().sum()) for name, value in start.items()))
    assert sizes[0] > 1.2 * sizes[1] > 1.2 * sizes[2]
    assert sizes[2] < 0.01 * sizes[0]


def test_wrappers_go_inside_and_outside():
    model = perceptron()
    fix = second(model, drawn(3, 48, dtype=torch.float32))
    adam = Adam(lr=0.01, max_steps=100)
    plain = wp.edit(model, fix, LowRank(adam, rank=2), parameters="2.weight").raise_for_result()
    for editor in (
        Shrink(LowRank(adam, rank=2)),
        LowRank(Shrink(adam), rank=2),
        LowRank(Retry((GradientDescent(lr=1e-9, max_steps=1), adam)), rank=2),
        LowRank(Bounded(adam, radius=0.2), rank=2),
        LowRank(MinimumNorm(), rank=2),
    ):
        found = wp.edit(model, fix, editor, parameters="2.weight").raise_for_result()
        operation = found.patch.operations["2.weight"]
        assert operation.kind == "lowrank"
        assert operation.left.shape[1] <= 2
        assert found.certificate is None  # what is optimal among factors is not among weights
        if "Shrink" in repr(editor):
            assert plain.violation < found.violation <= 0


def test_a_contradiction_among_factors_is_not_called_one():
    """With A as it starts, where B alone moves at first, these demands contradict each other; with another not."""
    torch.manual_seed(0)
    model = nn.Linear(6, 6, bias=False).double()
    x = torch.stack([drawn(6), drawn(6, seed=1)])
    answer = model(x).detach()
    fix = Within(x, answer + torch.tensor([[1.0], [-1.0]]).double(), tolerance=1e-3)
    found = wp.edit(model, fix, LowRank(MinimumNorm(), rank=1))
    assert found.result is Result.stalled
    assert found.certificate is None
    assert wp.edit(model, fix, LowRank(Adam(lr=0.03, max_steps=500), rank=1)).result is Result.satisfied


def test_rates_by_names_are_those_of_the_factors():
    model = perceptron()
    fix = second(model, drawn(2, 48, dtype=torch.float32))
    rates = {"2.weight.left": 0.02, "2.weight.right": 0.0}
    found = wp.edit(model, fix, LowRank(Adam(lr=rates, max_steps=100), rank=2), parameters="2.*").raise_for_result()
    right = found.patch.operations["2.weight"].right
    A = drawn(2, 128) / 128**0.5  # which did not move: the change lies in its rows
    assert float(torch.linalg.lstsq(A.T, right.double().T).residuals.sum()) < 1e-6 * float(right.square().sum())
    with pytest.raises(InvalidInput, match="2.weight.left"):
        wp.edit(model, fix, LowRank(Shrink(Adam(lr={"2.weight": 0.02})), rank=2), parameters="2.*")


def metric_of(model: nn.Module) -> Any:
    return second_moments(model, drawn(20, 48, dtype=torch.float32)).metric()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda metric: LowRank(Preconditioned(metric=metric)), "metric or gate"),
        (lambda metric: LowRank(Shrink(MinimumNorm(metric=metric))), "metric or gate"),
        (lambda metric: LowRank(Retry((Adam(), Bounded(Preconditioned(metric=metric), 0.1)))), "metric or gate"),
        (lambda metric: LowRank(Gate("4")), "metric or gate"),
        (lambda metric: LowRank(Shrink(Gate("4"))), "metric or gate"),
        (lambda metric: LowRank(Auto.late(metric)), "metric or gate"),
        (lambda metric: LowRank("Adam"), "expected an editor"),
        (lambda metric: LowRank(Adam(), rank=0), "rank"),
        (lambda metric: LowRank(Adam(), rank=1.5), "rank"),
        (lambda metric: LowRank(Adam(), alpha=0.0), "alpha"),
        (lambda metric: LowRank(Adam(), alpha=float("nan")), "alpha"),
        (lambda metric: LowRank(Adam(), seed="1"), "seed"),
    ],
)
def test_bad_settings_are_refused(make, said: str):
    with pytest.raises(InvalidInput, match=said):
        make(metric_of(perceptron()))


def test_its_repr_can_be_pasted_back():
    editor = LowRank(Shrink(Adam(lr=0.5)), rank=3, vectors=True)
    assert eval(repr(editor)) == editor
