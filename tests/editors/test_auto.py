"""The ladder: the first way within the budget, measured, explained, and a gate where none is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import weightpatch as wp
from weightpatch.constraints import Classified, Kept, altered
from weightpatch.editing import Result
from weightpatch.editors import Auto, Budget, Gate, GradientDescent, Rung
from weightpatch.errors import InvalidInput
from weightpatch.statistics import called
from weightpatch.tasks import images

TEST = images.fashion_test()
KEEP = wp.Locality(TEST.images[1000:1400])


def wrong(index: int = 0) -> Classified:
    return Classified(TEST.images[index : index + 1], (TEST.labels[index : index + 1] + 3) % 10, 0.1)


def test_it_is_the_default_where_something_is_kept_and_explains_itself():
    model = images.fashion_classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = wp.edit(model, wrong(), keep=KEEP)
    assert found.result is Result.satisfied, found.attempts
    assert isinstance(found.editor, Auto)
    assert found.attempts[0].name == "fc.weight, exact"
    assert [attempt.within for attempt in found.attempts] == [False] * (len(found.attempts) - 1) + [True]
    assert found.steps == sum(attempt.steps for attempt in found.attempts)
    assert "taken" in str(found.attempts[-1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = before_and_after(model, found.patch)
    assert found.kept.share == pytest.approx(after)
    assert found.held_out.share <= 0.005
    judged = found.attempts[-1].held_out  # by the weights of the search; those of the patch are rounded
    assert found.held_out.drift == pytest.approx(judged.drift, rel=1e-5)
    assert replace(found.held_out, drift=judged.drift) == judged


def before_and_after(model: torch.nn.Module, patch: wp.Patch) -> float:
    """Return the share of kept answers that a patch changes, by full passes."""
    before = model(KEEP.inputs).argmax(1)
    with patch.applied(model):
        return float((model(KEEP.inputs).argmax(1) != before).double().mean())


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_budget_of_nothing_ends_at_the_gate(index: int):
    model = images.fashion_classifier()
    auto = Auto(budget=Budget(changed=0, drift=1e-9, seconds=0.2))
    found = wp.edit(model, wrong(index), auto, keep=KEEP).raise_for_result()
    assert found.attempts[-1].name == "gate at fc"
    assert found.drift == 0
    assert before_and_after(model, found.patch) == 0


def test_a_wide_budget_takes_the_first_rung():
    found = wp.edit(images.fashion_classifier(), wrong(), Auto(budget=Budget(changed=1)), keep=KEEP)
    assert [attempt.name for attempt in found.attempts] == ["fc.weight, exact"]
    assert found.patch.operations.keys() <= {"fc.weight", "fc.bias"}


def test_altered_copies_are_demanded_and_counted():
    model = images.fashion_classifier()
    fix = wrong(3)
    auto = Auto(budget=Budget(changed=1), altered=images.altered)
    found = wp.edit(model, fix, auto, keep=KEEP).raise_for_result()
    assert found.attempts[-1].generality == 1
    with found.patch.applied(model):
        assert fix.satisfied(model)
        assert altered(fix, images.altered).satisfied(model)


def test_only_what_the_user_allows_may_move():
    found = wp.edit(images.fashion_classifier(), wrong(), keep=KEEP, parameters="layer3.0.conv2.*").raise_for_result()
    assert set(found.patch.operations) <= {"layer3.0.conv2.weight"}
    assert found.attempts[0].name == "layer3.0.conv2.weight, exact"


def test_where_nothing_is_within_the_budget_the_best_is_given_and_said_so():
    steps = (Rung("small", GradientDescent(lr=1e-3, max_steps=50)), Rung("wild", GradientDescent(lr=1.0, max_steps=50)))
    for rungs in (steps, steps[::-1]):
        auto = Auto(rungs, Budget(changed=0))
        found = wp.edit(images.fashion_classifier(), wrong(), auto, keep=KEEP, parameters="fc.*")
        assert found.result is Result.over_budget
        held = [attempt for attempt in found.attempts if attempt.held]
        assert len(found.attempts) == 2
        assert found.held_out.drift == pytest.approx(
            min(held, key=lambda attempt: attempt.held_out.share).held_out.drift, rel=1e-4
        )
        with pytest.raises(wp.errors.EditFailed, match="over_budget"):
            found.raise_for_result()


def test_a_ladder_that_fails_hands_back_what_came_nearest():
    rungs = (Rung("stands still", GradientDescent(lr=0.0)), Rung("one step", GradientDescent(lr=1e-4, max_steps=1)))
    model, fix = images.fashion_classifier(), wrong()
    found = wp.edit(model, fix, Auto(rungs), keep=KEEP)
    assert found.result is Result.unsatisfied
    alone = wp.edit(model, fix, rungs[1].editor, keep=KEEP)
    assert found.violation == alone.violation
    assert [attempt.held for attempt in found.attempts] == [False, False]


def test_evaluate_completes_it_too_and_one_network_serves_all_edits():
    model = images.fashion_classifier()
    edits = [wrong(index) for index in range(4)]
    auto, test = Auto(budget=Budget(changed=0.02)), (TEST.images[:500], TEST.labels[:500])
    report = wp.evaluate(model, edits, auto, test=test, keep=KEEP, parameters="fc.*", progress=False)
    assert [row.result for row in report.rows] == [Result.satisfied] * 4
    alone = wp.edit(model, edits[1], auto, keep=KEEP, parameters="fc.*")
    assert report.rows[1].steps == alone.steps


def test_layers_are_listed_as_they_are_called():
    model = images.fashion_classifier()
    names = called(model, TEST.images[:2])
    assert names[0].startswith("conv1")
    assert names[-1] == "fc.weight"
    assert called(model, TEST.images[:2], parameters="bn1.*") == ()


def test_demands_may_be_of_any_kind():
    fix = wrong() & Kept(TEST.images[10:14])
    found = wp.edit(images.fashion_classifier(), fix, keep=KEEP).raise_for_result()
    assert found.attempts


def test_bad_input_is_refused():
    model = images.fashion_classifier()
    nan = float("nan")
    for name, value in (("changed", -0.1), ("changed", 1.5), ("generality", 2), ("drift", nan), ("seconds", -1)):
        with pytest.raises(InvalidInput, match=f"Budget was given {name}"):
            Budget(**{name: value})
    with pytest.raises(InvalidInput, match="needs something to keep"):
        wp.edit(model, wrong(), Auto())
    with pytest.raises(InvalidInput, match="expected Rung objects"):
        Auto((Gate("fc"),))
    with pytest.raises(InvalidInput, match=r"completed by wp\.edit"):
        wp.edit(model, wrong(), wp.editors.Shrink(Auto()), keep=KEEP)
    with pytest.raises(InvalidInput, match="altered returned 1 items for 2"):
        wp.edit(model, wrong() & Kept(TEST.images[1:3]), Auto(altered=lambda x: x[:1]), keep=KEEP)
    with pytest.raises(InvalidInput, match="demands of kind Kept"):
        altered(Kept(TEST.images[1:3]), images.altered)
