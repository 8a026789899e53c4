from __future__ import annotations

import copy
import json
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import tiny_text as tiny
from hypothesis import given
from hypothesis import strategies as st

import weightpatch as wp
from weightpatch.editors import Gate, RMSProp
from weightpatch.errors import InvalidInput
from weightpatch.evaluation.generations import SlowGenerations
from weightpatch.network import Network
from weightpatch.tasks import text
from weightpatch.tasks.text import _writing
from weightpatch.tasks.text._generating import _STEP, _batches
from weightpatch.tasks.text._protocol import greedy

PAD = tiny.WORDS - 1
TEXTS = tuple(" ".join(str(1 + (7 * i + 3 * j) % (PAD - 1)) for j in range(1 + i % 5)) for i in range(24))
LAST = {"translator": "model.decoder.layers.1.fc2.*", "language": "transformer.h.1.mlp.c_proj.*"}


def made(name: str, **told) -> text.Generating:
    told = {"max_new_tokens": 7, **told}
    if name == "translator":
        model = tiny.marian()
        model.generation_config.forced_eos_token_id = None
        return text.Seq2Seq(model, tiny.Words(PAD, 0), told)
    return text.CausalLM(tiny.gpt2(), tiny.Words(0), told)


@pytest.fixture(params=LAST)
def name(request):
    return request.param


def views(name, **told):
    kind = made(name, **told)
    network = Network(kind.model, LAST[name])
    fast = text.generations(kind, network, TEXTS)
    anew = lambda model, items: kind.generate([TEXTS[i] for i in items], model)  # noqa: E731
    return kind, network, fast, SlowGenerations(network, fast.base, fast._forced, anew)


def moved(network, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: value + scale * torch.randn(value.shape, generator=generator) for key, value in network.start.items()}


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.03, 0.3])
def test_the_fast_way_answers_as_every_decode_does(name, scale):
    _, network, fast, slow = views(name)
    params = moved(network, scale)
    a, b = fast.predict(params), slow.predict(params)
    assert {i: tokens.tolist() for i, tokens in a.changed.items()} == {
        i: tokens.tolist() for i, tokens in b.changed.items()
    }
    assert a.drift == pytest.approx(b.drift, rel=1e-4, abs=1e-9)
    assert b.anew == len(TEXTS)
    if scale == 0.0:
        assert a.anew < len(TEXTS) / 4 and a.drift == pytest.approx(0, abs=1e-9)
    if scale == 0.3:
        assert len(a.changed) > len(TEXTS) / 4  # or the comparison says nothing


@pytest.mark.parametrize("scale", [1e-3, 0.03, 0.3])
@pytest.mark.parametrize("last", [None, 0])
@pytest.mark.parametrize("first", [None, 5])
def test_forced_tokens_and_answers_as_long_as_the_limit_are_answered_as_by_decoding(first, last, scale):
    kind = made("translator")
    kind.model.generation_config.forced_bos_token_id = first
    kind.model.generation_config.forced_eos_token_id = last
    network = Network(kind.model, LAST["translator"])
    fast = text.generations(kind, network, TEXTS)
    assert max(map(len, fast.base)) == kind.limit == 7 - (first is not None)
    slow = SlowGenerations(
        network, fast.base, fast._forced, lambda model, items: kind.generate([TEXTS[i] for i in items], model)
    )
    params = moved(network, scale)
    found, truth = ({i: t.tolist() for i, t in way.predict(params).changed.items()} for way in (fast, slow))
    assert found == truth
    assert scale < 0.3 or any(len(tokens) == kind.limit for tokens in truth.values())


@pytest.mark.parametrize("left", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("rows", [5, 128])
@pytest.mark.parametrize("last", [None, 0])
@pytest.mark.parametrize("first", [None, 5])
def test_answers_written_together_are_those_of_generate(first, last, rows, left, monkeypatch):
    monkeypatch.setattr(_writing, "_ROWS", rows)
    monkeypatch.setattr(_writing, "_LEFT", left)
    kind = made("translator")
    kind.model.generation_config.forced_bos_token_id = first
    kind.model.generation_config.forced_eos_token_id = last
    kind.model.generation_config.eos_token_id = [0, *range(6, 30, 3)]
    with torch.no_grad():
        kind.model.model.decoder.embed_positions.weight.mul_(40)  # so that it does not say one token for ever
    network = Network(kind.model, "model.decoder.layers.*")
    base = kind.generate(TEXTS)
    writer = _writing.greedy_writer(kind, kind.encoded(TEXTS, network.names), base, last)
    lengths = set[int]()
    for scale in (0.0, 0.1, 0.3):
        model = network.deployed(moved(network, scale))
        items = range(23, -1, -1)
        with network.isolated():
            found = writer(model, items, [len(base[i]) for i in items])
            truth = kind.generate([TEXTS[i] for i in items], model)
        assert [row.tolist() for row in found] == [row.tolist() for row in truth]
        lengths |= {len(row) for row in found}
    assert {1, 2, 3, kind.limit} <= lengths  # they leave one by one


def test_a_model_that_writes_otherwise_is_left_to_generate():
    kind = made("translator")
    base, encoded = kind.generate(TEXTS), kind.encoded(TEXTS, ())
    assert _writing.greedy_writer(kind, encoded, base, None) is not None
    other = [(tokens + 1) % PAD for tokens in base]
    assert _writing.greedy_writer(kind, encoded, other, None) is None
    assert _writing.greedy_writer(kind, lambda some: {}, base, None) is None


@given(st.lists(st.integers(1, 40), min_size=0, max_size=7), st.integers(1, 4))
def test_answers_are_written_together_in_the_cheapest_batches(lengths, most):
    found = _batches(lengths, most)
    assert sorted(i for some in found for i in some) == list(range(len(lengths)))
    assert all(0 < len(some) <= most for some in found)

    def cost(parts):
        return sum(max(lengths[i] for i in part) * (_STEP + len(part)) for part in parts)

    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    ways = []
    for cuts in product([False, True], repeat=max(0, len(order) - 1)):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(order)]
        parts = [order[a:b] for a, b in pairwise(ends)]
        if all(len(part) <= most for part in parts):
            ways.append(cost([part for part in parts if part]))
    assert cost(found) == min(ways)


