"""Every kind of answer, compared and evaluated, with the right values by hand in numpy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from answers import ANSWERS, SCALED, Answers, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.evaluation import Comparison, comparison_page, curve
from weightpatch.evaluation import predictor as predictors
from weightpatch.evaluation.judging import Asked
from weightpatch.evaluation.predictor import Drift, FastPredictor, SlowPredictor
from weightpatch.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Of
from weightpatch.network import Network

KINDS = pytest.mark.parametrize("answers", ANSWERS, ids=lambda a: a.name)


@dataclass(frozen=True)
class Told:
    """What is right of two outputs and targets, by hand."""

    counts: np.ndarray
    errors: tuple[float, float]
    changed: np.ndarray
    worse: list[int]
    better: list[int]
    other: list[int]
    kl: float


def by_hand(answers: Answers, before: Tensor, after: Tensor, targets: Tensor) -> Told:
    a, b, y = (part.double().numpy() for part in (before, after, targets))
    losses = [answers.wrong(z, y) for z in (a, b)]
    counts = ~np.isnan(losses[0])
    changed = answers.changed(a, b) & counts
    items, n = changed.reshape(len(a), -1).any(1), len(a)
    sums = [np.where(counts, loss, 0).reshape(n, -1).sum(1) for loss in losses]
    moved = [(i, float(sums[1][i] - sums[0][i])) for i in range(n) if items[i]]
    return Told(
        counts,
        tuple(answers.figure(loss[counts].mean()) for loss in losses),  # type: ignore[arg-type]
        changed,
        [i for i, d in moved if d > 1e-12],
        [i for i, d in moved if d < -1e-12],
        [i for i, d in moved if abs(d) <= 1e-12],
        float(answers.divergence(a, b)[counts].mean()),
    )


@KINDS
def test_a_comparison_of_every_kind_of_answer(answers: Answers, tmp_path: Path) -> None:
    model, other, x = answers.model(), answers.model(), answers.items(40)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        before, after = model(x), other(x)
    targets = answers.targets(before)
    column = ["even" if i % 2 == 0 else "odd" for i in range(40)]
    found = wp.compare(model, other, (x, targets), likelihood=answers.likelihood, batch_size=9, slices={"row": column})
    right = by_hand(answers, before, after, targets)
    assert right.worse and right.changed.any()
    assert (found.error_before, found.error_after) == pytest.approx(right.errors, rel=1e-5)
    assert found.drawdown.value == pytest.approx(right.errors[1] - right.errors[0], rel=1e-4, abs=1e-9)
    assert found.drawdown.low < found.drawdown.value < found.drawdown.high
    assert [sorted(part.tolist()) for part in (found.broken, found.repaired, found.other)] == [
        right.worse,
        right.better,
        right.other,
    ]
    assert (found.n, found.positions) == (right.counts.reshape(40, -1).any(1).sum(), right.counts.sum())
    assert found.positions_changed == right.changed.sum()
    assert found.kl == pytest.approx(right.kl, rel=1e-5)
    rows = found.by_slice
    assert [row.label for row in rows] == ["row = even", "row = odd"] and sum(row.n for row in rows) == found.n
    half = by_hand(answers, before[::2], after[::2], targets[::2])
    assert (rows[0].error_before, rows[0].error_after) == pytest.approx(half.errors, rel=1e-5)
    assert rows[0].flips.broken == len(half.worse)
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert found.likelihood.error_name in repr(found)
    page = comparison_page(tmp_path / "diff.html", found, title="a", inputs=x).read_text()
    assert f"{found.likelihood.error_name} went from" in page and f"row {int(found.flipped[0])}" in page


@KINDS
def test_equal_models_differ_in_nothing(answers: Answers) -> None:
    model, x = answers.model(), answers.items(40)
    with torch.no_grad():
        targets = answers.targets(model(x))
    found = wp.compare(model, model, (x, targets), likelihood=answers.likelihood)
    assert found.flips.total == found.positions_changed == found.kl == found.drawdown.value == 0
    assert found.drawdown.low <= 0 <= found.drawdown.high
    assert (found.drawdown.high > 0) == found.likelihood.discrete  # no change in so few is no proof of none
    assert found.harm.abs().max() == 0 and found.shift.abs().max() == 0


@KINDS
@pytest.mark.parametrize("rough", [False, True])
def test_the_fast_answers_are_those_of_full_passes(
    answers: Answers, rough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rough:
        for name, value in (("_SCREENED", 0), ("_GAIN", math.inf), ("_NEGLIGIBLE", -1.0), ("_SAMPLE", 10)):
            monkeypatch.setattr(predictors, name, value)
    model, x = answers.model(), answers.items(61)
    with torch.no_grad():
        targets = answers.targets(model(x))
    asked = Asked(targets, answers.likelihood)
    for parameters in ("*", "2.*" if hasattr(model, "2") else "head.*"):
        network = Network(model, parameters)
        fast = FastPredictor(model, network, x, 16, asked=asked)
        slow = SlowPredictor(model, network, x, 16, asked=asked)
        assert fast.untraced_because == "" and fast.likelihood == slow.likelihood
        for seed, scale in enumerate((0.0, 0.01, 0.1, 1.0)):
            random = torch.Generator().manual_seed(seed)
            moved = {n: p + scale * torch.randn(p.shape, generator=random) for n, p in network.start.items()}
            ours, theirs = (one.predict(network.rounded(moved)) for one in (fast, slow))
            judge = fast.likelihood
            assert torch.equal(judge.changed(fast.base, ours.outputs), judge.changed(slow.base, theirs.outputs))
            ours_lost, lost = judge.loss(ours.outputs, targets), judge.loss(theirs.outputs, targets)
            if judge.discrete:
                assert torch.equal(ours_lost.nan_to_num(-1), lost.nan_to_num(-1))
            assert torch.allclose(ours_lost, lost, rtol=1e-4, atol=1e-6, equal_nan=True)
            exact = fast.drift_items == slow.drift_items
            assert ours.drift == pytest.approx(theirs.drift, rel=1e-4 if exact else 0.1, abs=1e-7 if exact else 5e-3)


@KINDS
def test_an_evaluation_of_every_kind_of_answer(answers: Answers) -> None:
    model, x = answers.model(), answers.items(50)
    with torch.no_grad():
        base = model(x)
    targets = answers.targets(base)
    edit = Moved(x[:1], 0.3)
    editor = wp.editors.GradientDescent(lr=0.05, max_steps=20)
    report = wp.evaluate(model, [edit], editor, test=(x, targets), likelihood=answers.likelihood, progress=False)
    found = wp.edit(model, edit, editor, remember=False)
    assert found.patch is not None
    with found.patch.applied(model), torch.no_grad():
        after = model(x)
    right = by_hand(answers, base, after, targets)
    impact = report.rows[0].impact
    assert impact is not None and right.changed.any()
    assert (report.base_error, impact.error) == pytest.approx(right.errors, rel=1e-4)
    flips = impact.flips
    assert (flips.broken, flips.repaired, flips.other) == (len(right.worse), len(right.better), len(right.other))
    assert impact.drift == pytest.approx(right.kl, rel=1e-3, abs=1e-7)
    share = right.changed.sum() / right.counts.sum()
    assert impact.changed is None if right.changed.ndim == 1 else impact.changed == pytest.approx(share)
    assert wp.Report.from_json(report.to_json()) == report
    assert report.error_name in str(report) and report.unit in ("", "%")
    line = curve(model, found, edit, (x, targets), strengths=(1.0,), likelihood=answers.likelihood)
    assert line.points[0].drawdown.value == pytest.approx(right.errors[1] - right.errors[0], rel=1e-3, abs=1e-6)


@dataclass(frozen=True, eq=False)
class Moved(wp.constraints.Constraint):
    """Ask that the first output of the first position rises, whatever outputs mean."""

    inputs: Tensor
    by: float

    def bind(self, function):  # type: ignore[no-untyped-def]
        return self

    def violation(self, function):  # type: ignore[no-untyped-def]
        return self.by + 1 - function(self.inputs).reshape(1, -1)[:, 0]


def test_groups_are_classes_tags_and_outputs() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 90, 3, generator=g)
    y = torch.randint(-1, 3, (90,), generator=g)
    y[y < 0] = -100
    for label, row in enumerate(Comparison(a, b, y).groups):
        mine = y == label
        was, now = a[mine].argmax(1), b[mine].argmax(1)
        assert (row.label, row.n) == (label, int(mine.sum()))
        assert row.error_after == pytest.approx(100 * float((now != label).double().mean()))
        assert row.flips.broken == int(((was == label) & (now != label)).sum())
        assert row.flips.total == int((was != now).sum())
    tags = torch.randint(-1, 2, (90, 3), generator=g)
    tags[tags < 0] = -100
    for k, row in enumerate(Comparison(a, b, tags, Bernoulli(Of.logits)).groups):
        asked = tags[:, k] >= 0
        was, now = ((z[asked, k] > 0).long() == tags[asked, k] for z in (a, b))
        assert (row.n, row.flips.broken, row.flips.repaired) == (
            int(asked.sum()), int((was & ~now).sum()), int((now & ~was).sum())
        )  # fmt: skip
        assert row.error_before == pytest.approx(100 * float((~was).double().mean()))
    numbers = torch.randn(90, 3, generator=g)
    for k, row in enumerate(Comparison(a, b, numbers, SCALED).groups):
        off = [(z[:, k].double() - numbers[:, k]) for z in (a, b)]
        assert row.error_after == pytest.approx(float(off[1].square().mean().sqrt()))
        far = (a[:, k] - b[:, k]).abs() > 0.1
        assert row.flips.total == int(far.sum())
        assert row.flips.broken == int((far & (off[1].abs() > off[0].abs())).sum())
    told = Comparison(a, b, numbers, SCALED).to_json()["residuals"]["after"]
    assert told["quantiles"]["0.5"] == pytest.approx(np.median((b - numbers).numpy()), abs=1e-6)


def test_the_interval_of_numbers_covers_as_often_as_it_says() -> None:
    random, hits = np.random.default_rng(0), 0
    for _ in range(200):
        y, a, b = random.normal(size=(3, 120, 1))
        found = Comparison(*(torch.tensor(v) for v in (y + 0.5 * a, y + 0.5 * a + 0.3 * b, y)), Gaussian(1.0, 0.1))
        hits += found.drawdown.low <= math.hypot(0.5, 0.3) - 0.5 <= found.drawdown.high
    assert 0.9 <= hits / 200 <= 0.985


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["tags", "numbers"]))
def test_swapping_the_models_swaps_worse_and_better(seed: int, kind: str) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b, y = torch.randn(3, 40, 3, generator=g)
    likelihood: Likelihood = SCALED if kind == "numbers" else Bernoulli(Of.logits)
    targets = y if kind == "numbers" else (y > 0).long()
    one, other = Comparison(a, b, targets, likelihood), Comparison(b, a, targets, likelihood)
    assert sorted(one.broken.tolist()) == sorted(other.repaired.tolist())
    assert one.drawdown.value == pytest.approx(-other.drawdown.value)
    assert one.drawdown.low == pytest.approx(-other.drawdown.high)
    assert torch.allclose(one.harm, -other.harm)
    assert one.harm[one.broken].tolist() == sorted(one.harm[one.broken].tolist(), reverse=True)


@pytest.mark.parametrize("likelihood", [Bernoulli(Of.logits), SCALED], ids=["tags", "numbers"])
def test_nan_is_wrong_and_changed(likelihood: Likelihood) -> None:
    before, targets = torch.tensor([[1.0, -1.0]] * 3), torch.tensor([[1.0, 0.0]] * 3)
    after = before.clone()
    after[1, 0] = torch.nan
    found = Comparison(before, after, targets, likelihood)
    assert found.broken.tolist() == [1] and found.flips.total == 1
    assert found.error_after == (pytest.approx(100 / 6) if likelihood.discrete else math.inf)
    assert json.dumps(found.to_json(), allow_nan=False)


class Steps(Likelihood):
    """Angles in degrees: one of a user's own, which says neither margin nor reach."""

    unit = "°"

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        return 1 - torch.cos(torch.deg2rad(after - before))[..., 0]

    def answer(self, outputs: Tensor) -> Tensor:
        return (outputs[..., 0] / 30).round() % 12

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs[..., 0] - targets + 180) % 360 - 180).abs().double()


