"""Verdicts of comparisons, and what pages make of them: the worst class, tag, output and slice decides."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from test_pages import Page, check_self_contained, make, story

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editors import Gate
from weightpatch.effects import Effect
from weightpatch.evaluation import (
    Comparison,
    Scoring,
    SentenceComparison,
    comparison_page,
    edit_page,
    sentence_comparison_page,
    verbatim,
)
from weightpatch.evaluation.metrics import Estimate
from weightpatch.likelihoods import Bernoulli, Gaussian, Of
from weightpatch.verdict import Changed, Level, Limits, Verdict, judge_edit

GREEN, AMBER, RED = Level


def one_hot(classes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes, 10).float()


def doubled() -> Comparison:
    """10,000 items: 17 of class 3 break and none is repaired, of the others 43 break and 49 are repaired: p = 0.34."""
    targets = torch.arange(10_000) % 10
    before, after = targets.clone(), targets.clone()
    third = (targets == 3).nonzero().squeeze(1)
    rest = (targets != 3).nonzero().squeeze(1)
    before[third[:15]] = after[third[:15]] = 4
    before[rest[:700]] = after[rest[:700]] = 3
    before[rest[:49]] = (targets[rest[:49]] + 1) % 10
    after[rest[:49]] = targets[rest[:49]]
    after[third[15:32]] = 4
    after[rest[1000:1043]] = (targets[rest[1000:1043]] + 1) % 10
    return Comparison(one_hot(before), one_hot(after), targets)


def box(page: Page) -> str:
    return next(attrs["class"] for attrs in page.all("div") if (attrs.get("class") or "").startswith("verdict"))


def test_a_class_whose_error_doubled_makes_the_page_red_though_the_whole_is_no_worse(tmp_path: Path):
    found = doubled()
    assert found.p_value > 0.25 and found.drawdown.low < 0
    assert found.verdict.level is RED and "verdict red" in repr(found)
    assert found.verdict.reasons[0].startswith("In class 3") and "17 broken, 0 repaired" in found.verdict.reasons[0]
    assert found.to_json()["verdict"]["level"] == "red"
    names = [f"<{k}>" for k in range(10)]
    where = comparison_page(
        tmp_path / "a.html", found, title="a", inputs=torch.zeros(10_000, 3), classes=names, picture=None
    )
    page = Page(where)
    check_self_contained(page)
    assert box(page) == "verdict bad" and "In class <3>" in page.text and "No column was given" in page.text
    assert json.loads((tmp_path / "a.json").read_text())["verdict"]["reasons"][0].startswith("In class <3>")


def sentences(n: int, changed: int, scoring: Scoring | None = None, **given: object) -> SentenceComparison:
    texts, before = (tuple(f"{word} {i}" for i in range(n)) for word in ("text", "answer"))
    after = tuple(f"{text} too" if i < changed else text for i, text in enumerate(before))
    references = None if scoring is None else tuple("nobody says so" for _ in range(n))
    return SentenceComparison(texts, before, after, (0.0,) * n, 0.0, references, scoring, **given)


def test_half_of_the_translations_changed_is_not_green(tmp_path: Path):
    bare, scored = sentences(400, 188), sentences(400, 188, verbatim())
    assert bare.verdict.level is RED and scored.verdict.level is AMBER  # labels show no loss
    assert scored.drawdown == dataclasses.replace(scored.drawdown, value=0.0)
    for found, tone in ((bare, "bad"), (scored, "wary")):
        page = Page(sentence_comparison_page(tmp_path / f"{tone}.html", found, title="a"))
        check_self_contained(page)
        assert box(page) == f"verdict {tone}" and "47.00 % of the answers changed" in page.text
        assert f"verdict {found.verdict.level.name}" in str(found)
    accepted = sentence_comparison_page(tmp_path / "own.html", bare, title="a", limits=Limits(changed=0.6))
    assert box(Page(accepted)) == "verdict good"
    assert json.loads((tmp_path / "own.json").read_text())["comparison"]["verdict"]["level"] == "green"


def test_no_answer_changed_on_three_texts_is_amber(tmp_path: Path):
    for found in (sentences(3, 0), sentences(3, 0, verbatim())):
        assert found.verdict.level is AMBER
        page = Page(sentence_comparison_page(tmp_path / "a.html", found, title="a"))
        assert box(page) == "verdict wary" and "at most 63.16 %" in page.text and "What would settle it" in page.text
    assert sentences(400, 0).verdict.level is GREEN


def test_a_score_is_judged_at_the_level_that_is_asked():
    levels = []

    def lost(before: object, after: object, references: object, level: float) -> Estimate:
        levels.append(level)
        return Estimate(0.0, -0.5, 0.5)

    found = sentences(400, 1, dataclasses.replace(verbatim(), lost=lost))
    assert found.judge(Limits(level=0.99)).level is GREEN and levels == [0.99]


# What else outputs may mean


def test_one_tag_is_not_hidden_by_the_others():
    targets = torch.zeros(2000, 20)
    before, after = -torch.ones(2000, 20), -torch.ones(2000, 20)
    before[:20, 7] = after[:60, 7] = 1
    before[500:1000, 3] = after[500:1000, 3] = 1  # as wrong as before
    found = Comparison(before, after, targets, Bernoulli(of=Of.logits))
    assert found.drawdown.high < 0.2
    assert found.verdict.level is RED and found.judge(names=[f"t{k}" for k in range(20)]).reasons[0].startswith(
        "In tag t7"
    )


def test_the_states_of_a_single_tag_are_its_classes():
    targets = (torch.arange(4000) % 40 == 0).float()
    before = 2 * targets - 1
    after = before.clone()
    after[torch.arange(4000) % 200 == 0] = -1  # a fifth of those that are on
    before[1:4000:40] = after[1:4000:40] = 1  # as wrong as before
    found = Comparison(before, after, targets, Bernoulli(of=Of.logits))
    assert found.drawdown.high < 1
    assert found.verdict.level is RED and found.verdict.reasons[0].startswith("In tag 0 on")


def pixels() -> Comparison:
    targets = torch.zeros(300, 8, 8, dtype=torch.long)
    targets[:, 0, 0] = 2  # a small class
    before = torch.nn.functional.one_hot(targets, 3).permute(0, 3, 1, 2).float()
    before[:, :, 7, 7] = torch.tensor([0.0, 1.0, 0.0])  # as wrong as after
    after = before.clone()
    after[::2, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    return Comparison(before, after, targets, slices={"odd": [bool(i % 2) for i in range(300)]})


def test_a_small_class_of_pixels_is_not_hidden_by_the_others():
    found = pixels()
    assert found.drawdown.high < 1
    verdict = found.judge(Limits(changed=1.0))
    assert verdict.level is RED and verdict.reasons[0].startswith("In class 2")
    assert "+50.00 points" in verdict.reasons[0] and "300 items" in verdict.reasons[0]
    everything = " ".join(found.verdict.reasons)
    assert "300 items with 19,200 answers" in everything and "50.00 % of the items changed" in everything


def test_items_are_the_units_of_pixels():
    """Three items of 300 that are all wrong prove nothing, however many pixels they have."""
    targets = torch.zeros(300, 32, 32, dtype=torch.long)
    before = torch.nn.functional.one_hot(targets, 2).permute(0, 3, 1, 2).float()
    after = before.clone()
    after[:3] = after[:3].flip(1)
    found = Comparison(before, after, targets)
    assert found.error_after == 1.0 and found.verdict.level is AMBER


def test_one_output_of_numbers_is_not_hidden_by_the_others():
    random = torch.Generator().manual_seed(0)
    targets = torch.randn(1000, 2, generator=random) * torch.tensor([100.0, 1.0])
    before = targets + torch.randn(1000, 2, generator=random) * torch.tensor([10.0, 0.1])
    after = before.clone()
    after[:, 1] += torch.randn(1000, generator=random)
    found = Comparison(before, after, targets, Gaussian(1.0, 100.0))
    assert abs(found.error_after / found.error_before - 1) < 0.01
    assert found.verdict.level is RED
    assert found.judge(names=("mass", "charge")).reasons[0].startswith("In output charge, RMSE grew")
    same = Comparison(before, before, targets, Gaussian(1.0, 100.0), {"half": [0, 1] * 500})
    assert same.verdict.level is GREEN and not any("column" in told for told in same.verdict.untested)


# What is kept, and what is labelled


def effect(changed: int, items: int) -> Effect:
    return Effect(items, changed, items, changed, 0.0, "Categorical()")


def test_what_is_enough_settles_what_is_too_little():
    few, none = judge_edit(None, Changed(1, 32)), judge_edit(None, None)
    enough = judge_edit(None, Changed(0, 10_000))
    labelled, scarce = doubled().judge(Limits(worst=100)), sentences(3, 0).verdict
    assert few.few and none.few and scarce.few and few.level is none.level is AMBER
    clean = Comparison(one_hot(torch.arange(1000) % 10), one_hot(torch.arange(1000) % 10), torch.arange(1000) % 10)
    for poor in (few, none, scarce):
        assert (poor & clean.verdict).level is (clean.verdict & poor).level is GREEN
        assert (poor & enough).level is GREEN and set(poor.reasons) < set((poor & enough).reasons)
        assert (poor & few).few and (poor & few).level is AMBER
        assert (poor & labelled).level is labelled.level is RED


def test_what_speaks_against_an_edit_is_not_settled_by_other_items():
    clean = judge_edit(None, Changed(0, 10_000))
    kept = judge_edit(Changed(3, 100), Changed(0, 500))  # of what the user asked to keep, 3 % changed
    borderline = judge_edit(None, Changed(5, 250))
    assert not kept.few and not borderline.few
    assert (kept & clean).level is (borderline & clean).level is AMBER
    targets = torch.arange(50) % 10
    after = targets.clone()
    after[:1] = 9
    broken = Comparison(one_hot(targets), one_hot(after), targets).verdict  # 2 points of 50 items: beyond the limit
    assert broken.level is AMBER and not broken.few and (broken & clean).level is AMBER
    assert (Verdict(RED, ("no",)) & clean).level is RED


@pytest.mark.parametrize(
    ("held_out", "tone", "title"),
    [
        (effect(0, 500), "good", "Patched"),
        (effect(0, 50), "wary", "Patched, with open questions"),
        (effect(90, 500), "bad", "Patched, at a price"),
    ],
)
def test_the_page_of_an_edit_goes_by_its_verdict(tmp_path: Path, held_out: Effect, tone: str, title: str):
    told = story()
    inputs, answers = told.test
    told.edit = dataclasses.replace(told.edit, kept=effect(0, 900), held_out=held_out)
    with torch.no_grad(), told.edit.patch.applied(told.model):
        calm = told.model(inputs).argmax(1) == answers  # nothing that changed is measured
    told.test = (inputs[calm], answers[calm])
    page, facts = make(tmp_path, told)
    assert box(page) == f"verdict {tone}" and page.text.count(title) >= 2
    assert facts["verdict"]["level"] == {"good": "green", "wary": "amber", "bad": "red"}[tone]
    assert facts["kept"]["items"] == 900 and facts["held_out"]["upper"] == held_out.upper
    assert f"{held_out.changed} of {held_out.items} answers changed; of others at most" in page.text


def test_a_patch_that_is_a_gate_is_measured_with_it(tmp_path: Path):
    told = story()
    inputs, answers = told.test
    wanted = (answers[:1] + 1) % 4
    told.constraint = Classified(inputs[:1], wanted, 0.1)
    told.edit = wp.edit(told.model, told.constraint, Gate("1"), keep=wp.Locality(inputs[1:])).raise_for_result()
    assert told.edit.patch.gates and not told.edit.patch.operations
    page = Page(edit_page(tmp_path / "a.html", model=told.model, edit=told.edit, test=told.test))
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["mistakes"][0]["met"] and facts["mistakes"][0]["now"] == f"class {int(wanted)}"
    assert facts["comparison"]["broken"] == [0] and facts["curve"] is None and "1 gate" in page.text
