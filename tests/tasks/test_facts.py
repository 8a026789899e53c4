"""Edits of facts, judged by what the edited model says: against a copy with the patch on, and formulas by hand."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import tiny_text as tiny

import weightpatch as wp
from weightpatch.editors import Adam, Gate, KeyValue, LowRank, RMSProp
from weightpatch.errors import InvalidInput
from weightpatch.tasks import language as lang
from weightpatch.tasks.language import Fact, Question, evaluate_facts, unedited
from weightpatch.tasks.language._measures import answer, begins, continued
from weightpatch.tasks.text import CausalLM

HELD_OUT = ("3 9 12 7 30", "5 5 8", "11 2 2 17 21 6 9")
FACTS = (
    Fact("3 4 5", "5 6", "4", ("9",), ("4 3 5", "5 4"), (Question("3 8 5"), Question("9 9", ("1",))), id=1),
    Fact("7 7 2", "8", "7 7", (), ("7 7 1 2",), (Question("6 6 2"),), generation=("7 7 9", "1 7 7")),
    Fact("12 13", "14 15", "12", (), (), (Question("13 13 13"),)),
    Fact("20 21 22", "1 2", "21", (), ("21 20 22",), ()),
)
EDITOR = Adam(lr=1e-2, max_steps=100)
FIRST, LAYER = "transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"


def model(seed: int = 0, **told) -> CausalLM:
    return CausalLM(tiny.gpt2(seed), tiny.Words(0), {"max_new_tokens": 8, **told})


def decoded(kind: CausalLM, prompt: str, tokens: int, edited=None) -> list[int]:
    """The oracle: the likeliest token, one full pass each, of one unpadded prompt."""
    ids = kind.source(prompt)["input_ids"]
    asked = kind.model if edited is None else edited
    for _ in range(tokens):
        with torch.no_grad():
            token = asked(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], 1)
        if int(token) in kind.ends:
            break
    return ids[0, kind.source(prompt)["input_ids"].shape[1] :].tolist()


def known(kind: CausalLM, facts=FACTS) -> tuple[Fact, ...]:
    """The facts, with neighbours whose answers the unedited model gives."""
    found = []
    for fact in facts:
        asked = [replace(q, answers=(kind.text(torch.tensor(decoded(kind, q.prompt, 2))),)) for q in fact.neighbours]
        found.append(replace(fact, neighbours=tuple(asked)))
    return tuple(found)


def judged(kind: CausalLM, facts, before: CausalLM):
    """Count by the oracle what an evaluation counts."""
    said, again, same, right, was = 0, 0, 0, 0, 0
    for fact in facts:
        wanted = fact.target.split()
        says = [kind.text(torch.tensor(decoded(kind, p, 10))).split() for p in (fact.prompt, *fact.paraphrases)]
        said += says[0][: len(wanted)] == wanted
        again += sum(words[: len(wanted)] == wanted for words in says[1:])
        for q in fact.neighbours:
            old, new = decoded(before, q.prompt, 10), decoded(kind, q.prompt, 10)
            same += old == new
            told = [[str(token) for token in some if token] for some in (old, new)]
            fits = [any(words[: len(a.split())] == a.split() for a in q.answers) for words in told]
            was, right = was + fits[0], right + all(fits)
    return said, again, same, right, was


def test_each_edit_is_judged_as_a_patched_copy_answers():
    kind = model()
    facts = known(kind)
    found = evaluate_facts(kind, facts, EDITOR, sizes=(1,), parameters=f"{LAYER}.*", held_out=HELD_OUT)
    assert len(found.rows) == len(facts) and found.of(1) == found.rows
    for row, fact in zip(found.rows, facts, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(row.first)
            edit = wp.edit(kind.model, lang.demand(kind, fact), EDITOR, parameters=f"{LAYER}.*")
        after = CausalLM(copy.deepcopy(kind.model), kind.tokenizer, kind.settings)
        edit.patch.apply(after.model)
        said, again, same, right, was = judged(after, [fact], kind)
        assert (row.said.hits, row.said.of) == (said, 1) and row.held == (edit.result is wp.Result.satisfied)
        assert (row.paraphrases.hits, row.paraphrases.of) == (again, len(fact.paraphrases))
        assert (row.same.hits, row.same.of) == (same, len(fact.neighbours))
        assert (row.right.hits, row.right.of) == (right, was)
        assert row.patch_bytes == edit.patch.nbytes and row.steps == edit.steps and row.seconds > 0
        assert row.perplexity == pytest.approx(lang.perplexity(kind, HELD_OUT, after.model), rel=1e-4)
    assert sum(row.said.hits for row in found.rows) == 4  # the editor is bold enough for all
    assert sum(row.same.hits for row in found.rows) < sum(row.same.of for row in found.rows)


def test_the_last_model_is_judged_on_all_facts():
    kind = model()
    facts = known(kind)
    found = evaluate_facts(kind, facts, EDITOR, sizes={2: 2, 4: 1}, parameters=f"{LAYER}.*", held_out=HELD_OUT)
    assert [(row.size, row.first, row.edits) for row in found.rows] == [(2, 0, 2), (2, 2, 2), (4, 0, 4)]
    for row in found.rows:
        edited, steps = copy.deepcopy(kind.model), 0
        some = facts[row.first : row.first + row.size]
        for fact in some:
            fix = lang.demand(replace(kind, model=edited), fact)
            edit = wp.edit(edited, fix, EDITOR, parameters=f"{LAYER}.*")
            edited.load_state_dict({**edited.state_dict(), **edit.patch.result(dict(edited.state_dict()))})
            steps += edit.steps
        said, again, same, right, was = judged(replace(kind, model=edited), some, kind)
        assert (row.said.hits, row.paraphrases.hits, row.same.hits) == (said, again, same)
        assert (row.right.hits, row.right.of, row.steps) == (right, was, steps)
        assert row.perplexity == pytest.approx(lang.perplexity(kind, HELD_OUT, edited), rel=1e-3)


def test_failed_edits_are_left_out_where_that_is_asked():
    kind = model()
    short = replace(EDITOR, max_steps=6)  # enough for some
    asked = {"sizes": (4,), "parameters": f"{LAYER}.*", "held_out": HELD_OUT}
    (row,) = evaluate_facts(kind, FACTS, short, skip_failed=True, **asked).rows
    edited, held = copy.deepcopy(kind.model), 0
    for fact in FACTS:
        edit = wp.edit(edited, lang.demand(replace(kind, model=edited), fact), short, parameters=f"{LAYER}.*")
        if edit.result.held:
            edited.load_state_dict({**edited.state_dict(), **edit.patch.result(dict(edited.state_dict()))})
            held += 1
    assert (row.edits, row.held) == (4, held) and 0 < held < 4
    assert row.perplexity == pytest.approx(lang.perplexity(kind, HELD_OUT, edited), rel=1e-4)
    (applied,) = evaluate_facts(kind, FACTS, short, **asked).rows
    assert applied.perplexity != pytest.approx(row.perplexity, rel=1e-3)


def test_what_is_said_already_is_told():
    kind = model()
    known = Fact("3 4 5", kind.text(torch.tensor(decoded(kind, "3 4 5", 2))))
    found = evaluate_facts(kind, (FACTS[0], known), EDITOR, sizes=(1, 2), parameters=f"{LAYER}.*")
    assert found.before.said == (False, True)
    assert found.figures(1)["said before"] == found.figures(2)["said before"] == "50.0 %"
    assert found.rows[1].steps == found.rows[1].patch_bytes == 0 and found.rows[1].said == lang.Share(1, 1)


def test_a_set_at_once_is_one_edit():
    kind = model()
    (row,) = evaluate_facts(kind, FACTS, EDITOR, sizes=(4,), parameters=f"{LAYER}.*", joint=True).rows
    assert (row.edits, row.held) == (1, 1) and row.said == lang.Share(4, 4)
    assert row.perplexity is None and row.right.of == 0


def test_nothing_changes_without_an_edit_and_the_model_stays():
    kind = model()
    before = copy.deepcopy(kind.model.state_dict())
    random = torch.get_rng_state()
    still = Adam(lr=1e-2, max_steps=0)
    found = evaluate_facts(kind, known(kind), still, sizes=(1, 4), parameters=f"{LAYER}.*", held_out=HELD_OUT)
    for row in found.rows:
        assert row.held == row.steps == row.patch_bytes == row.said.hits == 0
        assert row.same.hits == row.same.of and row.right.hits == row.right.of
        assert row.perplexity == pytest.approx(found.before.perplexity, rel=1e-6)
    alone = [row.fluency for row in found.of(1)]
    assert alone == list(found.before.fluency) and found.drawdown(1) == pytest.approx(0, abs=1e-6)
    evaluate_facts(kind, FACTS, EDITOR, sizes=(2,), parameters="*", held_out=HELD_OUT)
    assert all(torch.equal(value, before[name]) for name, value in kind.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_an_edit_that_is_not_finite_is_not_shipped():
    kind = model()
    wild = wp.editors.GradientDescent(lr=1e38, max_steps=3)
    found = evaluate_facts(kind, FACTS[:1], wild, sizes=(1,), parameters=f"{LAYER}.*", held_out=HELD_OUT)
    (row,) = found.rows
    assert row.held == 0 and row.patch_bytes == 0 and row.same.hits == row.same.of == 2
    assert row.perplexity == pytest.approx(found.before.perplexity, rel=1e-6)


def test_perplexity_is_that_of_the_models_own_loss():
    kind = model()
    losses, tokens = [], []
    for text in HELD_OUT:
        ids = kind.source(text)["input_ids"]
        losses.append(kind.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        tokens.append(ids.shape[1] - 1)
    assert lang.perplexity(kind, HELD_OUT) == pytest.approx(math.exp(sum(losses) / sum(tokens)), rel=1e-5)


@pytest.mark.parametrize("texts", [[], ["3"]])
def test_perplexity_needs_texts(texts):
    with pytest.raises(InvalidInput, match="at least two tokens"):
        lang.perplexity(model(), texts)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("a b c d e", 2 / 3 + 2 / 3 * math.log2(3)),  # 4 pairs and 3 triples, all different
        ("a a a a a", 0.0),
        ("a b a b a", 1 / 3 + 2 / 3 * (2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3))),
        ("a, b", 1 / 3),  # two pairs, with the comma as a word; one triple
        ("a", 0.0),
        ("", 0.0),
    ],
)
def test_fluency_by_hand(text, bits):
    assert lang.ngram_entropy(text) == pytest.approx(bits)


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=30))
def test_fluency_is_that_of_romes_formula(words):
    found = []
    for n in (2, 3):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        p = torch.tensor([grams.count(gram) / len(grams) for gram in sorted(set(grams))], dtype=torch.float64)
        found.append(float(-(p * p.log2()).sum()))
    assert lang.ngram_entropy(" ".join(words)) == pytest.approx((2 / 3 * found[0] + 4 / 3 * found[1]) / 2, abs=1e-9)


def test_fluency_is_of_what_is_written_freely():
    kind = model()
    fact = FACTS[1]
    found = unedited(kind, [fact], continuation=12)
    texts = continued(kind, fact.generation, 12)
    assert all(len(text.split()) <= 12 for text in texts) and texts == continued(kind, fact.generation, 12)
    assert found.fluency == (pytest.approx(sum(map(lang.ngram_entropy, texts)) / 2),)
    assert unedited(kind, [fact], continuation=0).fluency == () == unedited(kind, [fact], continuations=0).fluency
    # Each token is among the five likeliest after those before it
    ids = kind.source(fact.generation[0])["input_ids"][0].tolist()
    for token in map(int, texts[0].split()):
        with torch.no_grad():
            logits = kind.model(input_ids=torch.tensor([ids])).logits[0, -1]
        assert token in logits.topk(6).indices  # six, as the end token is not let in
        ids.append(token)


@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [
        (" Paris.\nIt", "Paris", True),
        ("Paris", " Paris", True),
        (" Parisian cafés", "Paris", False),
        (" the Paris", "Paris", False),
        (" 12 13", "1", False),
        ("", "Paris", False),
        (" C++20", "C++", True),
    ],
)
def test_an_answer_begins_a_text_up_to_the_end_of_a_word(text, wanted, found):
    assert begins(text, wanted) is found


def test_answers_follow_prompts_after_a_space():
    assert answer("Water is", "wet") == " wet"
    assert answer("Water is ", "wet") == "wet" and answer("Water is", "\nwet") == "\nwet"


def test_subjects_end_where_their_last_token_does():
    kind = model()
    assert lang.subject_position(kind, Fact("3 14 5 6", "7", "14 5")) == 2
    assert lang.subject_position(kind, Fact("3 14 5 6", "7", "3")) == 0
    assert lang.subject_position(kind, Fact("3 14 5 6", "7")) == 3
    assert lang.subject_position(kind, Fact("3 14 5 6", "7", "99")) == 3


def test_an_editor_may_be_made_for_each_fact():
    kind = model()
    some = (Fact("3 4 5 9", "6"), Fact("7 2", "8"))  # without a subject: the last token is written at
    places = []

    def make(facts):
        places.append(lang.subject_position(kind, facts[0]))
        return KeyValue((LAYER,), exact=True, positions=places[-1])

    found = evaluate_facts(kind, some, make, sizes=(1,), parameters=f"{LAYER}.*")
    assert places == [3, 3, 1]  # the first one for the header
    for row, fact in zip(found.rows, some, strict=True):
        edit = wp.edit(kind.model, lang.demand(kind, fact), make([fact]), parameters=f"{LAYER}.*")
        assert (edit.result is wp.Result.satisfied, edit.steps) == (row.held == 1, row.steps)
    assert sum(row.said.hits for row in found.rows) == 2

    def other(facts):
        return KeyValue((LAYER if facts[0] == some[0] else FIRST,), exact=True)

    with pytest.raises(InvalidInput, match="other modules"):
        evaluate_facts(kind, some, other, sizes=(2,), parameters="transformer.h.*.mlp.c_proj.*")


def test_gates_are_judged_and_weighed_too():
    kind = model()
    keep = kind.kept(["9 8", "7 7 7"])
    gate = Gate(LAYER, count=8)
    found = evaluate_facts(kind, FACTS[:1], gate, sizes=(1,), parameters=f"{LAYER}.*", keep=keep)
    edit = wp.edit(kind.model, lang.demand(kind, FACTS[0]), gate, parameters=f"{LAYER}.*", keep=keep)
    assert found.rows[0].patch_bytes == edit.patch.nbytes > 0
    assert found.rows[0].said.hits == (edit.result is wp.Result.satisfied) == 1


def test_a_patch_of_low_rank_takes_its_factors():
    kind = model()
    low = evaluate_facts(kind, FACTS[:1], LowRank(EDITOR, rank=1), sizes=(1,), parameters=f"{LAYER}.*")
    full = evaluate_facts(kind, FACTS[:1], RMSProp(lr=1e-2, max_steps=100), sizes=(1,), parameters=f"{LAYER}.*")
    assert 0 < low.rows[0].patch_bytes < full.rows[0].patch_bytes


def test_a_run_that_was_stopped_continues(tmp_path):
    kind, path = model(), tmp_path / "facts.jsonl"
    told = {"sizes": (1, 2), "parameters": f"{LAYER}.*", "held_out": HELD_OUT}
    whole = evaluate_facts(kind, FACTS, EDITOR, **told, results=path)
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 6 and json.loads(lines[0])["base_perplexity"] == whole.before.perplexity
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    rows = []
    again = evaluate_facts(kind, FACTS, EDITOR, **told, results=path, progress=rows.append)
    timeless = [[replace(row, seconds=0.0, peak_bytes=None) for row in report.rows] for report in (whole, again)]
    assert timeless[0] == timeless[1] and len(rows) == 4 and again.rows[:2] == whole.rows[:2]
    for change in ({"sizes": (1,)}, {"held_out": HELD_OUT[:1]}, {"joint": True}, {"keep": kind.kept(["9 8"])}):
        with pytest.raises(InvalidInput, match="another run"):
            evaluate_facts(kind, FACTS, EDITOR, **{**told, **change}, results=path)


def test_a_run_that_reads_the_same_is_another_one(tmp_path):
    kind, told = model(), {"sizes": {1: 1}, "parameters": f"{LAYER}.*"}

    def making(lr):
        return lambda facts: RMSProp(lr=1e-2 if facts == FACTS[:1] else lr, max_steps=3)

    keep = kind.kept(["9 8", "7 6 5 4"])
    fewer = replace(keep, mask=keep.mask & (torch.arange(keep.mask.shape[1]) < 2))
    for name, one, two, says in (
        ("makes", {"editor": making(1e-2)}, {"editor": making(2e-2)}, "editor is "),
        ("keep", {"editor": EDITOR, "keep": keep}, {"editor": EDITOR, "keep": fewer}, "keep.mask is "),
    ):
        first = evaluate_facts(kind, FACTS, **one, **told, results=tmp_path / name)
        with pytest.raises(InvalidInput, match="another run") as caught:
            evaluate_facts(kind, FACTS, **two, **told, results=tmp_path / name)
        assert says in str(caught.value)
        assert evaluate_facts(kind, FACTS, **one, **told, results=tmp_path / name).rows == first.rows


def test_what_was_measured_before_is_taken_where_it_fits():
    kind = model()
    before = unedited(kind, FACTS, held_out=HELD_OUT, tokens=6, continuation=8)
    found = evaluate_facts(kind, FACTS, EDITOR, sizes=(4,), parameters=f"{LAYER}.*", held_out=HELD_OUT, before=before)
    assert found.before is before
    for other, facts, texts in ((kind, FACTS[:2], HELD_OUT), (kind, FACTS, ()), (model(1), FACTS, HELD_OUT)):
        with pytest.raises(InvalidInput, match="measure it for these"):
            evaluate_facts(other, facts, EDITOR, sizes=(1,), held_out=texts, before=before)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"facts": ()}, "0 facts"),
        ({"sizes": (10,)}, "4 facts for 1 sets of 10"),
        ({"sizes": {1: 5}}, "4 facts for 5 sets of 1"),
        ({"sizes": (0,)}, "sizes of at least 1"),
        ({"facts": (replace(FACTS[0], target="1 2 3 4 5 6 7 8 9 1"),), "sizes": (1,)}, "tokens=10"),
    ],
)
def test_bad_evaluations_are_explained(change, told):
    with pytest.raises(InvalidInput, match=r".") as error:
        evaluate_facts(model(), **{"facts": FACTS, "editor": EDITOR, **change})
    assert told in str(error.value)


def test_figures_have_what_there_is():
    kind = model()
    found = evaluate_facts(kind, known(kind), EDITOR, sizes=(1, 4), parameters=f"{LAYER}.*", held_out=HELD_OUT)
    alone = found.figures(1)
    assert alone["efficacy"] == "100.0 %" and alone["sets"] == "4" and alone["said before"] == "0.0 %"
    after = [row.perplexity for row in found.of(1)]
    assert alone["perplexity"] == f"{sum(after) / 4 - found.before.perplexity:+.2f}"
    assert found.figures(4)["sets"] == "1" and found.figures(7) == {} and found.drawdown(7) is None
    assert lang.Share(1, 2) + lang.Share(0, 2) == lang.Share(1, 4) and str(lang.Share(0, 0)) == ""
    assert lang.Share(1, 4).estimate.low < 0.25 < lang.Share(1, 4).estimate.high


def test_shipped_facts_are_whole():
    facts = lang.shipped_facts()
    assert len(facts) >= 100 and len({fact.subject for fact in facts}) == len(facts)
    edited = {fact.prompt for fact in facts}
    subjects = [fact.subject for fact in facts]
    for fact in facts:
        assert fact.target not in fact.truth and fact.subject_end is not None
        assert len(fact.paraphrases) == 2 and len(fact.neighbours) == 3 and len(fact.generation) == 1
        assert all(fact.subject in prompt for prompt in (*fact.paraphrases, *fact.generation))
        for question in fact.neighbours:
            assert question.answers == fact.truth and question.prompt not in edited
            place = fact.place
            end = len(fact.prompt) - fact.subject_end
            asked = question.prompt[place : len(question.prompt) - end]
            assert question.prompt.startswith(fact.prompt[:place]) and question.prompt.endswith(fact.prompt[-end:])
            assert asked not in subjects


def test_the_shipped_file_is_what_the_script_writes(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "scripts"))
    import facts as script

    made = script.facts()
    assert tuple(made) == lang.shipped_facts()
    assert script.FILE.stat().st_size < 150_000
    for relation in script.RELATIONS:
        some = [fact for fact in made if fact.rest["requested_rewrite"]["relation_id"] == relation.id]
        assert some and all({fact.target, *fact.truth} <= relation.subjects.keys() for fact in some)