def test_every_item_is_decoded_where_decoding_is_not_greedy(name):
    _, network, fast, _ = views(name, num_beams=3)
    assert fast.predict(moved(network, 0.0)).anew == len(TEXTS)


@pytest.mark.parametrize(
    ("told", "plain"),
    [({}, True), ({"num_beams": 2}, False), ({"do_sample": True}, False), ({"repetition_penalty": 1.2}, False)],
)
def test_what_counts_as_greedy(told, plain):
    assert greedy(made("translator", **told)) is plain


def test_a_setting_of_the_model_itself_counts_too():
    kind = made("language")
    kind.model.generation_config.no_repeat_ngram_size = 2
    assert not greedy(kind)


def test_without_a_token_of_its_own_a_model_does_not_drift():
    kind = made("translator", max_new_tokens=1)
    kind.model.generation_config.forced_eos_token_id = 0
    network = Network(kind.model, LAST["translator"])
    found = text.generations(kind, network, TEXTS[:4]).predict(moved(network, 0.3))
    assert found.drift == 0.0 and not found.changed


def test_drift_is_the_mean_kl_of_a_token():
    kind, network, fast, _ = views("language")
    params = moved(network, 0.1)
    after = copy.deepcopy(kind.model)
    after.load_state_dict({**after.state_dict(), **params})
    total, count = 0.0, 0
    for source, tokens in zip(TEXTS, fast.base, strict=True):
        prompt = kind.source(source)["input_ids"][0]
        whole = torch.cat([prompt, tokens])[None]
        with torch.no_grad():
            p, q = (
                m(input_ids=whole).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (kind.model, after)
            )
        total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        count += len(tokens)
    assert fast.predict(params).drift == pytest.approx(total / count, rel=1e-4)


def same(answers, references):
    return 100 * sum(a == b for a, b in zip(answers, references, strict=True)) / len(answers)


def test_a_results_file_goes_on_with_more_edits(tmp_path):
    kind, path = made("language"), tmp_path / "rows.jsonl"
    edits = [kind.says(TEXTS[i], torch.tensor([5, 6 + i])) for i in range(4)]

    def run(some, results):
        seen = []
        told = {"texts": TEXTS[:6], "parameters": LAST["language"], "results": results, "progress": seen.append}
        return text.evaluate(kind, some, RMSProp(lr=3e-3, max_steps=20), **told).rows, len(seen)

    def figures(rows):
        return [(row.index, row.steps, row.changed, row.drift) for row in rows]

    whole, _ = run(edits, None)
    assert run(edits[:2], path)[1] == 2
    rows, made_now = run(edits, path)
    assert made_now == 2 and figures(rows) == figures(whole)
    rows, made_now = run(edits[:3], path)
    assert made_now == 0 and figures(rows) == figures(whole[:3])
    with pytest.raises(InvalidInput, match="its edit 1 is"):
        run([edits[0], edits[2]], path)


def test_a_report_says_what_a_plain_loop_finds(name, tmp_path):
    kind = made(name)
    before = copy.deepcopy(kind.model.state_dict())
    answers = [kind.text(tokens) for tokens in kind.generate(TEXTS)]
    edits = [kind.says(TEXTS[i], torch.tensor([5, 6 + i])) for i in range(3)]
    editor = RMSProp(lr=3e-3, max_steps=60)
    seen = []
    report = text.evaluate(
        kind,
        edits,
        editor,
        texts=TEXTS,
        references=answers,
        score=same,
        parameters=LAST[name],
        results=tmp_path / "rows.jsonl",
        progress=seen.append,
    )
    assert report.base_score == 100 and list(report.rows) == seen
    for row, edit in zip(report.rows, edits, strict=True):
        found = wp.edit(kind.model, edit, editor, parameters=LAST[name])
        model = copy.deepcopy(kind.model)
        found.patch.apply(model)
        new = [kind.text(tokens) for tokens in kind.generate(TEXTS, model)]
        assert row.result == found.result.name and row.steps == found.steps
        assert row.decoded == (kind.decoding(TEXTS[row.index])(model)[:2].tolist() == edit.answer.tolist())
        assert row.score == pytest.approx(same(new, answers))
        assert row.changed == pytest.approx(sum(a != b for a, b in zip(new, answers, strict=True)) / len(TEXTS))
    assert all(torch.equal(value, before[key]) for key, value in kind.model.state_dict().items())
    assert report.drawdown.value == pytest.approx(sum(100 - row.score for row in report.edited) / len(report.edited))
    assert {"success", "steps", "drawdown", "changed"} <= set(report.figures())

    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:2]) + '\n{"index": 1, "res')
    again = text.evaluate(
        kind,
        edits,
        editor,
        texts=TEXTS,
        references=answers,
        score=same,
        parameters=LAST[name],
        results=tmp_path / "rows.jsonl",
    )
    assert [{**vars(row), "seconds": 0} for row in again.rows] == [{**vars(row), "seconds": 0} for row in report.rows]
    assert json.loads(lines[0])["base_score"] == 100


