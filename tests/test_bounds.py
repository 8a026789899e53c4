"""Bounds, intervals and tests of counts against scipy, brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from weightpatch.bounds import (
    holm,
    lower_bound,
    mcnemar,
    mean_difference,
    paired_difference,
    sign_test,
    student_quantile,
    student_tail,
    upper_bound,
)
from weightpatch.errors import InvalidInput

SHARES = st.integers(1, 1_000_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_small_counts_say_little():
    assert upper_bound(0, 10) == pytest.approx(0.2589, abs=5e-5)
    assert upper_bound(0, 200) == pytest.approx(0.0149, abs=5e-5)
    assert upper_bound(0, 3) == pytest.approx(1 - 0.05 ** (1 / 3))
    assert (upper_bound(0, 0), upper_bound(7, 7), lower_bound(0, 7), lower_bound(0, 0)) == (1, 1, 0, 0)


@settings(deadline=None)
@given(SHARES, st.sampled_from([1, 2, 40]), st.sampled_from([0.5, 0.95, 0.999]))
def test_bounds_are_quantiles_of_beta(share, tries, level):
    changed, n = share
    error = (1 - level) / tries
    upper = scipy.stats.beta.ppf(1 - error, changed + 1, n - changed) if changed < n else 1
    lower = scipy.stats.beta.ppf(error, changed, n - changed + 1) if changed else 0
    assert upper_bound(changed, n, tries, level) == pytest.approx(upper, rel=1e-7)
    assert lower_bound(changed, n, tries, level) == pytest.approx(lower, rel=1e-7, abs=1e-12)


@given(SHARES.filter(lambda share: share[0] < share[1]))
def test_bounds_grow_with_what_changed_and_shrink_with_what_did_not(share):
    changed, n = share
    bound = upper_bound(changed, n)
    assert upper_bound(changed, n + 1) < bound < upper_bound(changed + 1, n)
    assert bound < upper_bound(changed, n, tries=2) and bound < upper_bound(changed, n, level=0.99)
    assert lower_bound(changed, n) <= changed / n < bound


@pytest.mark.parametrize(("n", "true"), [(10, 0.05), (200, 0.01), (200, 0.3), (1000, 0.002)])
def test_the_bound_holds_as_often_as_it_says(n, true):
    seen = np.random.default_rng(n).binomial(n, true, 4000)
    bounds = {k: upper_bound(k, n) for k in set(seen.tolist())}
    covered = np.mean([bounds[k] >= true for k in seen.tolist()])
    assert covered >= 0.95 - 0.01  # three standard errors


def test_the_best_of_many_tries_holds_too():
    n, true, tries = 200, 0.03, 8
    best = np.random.default_rng(0).binomial(n, true, (4000, tries)).min(1).tolist()
    plain = np.mean([upper_bound(k, n) >= true for k in best])
    assert plain < 0.9 and np.mean([upper_bound(k, n, tries) >= true for k in best]) >= 0.94


@pytest.mark.parametrize("given", [(-1, 5), (6, 5), (0, -1), (1, 5, 0), (1, 5, 1, 1.0), (1, 5, 1, 95)])
def test_impossible_shares_are_refused(given):
    for bound in (upper_bound, lower_bound):
        with pytest.raises(InvalidInput, match="0 <= changed <= n"):
            bound(*given)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_the_sign_test_is_the_binomial_test(broken, repaired):
    flips = broken + repaired
    expected = scipy.stats.binomtest(broken, flips, alternative="greater").pvalue if flips else 1.0
    assert sign_test(broken, repaired) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_a_million_flips_are_tested_as_fast():
    expected = scipy.stats.binomtest(501_000, 1_000_000, alternative="greater").pvalue
    assert sign_test(501_000, 499_000) == pytest.approx(expected, rel=1e-6)


@given(st.floats(-60, 60), st.integers(1, 100_000), st.floats(1e-12, 0.5))
def test_students_t_is_scipys(t, freedom, tail):
    assert student_tail(t, freedom) == pytest.approx(scipy.stats.t.sf(t, freedom), rel=1e-7, abs=1e-14)
    expected = scipy.stats.t.isf(tail, freedom)
    assert student_quantile(tail, freedom) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(0.3, 2, 23)
    found = mean_difference(values.mean(), values.std(ddof=1), 23, 0.9)
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert mean_difference(1.0, 0.0, 1).low == -math.inf


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_step_by_step(p_values, error):
    adjusted = holm(p_values)
    rejected = set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if (len(p_values) - rank) * p_values[place] > error:
            break
        rejected.add(place)
    assert {i for i, p in enumerate(adjusted) if p <= error} == rejected
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))


def test_holm_seldom_rejects_a_true_hypothesis():
    random = np.random.default_rng(0)
    families = []
    for _ in range(1500):
        flips = random.integers(5, 40, 10)
        broken = random.binomial(flips, 0.5)
        families.append([sign_test(b, f - b) for b, f in zip(broken.tolist(), flips.tolist(), strict=True)])
    single = np.mean([min(family) <= 0.05 for family in families])
    assert single > 0.15 and np.mean([min(holm(family)) <= 0.05 for family in families]) <= 0.05 + 0.012


COUNTS = st.integers(1, 400).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, n - b), st.just(n)))
)


def score_variance(broken: int, repaired: int, n: int, d: float) -> float:
    """The slow oracle: the likeliest rate of repairs by numerical search, and the variance it gives."""

    def loss(q: float) -> float:
        terms = ((broken, q + d), (repaired, q), (n - broken - repaired, 1 - 2 * q - d))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

    low, high = max(0.0, -d), (1 - d) / 2
    found = scipy.optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
    q = min((low, high, found.x), key=loss)
    return n * (2 * q + d * (1 - d))


@pytest.mark.parametrize("counts", [(0, 1, 44), (3, 1, 50), (12, 7, 1000), (9, 9, 20), (25, 4, 60)])
def test_the_interval_ends_where_the_score_test_begins_to_reject(counts):
    broken, repaired, n = counts
    found = paired_difference(*counts)
    z = scipy.stats.norm.ppf(0.975)
    for edge in (found.low, found.high):
        score = (broken - repaired - n * edge) / math.sqrt(score_variance(broken, repaired, n, edge))
        assert abs(score) == pytest.approx(z, rel=1e-4)


@given(COUNTS)
def test_the_interval_holds_its_value_and_mirrors(counts):
    broken, repaired, n = counts
    found, mirror = paired_difference(broken, repaired, n), paired_difference(repaired, broken, n)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.value == (broken - repaired) / n
    assert (found.low, found.high) == pytest.approx((-mirror.high, -mirror.low), abs=1e-9)


def test_the_interval_without_a_flip_is_wilsons():
    z = scipy.stats.norm.ppf(0.975)
    found = paired_difference(0, 0, 10_000)
    assert (found.low, found.high) == pytest.approx((-(z**2) / (10_000 + z**2), z**2 / (10_000 + z**2)))


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    chances = (0.03, 0.01, 0.96)
    draws = random.multinomial(500, chances, 2000)
    known = {(b, c): paired_difference(b, c, 500) for b, c in {(int(b), int(c)) for b, c, _ in draws}}
    covered = np.mean([known[int(b), int(c)].low <= 0.02 <= known[int(b), int(c)].high for b, c, _ in draws])
    assert 0.935 <= covered <= 0.97


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_the_binomial_test(broken, repaired):
    expected = 1.0 if broken + repaired == 0 else scipy.stats.binomtest(broken, broken + repaired).pvalue
    assert mcnemar(broken, repaired) == pytest.approx(expected, rel=1e-6, abs=1e-300)


@pytest.mark.parametrize("counts", [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(InvalidInput, match="expected counts"):
        paired_difference(*counts)
