from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.evaluation.comparison import Comparison, compare, predict

LOGITS = st.integers(2, 6).flatmap(
    lambda classes: st.lists(
        st.tuples(
            st.lists(st.integers(-3, 3), min_size=classes, max_size=classes),
            st.lists(st.integers(-3, 3), min_size=classes, max_size=classes),
            st.integers(0, classes - 1),
        ),
        min_size=1,
        max_size=40,
    )
)


def make(items: list[tuple[list[float], list[float], int]]) -> Comparison:
    before, after, labels = zip(*items, strict=True)
    return Comparison(
        torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64), torch.tensor(labels)
    )


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(z) for z in row]
    return [p / sum(powers) for p in powers]


@given(LOGITS)
def test_everything_agrees_with_a_loop(items):
    found = make(items)
    kinds: dict[str, list[tuple[float, int]]] = {"broken": [], "repaired": [], "other": []}
    shifts, divergences, wrong = [], [], [0, 0]
    for i, (before, after, label) in enumerate(items):
        was, now = before.index(max(before)), after.index(max(after))
        p, q = softmax(before), softmax(after)
        shifts.append(q[was] - p[was])
        divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        wrong = [wrong[0] + (was != label), wrong[1] + (now != label)]
        if was != now:
            kind = "broken" if was == label else "repaired" if now == label else "other"
            kinds[kind].append((p[label] - q[label], i))
    for kind, expected in kinds.items():
        rows = getattr(found, kind).tolist()
        assert sorted(rows) == sorted(i for _, i in expected)
        assert getattr(found.flips, kind) == len(expected)
        harm = {i: h for h, i in expected}
        assert all(harm[a] >= harm[b] - 1e-12 for a, b in itertools.pairwise(rows))
    n = len(items)
    assert found.flipped.tolist() == [*found.broken.tolist(), *found.other.tolist(), *found.repaired.tolist()]
    assert found.error_before == pytest.approx(100 * wrong[0] / n)
    assert found.error_after == pytest.approx(100 * wrong[1] / n)
    assert found.drawdown.value == pytest.approx(100 * (wrong[1] - wrong[0]) / n)
    assert found.shift.tolist() == pytest.approx(shifts)
    assert found.kl == pytest.approx(sum(divergences) / n, abs=1e-12)


@given(LOGITS)
def test_classes_add_up_to_the_whole(items):
    found = make(items)
    assert sum(row.n for row in found.groups) == found.n
    for kind in ("broken", "repaired", "other"):
        assert sum(getattr(row.flips, kind) for row in found.groups) == getattr(found.flips, kind)
    errors = sum(row.n * row.error_after for row in found.groups if row.n)
    assert errors / found.n == pytest.approx(found.error_after)


@given(LOGITS)
def test_numbers_survive_json(items):
    plain = make(items).to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_swapping_the_models_swaps_broken_and_repaired():
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 200, 4, generator=generator)
    labels = torch.randint(4, (200,), generator=generator)
    one, other = Comparison(before, after, labels), Comparison(after, before, labels)
    assert sorted(one.broken.tolist()) == sorted(other.repaired.tolist())
    assert one.drawdown.value == -other.drawdown.value
    assert one.drawdown.low == pytest.approx(-other.drawdown.high)
    assert one.p_value == pytest.approx(other.p_value)


def test_nan_is_no_answer():
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [float("nan"), 0.0]])
    after = torch.tensor([[float("nan"), 0.0], [1.0, 0.0], [float("nan"), 0.0]])
    found = Comparison(before, after, torch.tensor([0, 0, 0]))
    assert found.answers_after.tolist() == [-1, 0, -1]
    assert found.broken.tolist() == [0]
    assert found.flips.total == 1
    assert found.shift[0] == -before.softmax(1)[0, 0]
    assert found.shift[2] == 0
    assert json.dumps(found.to_json(), allow_nan=False)


def test_identical_models_differ_in_nothing():
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    found = Comparison(logits, logits, logits.argmax(1))
    assert found.flips.total == 0
    assert (found.drawdown.value, found.p_value, found.kl) == (0.0, 1.0, 0.0)
    assert found.drawdown.low < 0 < found.drawdown.high
    assert "0 broken, 0 repaired" in repr(found)


def test_models_are_run_in_evaluation_mode_and_left_as_they_are(case):
    model, other = case.model().train(), case.model().train()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    inputs = case.inputs(20)
    labels = torch.arange(20) % 5
    seen = [zoo.digest(model), zoo.digest(other)]
    found = compare(model, other, (inputs, labels), batch_size=7)
    assert [zoo.digest(model), zoo.digest(other)] == seen
    again = compare(model.eval(), other.eval(), (inputs, labels))
    with torch.no_grad():
        expected = model(inputs).float()
    torch.testing.assert_close(again.before, expected)
    torch.testing.assert_close(found.before, again.before, atol=2e-2 if case.name == "bf16" else 1e-5, rtol=1e-4)
    torch.testing.assert_close(found.after, again.after, atol=2e-2 if case.name == "bf16" else 1e-5, rtol=1e-4)


def test_functions_and_structured_inputs():
    first, second = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(2))
    labels = torch.zeros(9, dtype=torch.int64)
    for inputs in ((first, second), {"a": first, "b": second}):
        found = compare(lambda a, b: a, lambda a, b: {"logits": a + b}, (inputs, labels), batch_size=4)
        torch.testing.assert_close(found.after, first + second)


def test_no_gradient_is_kept():
    model = nn.Linear(3, 2)
    assert not predict(model, torch.zeros(5, 3)).requires_grad


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (torch.zeros(4), ShapeMismatch, "float32"),
        (torch.zeros(3, dtype=torch.int64), ShapeMismatch, "n = 4"),
        (torch.tensor([0, 1, 2, 3]), InvalidInput, "0 to 1"),
        (torch.tensor([-1, 0, 1, 1]), InvalidInput, "targets go from -1 to 1; .*or -100 where nothing is asked"),
        (torch.tensor([-100] * 4), InvalidInput, "no target of the test set counts, of 4"),
        ([0, 1, 1, 0], ShapeMismatch, "list"),
    ],
)
def test_labels_are_checked(labels: Tensor, error: type[Exception], says: str):
    with pytest.raises(error, match=says):
        compare(nn.Linear(3, 2), nn.Linear(3, 2), (torch.zeros(4, 3), labels))


def test_sizes_are_checked():
    labels = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(InvalidInput, match="empty"):
        compare(nn.Linear(3, 2), nn.Linear(3, 2), (torch.zeros(0, 3), labels))
    with pytest.raises(InvalidInput, match="batch_size"):
        predict(nn.Linear(3, 2), torch.zeros(4, 3), 0)
    with pytest.raises(ShapeMismatch, match=r"\(4, 2\) and \(4, 3\)"):
        compare(nn.Linear(3, 2), nn.Linear(3, 3), (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)))
