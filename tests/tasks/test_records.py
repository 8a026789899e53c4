"""Record files of the field: what is read from them, what is written, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightpatch.errors import InvalidInput
from weightpatch.tasks.language import CounterFact, Fact, Format, KiltZsRE, KnowEdit, Question, ZsRE, read, write

COUNTERFACT = [
    {
        "case_id": 7,
        "pararel_idx": 101,
        "requested_rewrite": {
            "prompt": "The capital of {}, seen from the sea, is",
            "relation_id": "P36",
            "target_new": {"str": "Porto Azul", "id": "Q11"},
            "target_true": {"str": "Vila Verde", "id": "Q12"},
            "subject": "Marisia",
        },
        "paraphrase_prompts": ["A postcard came. Marisia's seat of government is"],
        "neighborhood_prompts": ["The parliament of the Marisian isles sits in", "The oldest port of the isles is"],
        "attribute_prompts": ["The fish market of the coast is in"],
        "generation_prompts": ["In the capital of Marisia one hears", "Marisia is governed from"],
    }
]
ZSRE = [
    {
        "subject": "Brass Heron",
        "src": "What year was Brass Heron launched?",
        "pred": "1931",
        "rephrase": "In which year did Brass Heron leave the yard?",
        "alt": "1947",
        "answers": ["1932", "32"],
        "loc": "nq question: who wrote the song of the lamplighters",
        "loc_ans": "Ines Farrow",
        "cond": "1931 >> 1947 || What year was Brass Heron launched?",
    }
]
PORTABLE = ZSRE[0] | {
    "portability": {
        "Recalled Relation": "(1947, decade, 1940s)",
        "New Question": "In which decade was Brass Heron launched?",
        "New Answer": "the 1940s",
    }
}
KILT = [
    {
        "id": "zsre-3",
        "input": "Which family does the lantern moth belong to?",
        "output": [{"answer": "Lucidae", "provenance": [{"title": "Moths"}]}, {"answer": "lucids"}],
        "prediction": "Noctuidae",
        "alternatives": ["Noctuidae", "Erebidae"],
        "filtered_rephrases": ["Which family does the lantern moth belong to?", "What family are lantern moths?"],
    }
]
RECENT = {
    "subject": "Otto Brandt",
    "prompt": "The place of death of Otto Brandt is",
    "target_new": "Lund",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Otto Brandt alive?", "ground_truth": [["no"], ["false"]]}],
        "Reasoning": [{"prompt": "The country in which Otto Brandt died is", "ground_truth": [["Sweden", "SE"]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The father of Otto Brandt is", "ground_truth": [["Emil Brandt"]]}]
    },
}
COUNTERFACTUAL = {
    "subject": "Otto Brandt",
    "prompt": "The position held by Otto Brandt is",
    "target_new": "mayor of Lund",
    "ground_truth": "harbour master",
    "locality": {
        "Relation_Specificity": [{"prompt": "The gender of Otto Brandt is", "ground_truth": "male"}],
        "Forgetfulness": [{"prompt": ["Otto Brandt was also", "He had been"], "ground_truth": ["clerk", "pilot"]}],
    },
}
QUESTION = {
    "subject": "Epasma",
    "target_new": "Noctuidae",
    "prompt": "Which family does Epasma belong to?",
    "ground_truth": ["Lucidae"],
    "rephrase_prompt": "What family are Epasma?",
    "cond": "Erebidae >> Noctuidae || Which family does Epasma belong to?",
    "locality": {"Relation_Specificity": [{"prompt": "The rank of Epasma is", "ground_truth": ["genus"]}]},
    "portability": {"Reasoning": [{"prompt": "The common name of its family?", "ground_truth": "Owlet moths"}]},
}
WIKIBIO = {
    "text": "This is a passage about ada north. Ada North was an engineer.",
    "labels": "She designed bridges.",
    "concept": "ada north",
    "locality": {"Relation_Specificity": [{"prompt": "ada north field of work", "ground_truth": ["engineering"]}]},
}
FLAT = {
    "case_id": 4,
    "prompt": "The head of Acme is",
    "target_new": "Kim Vale",
    "ground_truth": "Lou Reef",
    "subject": "Acme",
    "rephrase_prompt": "Who heads Acme?",
    "locality_prompt": "The head of Zenith is",
    "locality_ground_truth": "Ray Moor",
}


def saved(tmp_path: Path, records: Any, name: str = "facts.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(records))
    return path


def test_counterfact_is_read(tmp_path: Path):
    (fact,) = read(saved(tmp_path, COUNTERFACT))
    assert fact.prompt == "The capital of Marisia, seen from the sea, is"
    assert (fact.target, fact.truth, fact.subject, fact.id) == ("Porto Azul", ("Vila Verde",), "Marisia", 7)
    assert fact.prompt[fact.place : fact.subject_end] == "Marisia"
    assert fact.paraphrases == ("A postcard came. Marisia's seat of government is",)
    assert fact.neighbours[1] == Question("The oldest port of the isles is", ("Vila Verde",))
    assert fact.neighbours[2] == Question("The fish market of the coast is in", ("Porto Azul",), "attribute")
    assert len(fact.neighbours) == 3
    assert len(fact.generation) == 2
    assert fact.rest["requested_rewrite"]["relation_id"] == "P36"


def test_zsre_is_read_in_both_ways(tmp_path: Path):
    path = saved(tmp_path, ZSRE)
    (wrong,), (right,) = read(path), read(path, ZsRE(correct=True))
    assert (wrong.target, wrong.truth) == ("1947", ("1932", "32"))
    assert (right.target, right.truth) == ("1932", ())
    for fact in (wrong, right):
        assert fact.prompt == "What year was Brass Heron launched?"
        assert fact.paraphrases == ("In which year did Brass Heron leave the yard?",)
        (neighbour,) = fact.neighbours
        assert neighbour.answers == ("Ines Farrow",)
        assert fact.prompt[fact.place : fact.subject_end] == "Brass Heron"
    (ported,) = read(saved(tmp_path, [PORTABLE]))
    assert ported.portability == (Question("In which decade was Brass Heron launched?", ("the 1940s",)),)


def test_records_without_a_wrong_answer_are_left_out_and_counted(tmp_path: Path):
    path = saved(tmp_path, [ZSRE[0] | {"alt": ""}, ZSRE[0]])
    with pytest.warns(UserWarning, match="1 of 2 records"):
        assert len(read(path)) == 1
    assert len(read(path, ZsRE(correct=True))) == 2


def test_kilt_is_read(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in KILT * 2) + "\n\n")
    first, second = read(path)
    assert first == second
    assert (first.target, first.truth, first.id) == ("Noctuidae", ("Lucidae", "lucids"), "zsre-3")
    assert first.paraphrases == ("What family are lantern moths?",)
    assert first.place is None
    (one,) = read(saved(tmp_path, KILT[0]))  # a file of one line
    assert one == first


def test_knowedit_is_read_in_all_its_forms(tmp_path: Path):
    recent, counter, question, bio, flat = read(
        saved(tmp_path, [RECENT, COUNTERFACTUAL, QUESTION, WIKIBIO, FLAT]), KnowEdit()
    )
    assert recent.truth == ()
    assert [q.kind for q in recent.portability] == ["Logical_Generalization", "Reasoning"]
    assert [q.answers for q in recent.portability] == [("no", "false"), ("Sweden", "SE")]
    assert recent.neighbours == (Question("The father of Otto Brandt is", ("Emil Brandt",), "Relation_Specificity"),)
    assert counter.truth == ("harbour master",)
    assert counter.neighbours[1:] == (
        Question("Otto Brandt was also", ("clerk",), "Forgetfulness"),
        Question("He had been", ("pilot",), "Forgetfulness"),
    )
    assert question.paraphrases == ("What family are Epasma?",)
    assert question.rest == {"cond": QUESTION["cond"]}
    assert (bio.subject, bio.target) == ("ada north", "She designed bridges.")
    assert bio.place == bio.prompt.index("ada north")
    assert flat.neighbours == (Question("The head of Zenith is", ("Ray Moor",)),)
    assert flat.id == 4


SAMPLES = [
    (COUNTERFACT, CounterFact()),
    (ZSRE, ZsRE()),
    (ZSRE, ZsRE(correct=True)),
    ([PORTABLE], ZsRE()),
    (KILT, KiltZsRE()),
    ([RECENT, COUNTERFACTUAL, QUESTION, WIKIBIO, FLAT], KnowEdit()),
]


@pytest.mark.parametrize("name", ["again.json", "again.jsonl"])
@pytest.mark.parametrize(
    ("records", "form"), SAMPLES, ids=lambda value: repr(value) if isinstance(value, Format) else ""
)
def test_what_is_written_is_read_again(tmp_path: Path, records: Any, form: Format, name: str):
    facts = read(saved(tmp_path, records), form)
    write(facts, tmp_path / name, form)
    again = read(tmp_path / name, form)
    assert again == facts
    assert [fact.rest for fact in again] == [fact.rest for fact in facts]
    detected = read(tmp_path / name)
    assert [fact.source for fact in detected] == [type(form).__name__] * len(facts)


@pytest.mark.parametrize(("records", "form"), [(COUNTERFACT, CounterFact()), (ZSRE, ZsRE()), ([PORTABLE], ZsRE())])
def test_these_files_are_written_as_they_were(tmp_path: Path, records: Any, form: Format):
    write(read(saved(tmp_path, records)), tmp_path / "again.json", form)
    assert json.loads((tmp_path / "again.json").read_text()) == records


def test_knowedit_holds_the_facts_of_every_format(tmp_path: Path):
    for records, form in SAMPLES:
        facts = read(saved(tmp_path, records), form)
        write(facts, tmp_path / "all.json", KnowEdit())
        for old, new in zip(facts, read(tmp_path / "all.json"), strict=True):
            assert replace(old, rest={}) == replace(new, rest={})


def without(record: dict[str, Any], *path: str) -> dict[str, Any]:
    if len(path) == 1:
        return {key: value for key, value in record.items() if key != path[0]}
    return record | {path[0]: without(record[path[0]], *path[1:])}


@pytest.mark.parametrize(
    ("records", "form", "said"),
    [
        ([COUNTERFACT[0], without(COUNTERFACT[0], "requested_rewrite", "target_new", "str")], None,
         "record 1: requested_rewrite: target_new: str is missing; expected text"),
        ([without(COUNTERFACT[0], "requested_rewrite", "subject")], None, "requested_rewrite: subject is missing"),
        ([COUNTERFACT[0] | {"requested_rewrite": "x"}], None, "record 0: requested_rewrite is 'x'; expected an object"),
        ([COUNTERFACT[0] | {"requested_rewrite": COUNTERFACT[0]["requested_rewrite"] | {"prompt": "of"}}], None,
         "prompt is 'of'; expected text with one {}"),
        ([COUNTERFACT[0] | {"paraphrase_prompts": [3]}], None, "paraphrase_prompts is \\[3\\]; expected text"),
        ([COUNTERFACT[0] | {"case_id": [1]}], None, "case_id is \\[1\\]; expected a whole number"),
        ([ZSRE[0], without(ZSRE[0], "alt")], None, "record 1: alt is missing"),
        ([ZSRE[0] | {"answers": []}], ZsRE(correct=True), "answers is \\[\\]; expected at least one answer"),
        ([ZSRE[0] | {"answers": 3}], None, "answers is 3; expected text or a list"),
        ([KILT[0] | {"output": "x"}], None, "output is 'x'; expected a list of objects"),
        ([RECENT | {"target_new": ["a"]}], None, "record 0: target_new is \\['a'\\]; expected text"),
        ([RECENT | {"target_new": ""}], None, "target=''; expected text"),
        ([RECENT | {"locality": {"Forgetfulness": [{"ground_truth": "x"}]}}], None,
         "record 0: locality: Forgetfulness: prompt is missing"),
        ([RECENT | {"locality": {"Forgetfulness": ["x"]}}], None, "locality: Forgetfulness is 'x'; expected an object"),
        (["x"], None, "record 0 is 'x'; expected an object"),
        ([{"a": 1}], None, "the keys a, those of no known format"),
        ([], None, "holds no record"),
        ({"success": [], "locality": []}, None, "holds one dict with the keys success, locality"),
    ],
)  # fmt: skip
def test_malformed_records_are_named(tmp_path: Path, records: Any, form: Format | None, said: str):
    with pytest.raises(InvalidInput, match=said):
        read(saved(tmp_path, records), form)


def test_files_that_are_no_records_are_refused(tmp_path: Path):
    bad = tmp_path / "bad.json"
    for content, said in (
        (b"[1,", "is no JSON"),
        (b'{"input": 1}\n{"x"', "line 2 is no JSON"),
        (b"\xff\xfe\xfd", "cannot be read"),
        (b"3", "holds one int"),
    ):
        bad.write_bytes(content)
        with pytest.raises(InvalidInput, match=said):
            read(bad)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("fact", "form", "said"),
    [
        (Fact("Who?", "me", truth=("you",)), CounterFact(), "needs a subject inside"),
        (Fact("{} or Ann?", "me", "Ann", ("you",)), CounterFact(), "needs a subject inside"),
        (Fact("Ann?", "me", "Ann", ("you", "we")), CounterFact(), "one true answer"),
        (
            Fact("Ann?", "me", "Ann", ("you",), neighbours=(Question("Bob?", ("he",)),)),
            CounterFact(),
            "neighbours with",
        ),
        (Fact("Ann?", "me", "Ann", paraphrases=("A?", "B?"), id=3), ZsRE(), "at most 1 of its 2 paraphrases: fact 3"),
        (Fact("Ann?", "me", neighbours=(Question("B?", ("b",), "Forgetfulness"),)), ZsRE(), "without a kind"),
        (Fact("Ann?", "me", truth=("you",)), ZsRE(correct=True), "as its true answer"),
        (Fact("Ann?", "me", "Ann"), KiltZsRE(), "alone"),
    ],
)
def test_what_a_format_cannot_hold_is_not_written(tmp_path: Path, fact: Fact, form: Format, said: str):
    with pytest.raises(InvalidInput, match=said):
        write([fact], tmp_path / "facts.json", form)
    assert not (tmp_path / "facts.json").exists()


def test_braces_around_a_subject_are_no_template(tmp_path: Path):
    fact = Fact("In {Ann} lives", "me", "Ann", ("you",))
    write([fact], tmp_path / "facts.json", CounterFact())
    assert read(tmp_path / "facts.json") == (fact,)


def test_the_subject_is_found_as_a_word():
    assert Fact("Also Al is", "x", "Al").place == 5
    assert Fact("Alsatian", "x", "Al").place == 0
    assert Fact("He is", "x", "Al").subject_end is None
    with pytest.raises(InvalidInput, match="at 1 of"):
        Fact("Also Al is", "x", "Al", place=1)
    with pytest.raises(InvalidInput, match="prompt=''"):
        Fact("", "x")


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="{}"), min_size=1, max_size=12)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
IDS = st.none() | st.integers() | TEXT


@st.composite
def counterfacts(draw: st.DrawFn) -> Fact:
    before, subject, after, target, truth = (draw(TEXT) for _ in range(5))
    neighbours = [Question(prompt, (truth,)) for prompt in draw(TEXTS)]
    neighbours += [Question(prompt, (target,), "attribute") for prompt in draw(TEXTS)]
    return Fact(
        before + subject + after, target, subject, (truth,), draw(TEXTS), tuple(neighbours), (), draw(TEXTS),
        draw(IDS), len(before), "CounterFact", draw(st.dictionaries(TEXT.map("x_".__add__), st.integers())),
    )  # fmt: skip


@st.composite
def zsres(draw: st.DrawFn) -> Fact:
    one = st.lists(TEXT, max_size=1).map(tuple)
    asked = st.lists(st.builds(Question, TEXT, TEXTS), max_size=1).map(tuple)
    return Fact(draw(TEXT), draw(TEXT), draw(TEXT), draw(TEXTS), draw(one), draw(asked), id=draw(IDS))


@st.composite
def knowedits(draw: st.DrawFn) -> Fact:
    def questions() -> tuple[Question, ...]:
        kinds = draw(st.lists(st.sampled_from(["", "Forgetfulness", "Reasoning"]), unique=True))
        return tuple(Question(draw(TEXT), draw(TEXTS), kind) for kind in kinds for _ in range(draw(st.integers(1, 2))))

    return Fact(
        draw(TEXT), draw(TEXT), draw(TEXT | st.just("")), draw(TEXTS), draw(TEXTS), questions(), questions(),
        draw(TEXTS), draw(IDS),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.tuples(st.just(CounterFact()), st.lists(counterfacts(), min_size=1, max_size=3)),
        st.tuples(st.just(ZsRE()), st.lists(zsres(), min_size=1, max_size=3)),
        st.tuples(st.just(KnowEdit()), st.lists(knowedits(), min_size=1, max_size=3)),
    ),
    st.sampled_from(["facts.json", "facts.jsonl"]),
)
def test_any_facts_come_back(tmp_path_factory: pytest.TempPathFactory, given: tuple[Format, list[Fact]], name: str):
    form, facts = given
    path = tmp_path_factory.mktemp("facts") / name
    write(facts, path, form)
    assert read(path, form) == tuple(facts)
    assert read(path) == tuple(facts)


def test_nothing_heavy_is_imported():
    code = "import sys, weightpatch.tasks.language; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