def test_a_run_that_reads_the_same_is_another_one(tmp_path):
    kind = made("translator")

    def scoring(by):
        return lambda ours, right: by * same(ours, right)

    def go(**changes):
        told = {"texts": TEXTS, "references": TEXTS, "score": scoring(1), "parameters": LAST["translator"]}
        edits = [kind.says(TEXTS[0], torch.tensor([5, 6]))]
        return text.evaluate(kind, edits, RMSProp(max_steps=2), **{**told, **changes}, results=tmp_path / "rows.jsonl")

    first = go()
    for change, says in (({"score": scoring(2)}, "score is "), ({"keep": kind.kept(TEXTS[4:])}, "keep is None there")):
        with pytest.raises(InvalidInput, match=says):
            go(**change)
    assert go() == first
    kind.model.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(InvalidInput, match="generation.no_repeat_ngram_size is"):
        go()


def test_a_gate_edits_a_sequence_model(name):
    kind = made(name)
    layer = LAST[name].removesuffix(".*")
    edits = [kind.says(TEXTS[3], torch.tensor([5, 6]))]
    report = text.evaluate(
        kind, edits, Gate(layer, 8), texts=TEXTS[4:], parameters=LAST[name], keep=kind.kept(TEXTS[4:])
    )
    assert report.rows[0].decoded and report.base_score is None


def test_what_prefers_a_target_is_judged_by_what_is_generated():
    kind, editor = made("translator"), RMSProp(lr=3e-3, max_steps=200)
    wide = "model.decoder.layers.*"
    edits = []
    for place in range(2, 6):
        target = kind.answers(TEXTS[place], 8)[-1]
        edits.append(kind.preferred(TEXTS[place], target, 8))
        assert len(edits[-1].over) == 7
    report = text.evaluate(kind, edits, editor, texts=TEXTS[8:], parameters=wide)
    for row, fix, source in zip(report.rows, edits, TEXTS[2:6], strict=True):
        found = wp.edit(kind.model, fix, editor, parameters=wide)
        assert found.result is wp.Result.satisfied and row.result == "satisfied"
        model = copy.deepcopy(kind.model)
        found.patch.apply(model)
        said = kind.decoding(source)(model)[: len(fix.target)]
        assert row.decoded == (said.tolist() == fix.target.tolist())
    assert not all(row.decoded for row in report.rows)  # what is preferred need not be what is said


def test_bad_arguments_are_explained():
    kind = made("language")
    fix = kind.says(TEXTS[0], torch.tensor([5]))
    with pytest.raises(InvalidInput, match="0 edits"):
        text.evaluate(kind, [], RMSProp(lr=1e-3), texts=TEXTS)
    with pytest.raises(InvalidInput, match="references and score together"):
        text.evaluate(kind, [fix], RMSProp(lr=1e-3), texts=TEXTS, references=TEXTS)
    with pytest.raises(InvalidInput, match="2 texts and 1 answers"):
        kind.forced(TEXTS[:2], [torch.tensor([1])])
    with pytest.raises(InvalidInput, match="does not exist"):
        text.load("no-such-folder")


@pytest.mark.parametrize(
    "told", [{}, {"num_beams": 3}, {"stopping_criteria": [lambda ids, scores, **_: ids[:, 0] < -1]}]
)
def test_a_decode_goes_no_further_than_it_is_looked_at_where_that_changes_nothing(name, told, monkeypatch):
    kind = made(name, **told)
    kind.model.generation_config.eos_token_id = kind.model.config.eos_token_id = None  # as long as it may be
    passes = []
    kind.model.register_forward_hook(lambda *_: passes.append(1))
    for text_ in TEXTS[:6]:
        passes.clear()
        whole, steps = kind.decoding(text_)(kind.model).tolist(), len(passes)
        assert len(whole) == 7
        for most in (1, 3, 7, 20):
            passes.clear()
            found = kind.decoding(text_, most)(kind.model).tolist()
            assert found == (whole if "num_beams" in told else whole[:most])
            assert len(passes) == (steps if "num_beams" in told else min(most, 7))