def test_a_likelihood_of_ones_own_is_measured_by_exact_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(mlp(1)(), Degrees()), torch.randn(40, 6)
    with torch.no_grad():
        targets = model(x)[:, 0] + 5 * torch.randn(40)
    network, asked = Network(model, "0.2.*"), Asked(targets, Steps())
    fast = FastPredictor(model, network, x, 16, asked=asked)
    slow = SlowPredictor(model, network, x, 16, asked=asked)
    params = network.rounded({name: p + 0.05 for name, p in network.start.items()})
    ours, theirs = fast.predict(params), slow.predict(params)
    assert torch.equal(ours.outputs, theirs.outputs) and ours.exact == 40
    assert ours.drift == pytest.approx(theirs.drift)
    found = Comparison(fast.base, ours.outputs, targets, Steps(), {"half": torch.arange(40) // 20})
    assert found.error_after == pytest.approx(float(Steps().loss(ours.outputs, targets).mean()))
    assert found.groups == () and [row.label for row in found.by_slice] == ["half = 0", "half = 1"]
    assert "°" in repr(found)
    assert "°" in comparison_page(tmp_path / "a.html", found, title="a", inputs=x).read_text()


class Degrees(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 180 * torch.tanh(x)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.main = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"side": self.side(h), "main": self.main(h)}


@pytest.mark.parametrize("output", ["main", lambda answer: answer["main"]], ids=["key", "function"])
def test_one_output_of_several_is_judged(output) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(40, 6)
    with torch.no_grad():
        targets = model(x)["main"].argmax(1)
    found = wp.compare(model, model, (x, targets), output=output)
    assert found.error_before == 0 and found.before.shape == (40, 4)
    network, asked = Network(model, "*"), Asked(targets, None, output)
    fast = FastPredictor(model, network, x, 16, asked=asked)
    slow = SlowPredictor(model, network, x, 16, asked=asked)
    params = network.rounded({name: p + 0.3 * torch.randn(p.shape) for name, p in network.start.items()})
    assert (fast.untraced_because == "") == (output == "main")
    torch.testing.assert_close(fast.predict(params).outputs, slow.predict(params).outputs)


@pytest.mark.parametrize(
    ("outputs", "targets", "says"),
    [
        ((5, 3), torch.zeros(5), r"float32\(5,\).*integers of shape \(5,\).*Bernoulli\(\) for tags.*Gaussian\(\)"),
        ((5, 3), torch.zeros(5, 3, dtype=torch.int64), r"int64\(5, 3\)"),
        ((5,), torch.zeros(5, dtype=torch.int64), r"Gaussian\(\) for numbers"),
        ((5, 3, 4, 4), torch.zeros(5, 3, 4, dtype=torch.int64), r"integers of shape \(5, 4, 4\)"),
        ((5, 3), torch.zeros(5, dtype=torch.bool), "bool"),
    ],
)
def test_what_cannot_be_told_is_asked_for(outputs: tuple[int, ...], targets: Tensor, says: str) -> None:
    z = torch.zeros(outputs)
    with pytest.raises(ShapeMismatch, match=says):
        wp.compare(lambda x: x, lambda x: x, (z, targets))


def test_columns_are_checked() -> None:
    z = torch.randn(4, 3)
    with pytest.raises(ShapeMismatch, match=r"'site' has shape \(2,\)"):
        Comparison(z, z, torch.zeros(4, dtype=torch.int64), slices={"site": [1, 2]})
    with pytest.raises(InvalidInput, match="no target of the test set counts"):
        Comparison(z, z, torch.full((4, 3), torch.nan), SCALED)


def test_the_drift_of_classes_is_quick_and_that_of_the_likelihood() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 9, 4, 3, 3, generator=g)
    counts = torch.rand(9, 3, 3, generator=g) > 0.3
    expected = Categorical(1).divergence(a, b)[counts].mean()
    assert Drift(a, Categorical(1), counts).to(b) == pytest.approx(float(expected), rel=1e-5)
    p, q = a.softmax(1), b.softmax(1)
    assert Drift(p, Categorical(1, Of.probabilities), counts).to(q) == pytest.approx(float(expected), rel=1e-4)
    expected = Gaussian(0.5, 0.1, dim=1).divergence(a, b)[counts].mean()
    assert Drift(a, Gaussian(0.5, 0.1, dim=1), counts).to(b) == pytest.approx(float(expected), rel=1e-6)
