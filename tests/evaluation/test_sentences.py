"""Answers in words: how two differ, what changed over a test set, and the pages that show it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import tiny_text as tiny
from test_pages import Page, check_self_contained

import weightpatch as wp
from weightpatch.bounds import paired_difference
from weightpatch.editors import RMSProp
from weightpatch.errors import InvalidInput, MissingExtra
from weightpatch.evaluation import (
    SentenceComparison,
    compare_sentences,
    patched,
    sentence_comparison_page,
    sentence_page,
    translated,
    verbatim,
)
from weightpatch.evaluation.differences import Span, differences, distance
from weightpatch.tasks.text import CausalLM, Seq2Seq

PAD = tiny.WORDS - 1
TEXTS = tuple(f"{i % 30 + 1} {i * 7 % 30 + 1} {i * 3 % 30 + 1}" for i in range(8))
SOURCE = "3 4 5"


def kinds():
    told = {"max_new_tokens": 6}
    return Seq2Seq(tiny.marian(), tiny.Words(PAD, 0), told), CausalLM(tiny.gpt2(), tiny.Words(0), told)


def answer(kind):
    return torch.tensor([7, 8, 0] if isinstance(kind, Seq2Seq) else [7, 8])


def made(kind):
    fix = kind.says(SOURCE, answer(kind))
    where = ("model.decoder.layers.1.fc*.weight", "transformer.h.1.mlp.*.weight")[isinstance(kind, CausalLM)]
    return fix, wp.edit(kind.model, fix, RMSProp(lr=1e-2, max_steps=60), parameters=where).raise_for_result()


@given(st.text("ab \n.日本é", max_size=12), st.text("ab \n.日本é", max_size=12))
def test_the_spans_are_both_texts(before, after):
    spans = differences(before, after)
    assert "".join(span.text for span in spans if span.kind != "new") == before
    assert "".join(span.text for span in spans if span.kind != "lost") == after
    assert all(span.text for span in spans)
    assert all(a.kind != b.kind for a, b in pairwise(spans))
    assert 0 <= distance(before, after) <= 1
    if before == after:
        assert {span.kind for span in spans} <= {"same"} and distance(before, after) == 0


def test_differences_are_whole_words():
    found = differences("Click the red window now.", "Click a blue window now!")
    assert found == (
        Span("same", "Click "),
        Span("lost", "the red"),
        Span("new", "a blue"),
        Span("same", " window now"),
        Span("lost", "."),
        Span("new", "!"),
    )
    assert [span.text for span in differences("日本語", "日本人")] == ["日本", "語", "人"]
    assert distance("a b", "a  b\n") == 0 and distance("a b", "c d") == 1 and distance("a b", "a c") == 0.5


def comparison(**changes):
    given = {
        "texts": ("t0", "t1", "t2", "t3"),
        "before": ("the red cat sat", "a dog", "a bird", "one fish"),
        "after": ("the red cow sat", "a dog", "the bird", "two fish"),
        "kl": (0.1, 0.0, 0.3, 0.2),
        "drift": 0.15,
        "references": ("the red cat sat", "a dog", "the bird", "three dish"),
        "scoring": verbatim(),
    }
    return SentenceComparison(**{**given, **changes})


def test_the_most_harm_comes_first():
    found = comparison()
    assert found.changed == (0, 3, 2)  # lost, as wrong as before, and won
    assert found.scores == (50.0, 50.0) and found.drawdown.value == 0
    assert found.loss.value == 0 and found.loss.low < 0 < found.loss.high
    assert found.share.value == 0.75
    bare = comparison(references=None, scoring=None)
    assert bare.changed == (2, 3, 0)  # half of the words changed twice, then by divergence
    assert bare.scores is bare.loss is bare.drawdown is None and "BLEU" not in str(bare)
    assert [row["item"] for row in bare.to_json()["rows"]] == [2, 3, 0]
    named = comparison(references=None, scoring=None, items=(11, 12, 13, 14))
    assert [row["item"] for row in named.to_json()["rows"]] == [13, 14, 11]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"after": ("a",)}, "4 and 1 answers"),
        ({"texts": (), "before": (), "after": (), "kl": (), "references": None, "scoring": None}, "at least 1"),
        ({"scoring": None}, "belong together"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, told):
    with pytest.raises(InvalidInput, match=told):
        comparison(**changes)


def test_scores_are_those_of_sacrebleu():
    import sacrebleu

    answers, references = ["the red cat sat down here", "a dog"], ["the red cat sat there", "a dog"]
    scoring = translated()
    assert scoring.whole(answers, references) == sacrebleu.corpus_bleu(answers, [references]).score
    assert scoring.each(answers[0], references[0]) == sacrebleu.sentence_chrf(answers[0], [references[0]]).score
    assert "nrefs:1" in scoring.signature and "tok:13a" in scoring.signature and "chrF2" in scoring.signature
    begins = verbatim(begins=True)
    assert begins.whole([" Paris, of course", "Lyon"], ["Paris", "Paris"]) == 50
    assert verbatim().each("Paris, of course", "Paris") == 0


WORDS = st.lists(st.lists(st.sampled_from(["abc", "de", "fgh", "."]), max_size=7).map(" ".join), min_size=1, max_size=8)


@settings(max_examples=15, deadline=None)
@given(WORDS, st.randoms(use_true_random=False))
def test_what_bleu_loses_is_the_difference_of_sacrebleus(before, random):
    after, references = (random.sample(before, len(before)) for _ in range(2))
    scoring = translated()
    found = scoring.lost(before, after, references, 0.95)
    assert found.value == scoring.whole(before, references) - scoring.whole(after, references)
    assert found == scoring.lost(before, after, references, 0.95) and found.low <= found.high
    assert scoring.lost(before, before, references, 0.95).high == 0


def test_the_interval_of_bleu_is_that_of_drawing_sentences_anew():
    import sacrebleu

    random = np.random.default_rng(0)
    references = [" ".join(random.choice(list("abcdefgh"), 9)) for _ in range(60)]
    before, after = (
        [" ".join(w if random.random() > share else "z" for w in reference.split()) for reference in references]
        for share in (0.1, 0.2)
    )

    def score(answers, rows):
        return sacrebleu.corpus_bleu([answers[i] for i in rows], [[references[i] for i in rows]]).score

    draws = [random.integers(0, 60, 60) for _ in range(150)]
    lost = [score(before, rows) - score(after, rows) for rows in draws]
    found = translated().lost(before, after, references, 0.95)
    low, high = np.quantile(lost, [0.025, 0.975])
    assert 0 < found.low < found.value < found.high
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.25 * (high - low))
    assert translated().lost(after, before, references, 0.95).value == pytest.approx(-found.value)


def test_what_accuracy_loses_is_paired():
    references = ["yes"] * 40
    found = verbatim().lost(["yes"] * 39 + ["no"], ["yes"] * 35 + ["no"] * 4 + ["yes"], references, 0.95)
    assert found == paired_difference(4, 1, 40).scaled(100)


def test_the_change_of_a_score_is_told_with_its_interval():
    lost = comparison(after=("the red cow sat", "a dog", "a bird", "two fish")).drawdown
    assert lost.value == 25 and lost.low < 0 < lost.high
    told = str(comparison(after=("the red cow sat", "a dog", "a bird", "two fish")))
    assert f"accuracy 50.00 -> 25.00 (-25.00 [{-lost.high:+.2f}, {-lost.low:+.2f}])" in told


def test_a_missing_sacrebleu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingExtra, match=r"weightpatch\[mt\]"):
        translated()


def test_evaluation_imports_neither_sacrebleu_nor_transformers():
    code = "import sys, weightpatch.evaluation; assert not {'sacrebleu', 'transformers', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", kinds(), ids=["encoder-decoder", "language model"])
def test_a_comparison_is_that_of_single_answers(kind):
    _, found = made(kind)
    after = patched(kind.model, found.patch)
    told = compare_sentences(kind, found.patch, TEXTS)
    assert told.before == tuple(kind.text(kind.decoding(text)(kind.model)) for text in TEXTS)
    assert told.after == tuple(kind.text(kind.decoding(text)(after)) for text in TEXTS)
    assert told.changed
    total = tokens = 0
    for row, text in enumerate(TEXTS):
        inputs, labels = kind.forced([text], [kind.decoding(text)(kind.model)])
        with torch.no_grad():
            p, q = (m(**inputs).logits[labels >= 0].double().log_softmax(-1) for m in (kind.model, after))
        kl = (p.exp() * (p - q)).sum(-1)
        assert told.kl[row] == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
        total, tokens = total + float(kl.sum()), tokens + len(kl)
    assert told.drift == pytest.approx(total / tokens, rel=1e-3)
    same = compare_sentences(kind, None, TEXTS)
    assert not same.changed and same.drift == 0


def test_a_patched_copy_leaves_the_model_and_shares_the_rest():
    kind = kinds()[0]
    _, found = made(kind)
    before = {name: value.clone() for name, value in kind.model.state_dict().items()}
    after = patched(kind.model, found.patch)
    assert all(torch.equal(value, before[name]) for name, value in kind.model.state_dict().items())
    assert not wp.patches.applied(kind.model)
    found.patch.apply(kind.model)
    own = after.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in kind.model.state_dict().items())


@pytest.mark.parametrize("place", [0, 1], ids=["encoder-decoder", "language model"])
def test_the_page_of_an_edit(tmp_path, place):
    kind = kinds()[place]
    fix, found = made(kind)
    references = tuple("7 8" for _ in TEXTS)
    page = Page(
        sentence_page(
            tmp_path / "report.html", kind=kind, edit=found, constraint=fix, texts=TEXTS, references=references
        )
    )
    check_self_contained(page)
    facts = json.loads((tmp_path / "report.json").read_text())
    (told,) = facts["sayings"]
    assert told["text"] == SOURCE and told["met"] and told["slack_before"] < 0 <= told["slack_after"]
    assert told["wanted"] == "7 8" and told["after"].startswith("7 8") and told["before"] != told["after"]
    changed = facts["comparison"]["changed"]
    assert changed == sum(facts["kinds"].values()) == page.cards > 0
    assert f"{changed} of 8 test answers changed" in page.text and "tok:13a" in page.text
    assert len(re.findall(r"points \(\s?95 % CI [−+\d]", page.text)) == 2 and set(facts["comparison"]["drawdown"]) == {
        "value",
        "low",
        "high",
    }
    assert len(page.all("del")) and len(page.all("ins"))
    for heading in ("The mistake", "What else changed", "Costs", "How it was made"):
        assert heading in page.text
    assert found.patch.id in page.text


def test_the_page_of_several_demands_and_of_none_that_is_met(tmp_path):
    kind = kinds()[0]
    fix = kind.says(SOURCE, answer(kind)) & kind.preferred("9 8", torch.tensor([4, 0]), 4)
    found = wp.edit(kind.model, fix, RMSProp(lr=1e-5, max_steps=1), parameters="model.decoder.layers.1.*")
    page = Page(sentence_page(tmp_path / "a.html", kind=kind, edit=found, texts=TEXTS))
    check_self_contained(page)
    assert "Not patched" in page.text and "The mistakes" in page.text and page.text.count("✕ not met") == 2
    with pytest.raises(InvalidInput, match="about 2 texts"):
        sentence_page(tmp_path / "a.html", kind=kind, edit=found, sources=[SOURCE], texts=TEXTS)
    with pytest.raises(InvalidInput, match="not both"):
        sentence_page(tmp_path / "a.html", kind=kind, edit=found)


def test_the_page_of_two_models_escapes_and_counts(tmp_path):
    evil = "<script>alert(1)</script>"
    n = 60
    told = SentenceComparison(
        tuple(f"{evil} {i}" for i in range(n)),
        tuple(f"a {i}" for i in range(n)),
        tuple(f"{evil} {i}" for i in range(n)),
        (0.1,) * n,
        0.1,
    )
    page = Page(sentence_comparison_page(tmp_path / "diff.html", told, title=evil))
    check_self_contained(page)
    assert "<script" not in page.source and evil in page.text
    assert page.cards == 40 and "the worst 40 of 60" in page.text and "And 20 more" in page.text
    none = SentenceComparison(("t",), ("a",), ("a",), (0.0,), 0.0)
    assert "No answer changed" in Page(sentence_comparison_page(tmp_path / "diff.html", none, title="a")).text
