"""The metrics against scipy and against counting by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.evaluation.metrics import Estimate, Flips, bootstrap_mean, flips, paired_bootstrap, wilson


@given(st.integers(1, 2000), st.floats(0, 1), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_is_scipys(n: int, share: float, level: float) -> None:
    successes = round(share * n)
    ours = wilson(successes, n, level)
    theirs = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert ours.value == successes / n
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_wilson_of_nothing_says_nothing() -> None:
    nothing = wilson(0, 0)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0, 1)


@pytest.mark.parametrize(("successes", "n", "level"), [(-1, 3, 0.95), (4, 3, 0.95), (1, 3, 0.0), (1, 3, 95.0)])
def test_wilson_refuses(successes: int, n: int, level: float) -> None:
    with pytest.raises(InvalidInput, match="expected"):
        wilson(successes, n, level)


@pytest.mark.parametrize("n", [5, 50, 1000])
def test_bootstrap_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).exponential(2.0, n)
    ours = bootstrap_mean(values.tolist(), seed=3)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", random_state=1)
    interval = theirs.confidence_interval
    width = interval.high - interval.low
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(interval.low, abs=0.06 * width)
    assert ours.high == pytest.approx(interval.high, abs=0.06 * width)


def test_bootstrap_is_seeded_and_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(v % 7) for v in range(100)]
    whole = bootstrap_mean(values)
    assert whole == bootstrap_mean(values)
    assert whole != bootstrap_mean(values, seed=1)
    monkeypatch.setattr("weightpatch.evaluation.metrics._CHUNK", 300)
    assert bootstrap_mean(values) == whole


def test_bootstrap_of_a_constant_and_of_nothing() -> None:
    assert bootstrap_mean([2.5] * 9) == Estimate(2.5, 2.5, 2.5)
    assert all(math.isnan(v) for v in vars(bootstrap_mean([])).values())


def test_a_paired_bootstrap_of_means_is_that_of_differences() -> None:
    random = np.random.default_rng(0)
    before = np.column_stack([random.exponential(1.0, 300), np.ones(300)])
    after = before + np.column_stack([random.normal(0.1, 0.2, 300), np.zeros(300)])
    found = paired_bootstrap(before, after, lambda sums: sums[0] / sums[1])
    assert found == paired_bootstrap(before, after, lambda sums: sums[0] / sums[1])
    alone = bootstrap_mean((after - before)[:, 0].tolist())
    width = alone.high - alone.low  # what both sides have in common does not widen it
    assert found.value == pytest.approx(alone.value)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.1 * width)
    assert paired_bootstrap(before, before, max) == Estimate(0.0, 0.0, 0.0)


@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3,), (3,)), ((0, 2), (0, 2))])
def test_a_paired_bootstrap_refuses_sides_that_do_not_belong_together(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ShapeMismatch, match=r"\(n, k\)"):
        paired_bootstrap(np.zeros(shapes[0]), np.zeros(shapes[1]), max)


_CLASSES = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40)


@settings(max_examples=50)
@given(_CLASSES)
def test_flips_are_counted_as_by_hand(items: list[tuple[int, int, int]]) -> None:
    before, after, labels = torch.tensor(items).T
    broken = sum(b == y != a for b, a, y in items)
    repaired = sum(a == y != b for b, a, y in items)
    other = sum(a != b and a != y and b != y for b, a, y in items)
    found = flips(before != after, (before != labels).double(), (after != labels).double())
    assert found == Flips(broken, repaired, other)
    assert found.total == int((before != after).sum())


def test_flips_refuses_unequal_shapes() -> None:
    with pytest.raises(ShapeMismatch, match=r"\(3,\)"):
        flips(torch.zeros(2), torch.zeros(3), torch.zeros(2))


def test_an_estimate_scales_and_prints() -> None:
    assert Estimate(0.5, 0.25, 1.0).scaled(100) == Estimate(50.0, 25.0, 100.0)
    assert str(Estimate(0.5, 0.25, 1.0)) == "0.5 [0.25, 1]"
