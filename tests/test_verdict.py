"""Verdicts: what makes them green, amber and red, and what they say."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightpatch.bounds import Estimate, sign_test, upper_bound
from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.verdict import (
    Changed,
    Level,
    Limits,
    Paired,
    Verdict,
    judge_answers,
    judge_edit,
    judge_losses,
    judge_score,
)

GREEN, AMBER, RED = Level
CHANGED = st.integers(1, 5000).flatmap(lambda n: st.builds(Changed, st.integers(0, n), st.just(n)))


@st.composite
def paired(draw, name="all items", most=5000):
    n = draw(st.integers(1, most))
    wrong = draw(st.integers(0, n))
    repaired = draw(st.integers(0, wrong))
    return Paired(name, n, draw(st.integers(0, n - wrong)), repaired, wrong, draw(st.integers(0, wrong - repaired)))


def advised(verdict):
    """The number of further items that a verdict asks for."""
    return int(re.search(r"about ([\d,]+) more", verdict.settle[0])[1].replace(",", ""))


# Without labels


def test_without_anything_kept_side_effects_were_not_measured():
    found = judge_edit(None, None)
    assert found.level is AMBER
    assert found.reasons == ("Side effects were not measured: nothing was kept.",)
    assert found.settle == ("Keep about 200 items or more.",)
    assert judge_edit(None, None, Limits(changed=0.005)).settle == ("Keep about 598 items or more.",)


def test_no_change_on_three_texts_is_no_proof():
    found = judge_edit(None, Changed(0, 3, "texts"))
    assert found.level is AMBER and "at most 63.16 %" in found.reasons[0] and "(0 of 3)" in found.reasons[0]
    assert any("No labels" in sentence and "classes" in sentence for sentence in found.untested)


def test_half_of_all_translations_changed():
    found = judge_edit(Changed(0, 20), Changed(188, 400, "held-out translations"))
    assert found.level is RED and found.settle == ()
    assert "47.00 % of the held-out translations changed" in found.reasons[0] and "limit of 2 %" in found.reasons[0]
    few = judge_edit(None, Changed(9, 19))
    assert few.level is RED  # few items, and enough for that


def test_what_the_search_has_seen_is_no_word_on_the_rest():
    assert judge_edit(Changed(0, 10_000), None).level is AMBER
    assert judge_edit(Changed(0, 10_000), Changed(0, 500)).level is GREEN
    assert judge_edit(Changed(500, 10_000), Changed(0, 500)).level is RED
    assert judge_edit(Changed(3, 100), Changed(0, 500)).level is AMBER


def test_tries_are_paid_for():
    assert judge_edit(None, Changed(0, 200)).level is GREEN
    found = judge_edit(None, Changed(0, 200, tries=8))
    assert found.level is AMBER and "corrected for 8 candidates" in found.reasons[0]


def test_the_likelihood_that_counts_is_told():
    found = judge_edit(None, Changed(1, 300, likelihood="Gaussian(2.0, 0.2)"))
    assert "as Gaussian(2.0, 0.2) counts them" in found.reasons[0]


@given(CHANGED, st.integers(1, 20))
def test_few_items_are_never_green(seen, tries):
    found = judge_edit(None, Changed(seen.changed, seen.n, tries=tries))
    assert found.level is not GREEN or seen.n >= 200
    assert found.level is not GREEN or upper_bound(seen.changed, seen.n, tries) <= 0.02
    assert (found.level is AMBER) == bool(found.settle)


@given(CHANGED)
def test_more_changes_and_fewer_items_are_no_better(seen):
    found = judge_edit(None, seen).level
    if seen.changed < seen.n:
        assert not judge_edit(None, Changed(seen.changed + 1, seen.n)).level < found
    more = judge_edit(None, Changed(seen.changed, seen.n + 1)).level
    assert not found < more


@settings(max_examples=40)
@given(st.integers(0, 30), st.integers(1, 1000))
def test_what_would_settle_it_settles_it(changed, n):
    seen = Changed(min(changed, n), n)
    found = judge_edit(None, seen)
    if found.level is AMBER and "more items" in found.settle[0] and "too near" not in found.settle[0]:
        total = n + advised(found)
        counts = (math.floor(seen.share * total), math.ceil(seen.share * total))
        assert any(judge_edit(None, Changed(count, total)).level is not AMBER for count in counts)


# With labels


def test_a_class_that_doubled_its_error_is_not_hidden_by_the_rest():
    whole = Paired("all items", 10_000, 60, 49, wrong=800)
    rest = [Paired(f"class {i}", 1000, 5, 5, wrong=80) for i in range(9)]
    assert judge_answers(whole, rest).level is GREEN
    found = judge_answers(whole, [*rest, Paired("class 9", 1000, 17, 0, wrong=15)])
    assert found.level is RED and "In class 9" in found.reasons[0] and "p = 7.6e-05" in found.reasons[0]
    sure = judge_answers(whole, [*rest, Paired("class 9", 1000, 17, 0, wrong=150)])
    assert sure.level is AMBER and "certainly worse" in sure.reasons[0]
    assert judge_answers(whole, [], [Paired("camera = left", 1000, 17, 0, wrong=15)]).level is RED


def test_a_certain_loss_is_red_and_an_uncertain_one_amber():
    assert judge_answers(Paired("all items", 2000, 80, 10, wrong=200)).level is RED
    found = judge_answers(Paired("all items", 300, 2, 0, wrong=30))
    assert found.level is AMBER and "may be more than the limit of 1 point." in found.reasons[0]
    total = 300 + -(-advised(found) // 150) * 150
    assert judge_answers(Paired("all items", total, total // 150, 0, wrong=total // 10)).level is not AMBER


def test_many_answers_changed_is_not_green_although_none_is_worse():
    found = judge_answers(Paired("all items", 10_000, 200, 260, wrong=800, other=10))
    assert found.level is AMBER and "4.70 % of the answers changed" in found.reasons[0]
    assert judge_answers(Paired("all items", 10_000, 200, 260, wrong=800), limits=Limits(changed=0.1)).level is GREEN


def test_small_slices_that_lost_much_are_amber():
    whole = Paired("all items", 10_000, 6, 4, wrong=800)
    found = judge_answers(whole, slices=[Paired("camera = left", 20, 2, 0, wrong=1)])
    assert found.level is AMBER and "too few changed for a test" in found.reasons[0]
    assert "items of camera = left" in found.settle[0]


def test_many_slices_are_corrected_for():
    whole, bad = Paired("all items", 100_000, 10, 4, wrong=9000), Paired("bad", 1000, 6, 0, wrong=5)
    assert judge_answers(whole, slices=[bad]).level is RED  # p = 0.016
    even = [Paired(f"even {i}", 1000, 5, 5, wrong=50) for i in range(9)]
    assert judge_answers(whole, slices=[bad, *even]).level is not RED
    silent = [Paired(f"silent {i}", 1000, 0, 0, wrong=50) for i in range(99)]  # could never be found worse
    assert judge_answers(whole, slices=[bad, *silent]).level is RED


def test_equal_models_are_seldom_red():
    random, reds = np.random.default_rng(0), 0
    for _ in range(120):
        flips = random.poisson(12, 10)
        broken = random.binomial(flips, 0.5)
        groups = [
            Paired(f"class {i}", 500, b, f - b, wrong=60) for i, (b, f) in enumerate(zip(broken, flips, strict=True))
        ]
        whole = Paired("all items", 5_000, int(broken.sum()), int((flips - broken).sum()), wrong=600)
        reds += judge_answers(whole, groups).level is RED
    assert reds / 120 <= 0.05 + 0.06


def test_dozens_of_bad_classes_are_counted_and_not_all_told():
    whole = Paired("all items", 30_000, 900, 0, wrong=1200)
    found = judge_answers(whole, [Paired(f"class {i}", 1000, 30, 0, wrong=20) for i in range(30)])
    assert len(found.reasons) == 1 + 5 + 1 + 1 and any("25 more classes and slices" in told for told in found.reasons)


@given(paired(), st.lists(paired("class 1", 300), max_size=4))
def test_labelled_verdicts_hold_what_they_promise(whole, classes):
    found = judge_answers(whole, classes)
    assert found.level is not GREEN or whole.n >= 200
    assert found.level is not GREEN or (whole.loss(0.95).high <= 1 and whole.changed / whole.n <= 0.02)
    certain = (
        sign_test(whole.broken, whole.repaired) <= 0.05
    )  # of 4 items, all broken, the score interval alone is sure
    assert not (whole.loss(0.95).low > 1 and certain) or found.level is RED
    assert not found.level < judge_answers(whole).level  # further tests make nothing better
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (10, 6, 0, 5), (10, 0, 6, 5), (10, 0, 4, 5, 2), (10, -1, 0, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(InvalidInput, match="'dogs'"):
        Paired("dogs", *counts)


# A score of all answers


def test_a_score_is_judged_by_its_interval():
    changed = Changed(3, 2000, "translations")
    assert judge_score(Estimate(0.1, -0.1, 0.4), changed).level is GREEN
    assert judge_score(Estimate(2.0, 1.2, 2.9), changed).level is RED
    found = judge_score(Estimate(0.1, -1.4, 1.9), changed)
    assert found.level is AMBER and "BLEU" in found.reasons[0] and advised(found) == 6000
    many = judge_score(Estimate(0.1, -0.1, 0.4), Changed(940, 2000, "translations"))
    assert many.level is AMBER and "47.00 %" in many.reasons[0]
    assert judge_score(Estimate(0.0, 0.0, 0.0), Changed(0, 3, "texts")).level is AMBER


# Numbers

RANDOM = np.random.default_rng(0)
SQUARES = RANDOM.normal(0, 0.045, 2000) ** 2


def test_a_regression_that_became_three_times_worse():
    found = judge_losses(SQUARES, RANDOM.normal(0, 0.127, 2000) ** 2, unit="kW")
    assert found.level is RED
    assert re.search(r"RMSE grew by \+1\d\d.* %, from 0\.04\d* to 0\.1\d* kW", found.reasons[0].replace("]", " %"))
    assert judge_losses(torch.from_numpy(SQUARES), torch.from_numpy(SQUARES * 1.0001)).level is GREEN


def test_one_slice_of_a_regression_is_not_hidden_by_the_rest():
    worse, mine = SQUARES.copy(), np.arange(2000) < 100
    worse[mine] *= 9
    limits = Limits(growth=1.0)
    assert judge_losses(SQUARES, worse, limits=limits).level is GREEN
    found = judge_losses(SQUARES, worse, {"sensor = 1": mine, "sensor = 2": ~mine}, limits=limits)
    assert found.level is RED and "In sensor = 1" in found.reasons[0]


def test_certain_growth_that_is_next_to_nothing_is_no_matter():
    found = judge_losses(SQUARES, SQUARES * 1.001, {"sensor = 1": np.arange(2000) < 1000}, changed=Changed(0, 2000))
    assert found.level is GREEN and found.untested == ()
    assert judge_losses(SQUARES, SQUARES, changed=Changed(900, 2000)).level is AMBER


def test_noise_needs_more_items():
    random = np.random.default_rng(1)
    found = judge_losses(random.exponential(1, 300), random.exponential(1, 300))
    assert found.level is AMBER and "[-10.24, +5.93]" in found.reasons[0] and 50 < advised(found) < 200


def test_numbers_that_are_none():
    holes = np.where(np.arange(2000) < 5, np.nan, SQUARES)
    assert judge_losses(holes, holes).level is GREEN
    found = judge_losses(SQUARES, holes)
    assert found.level is RED and "5 of 2,000 items have no finite loss any more" in found.reasons[0]
    nothing = judge_losses([math.nan] * 3, [math.nan] * 3)
    assert nothing.level is AMBER and "not measured" in nothing.reasons[0]
    from_zero = judge_losses(np.zeros(300), np.arange(300) < 30)
    assert from_zero.level is RED and "RMSE moved from 0 to 0.3162" in from_zero.reasons[0]
    assert judge_losses(np.zeros(300), np.zeros(300)).level is GREEN


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), min_size=1, max_size=199))
def test_few_numbers_are_never_green(pairs):
    found = judge_losses(*zip(*pairs, strict=True), changed=Changed(0, len(pairs)))
    assert found.level is not GREEN
    assert json.dumps(found.to_json(), allow_nan=False)


def test_the_growth_of_an_rmse_is_covered_as_often_as_it_says():
    random, reds = np.random.default_rng(2), 0
    for _ in range(600):
        errors = random.normal(0, 1, (2, 400))
        after = 1.05 * (0.8 * errors[0] + 0.6 * errors[1])  # grows by the limit itself
        reds += judge_losses(errors[0] ** 2, after**2).level is RED
    assert reds / 600 <= 0.025 + 0.02


def test_a_mean_of_another_kind_has_its_own_figure():
    found = judge_losses([1.0, 3.0] * 200, [1.0, 9.0] * 200, figure=lambda mean: mean, name="mean error", unit="s")
    assert found.level is RED and "from 2 to 5 s" in found.reasons[0] and "+150.00 %" in found.reasons[0]


@pytest.mark.parametrize("shapes", [((3,), (4,), (3,)), ((3, 1), (3, 1), (3,)), ((3,), (3,), (2,))])
def test_losses_that_do_not_belong_together_are_refused(shapes):
    before, after, mask = (np.ones(shape) for shape in shapes)
    with pytest.raises(ShapeMismatch, match="one number an item"):
        judge_losses(before, after, {"a": mask})


# The values themselves


def test_a_verdict_is_a_value():
    amber, red = Verdict(AMBER, ("Why.",), ("Not this.",), ("Do that.",)), Verdict(RED, ("No.",), ("Not this.",))
    assert amber == Verdict(AMBER, ("Why.",), ("Not this.",), ("Do that.",)) and hash(amber) != hash(red)
    assert amber & red == red & amber == Verdict(RED, ("No.", "Why."), ("Not this.",))
    assert str(amber).splitlines() == [f"amber: {AMBER.value}", "Why.", "Not this.", "Do that."]
    assert amber.to_json()["level"] == "amber" and amber.to_json()["settle"] == ["Do that."]
    assert GREEN < AMBER < RED and max(Level, key=list(Level).index) is RED and repr(RED) == "Level.red"


@pytest.mark.parametrize(
    "wrong", [{"loss": -1}, {"changed": 2}, {"level": 1}, {"level": 0}, {"worst": math.inf}, {"growth": math.nan}]
)
def test_impossible_limits_are_refused(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        Limits(**wrong)


def test_limits_say_how_many_items_they_take():
    assert Paired("all items", 381, 0, 0, 9).loss(0.95).high <= 1 < Paired("all items", 380, 0, 0, 9).loss(0.95).high
    assert Paired("x", 3838, 0, 0, 9).loss(0.95).high <= 0.1 < Paired("x", 3837, 0, 0, 9).loss(0.95).high
    assert upper_bound(0, 149) <= 0.02 < upper_bound(0, 148) and upper_bound(0, 598) <= 0.005 < upper_bound(0, 597)


def test_nothing_judged_is_none():
    with pytest.raises(InvalidInput, match="pass None"):
        Changed(0, 0)
