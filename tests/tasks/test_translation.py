from __future__ import annotations

import copy
import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

import weightpatch as wp
from weightpatch.constraints import IGNORED
from weightpatch.editors import MinimumNorm, RMSProp
from weightpatch.errors import InvalidInput
from weightpatch.evaluation.generations import SlowGenerations
from weightpatch.network import Network
from weightpatch.tasks import text, translation
from weightpatch.tasks.translation._pairs import SHIPPED

ROOT = Path(__file__).parents[2]
LAST = "model.decoder.layers.2.*"


@pytest.fixture(scope="module")
def pairs():
    return translation.libreoffice("test")


@pytest.fixture(scope="module", params=["plain", "editable"])
def translator(request):
    return translation.translator(editable=request.param == "editable")


def test_the_pairs_are_split():
    sizes = {split: len(translation.libreoffice(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 42699, "validation": 1000, "test": 2000}
    with pytest.raises(InvalidInput, match="dev"):
        translation.libreoffice("dev")
    assert "Mozilla Public License" in (SHIPPED / "NOTICE").read_text()


def words(sentence):
    return {"0" if word.isdigit() else word for word in re.findall(r"\d+|[^\W\d]+|[^\w\s]", sentence.lower())}


def test_no_training_pair_resembles_a_held_out_one(pairs):
    train = translation.libreoffice("train")
    for side in ("german", "english"):
        known = [words(sentence) for sentence in getattr(train, side)]
        for sentence in getattr(pairs, side)[::100]:
            mine = words(sentence)
            assert max(len(mine & other) / len(mine | other) for other in known) < 0.6


def test_pairs_are_sliced_side_by_side(pairs):
    assert pairs[3:5][0] == pairs[3] == (pairs.german[3], pairs.english[3])
    with pytest.raises(InvalidInput, match="2 sentences and 1 translations"):
        translation.Pairs(("a", "b"), ("c",))


def test_scores_are_those_of_sacrebleu(pairs):
    import sacrebleu

    answers = [sentence.replace("the", "a") for sentence in pairs.english[:50]]
    references = [list(pairs.english[:50])]
    assert translation.bleu(answers, pairs.english[:50]) == sacrebleu.corpus_bleu(answers, references).score
    assert translation.chrf(answers, pairs.english[:50]) == sacrebleu.corpus_chrf(answers, references).score
    with pytest.raises(InvalidInput, match="50 translations and 49"):
        translation.bleu(answers, pairs.english[:49])


def bitext(**told):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(str(SHIPPED / "plain" / "source.spm"))
    ids = json.loads((SHIPPED / "plain" / "vocab.json").read_text())
    return translation.Bitext(translation.libreoffice("validation"), pieces, ids, **told)


def test_batches_have_about_so_many_tokens_and_are_drawn_again():
    data = bitext(tokens=300, alpha=0.2)
    for place in (0, len(data) // 2, len(data) - 1):
        drawn = [data.batch(torch.tensor([place]), torch.Generator().manual_seed(3)) for _ in range(2)]
        assert all(torch.equal(drawn[0][0][key], drawn[1][0][key]) for key in drawn[0][0])
        inputs, labels = drawn[0]
        assert labels.shape == inputs["decoder_input_ids"].shape and len(labels) == len(inputs["input_ids"])
        assert 0 < int((labels != IGNORED).sum()) <= 600
        pad = inputs["decoder_input_ids"][:, 0]
        assert (inputs["decoder_input_ids"][:, 1:] == labels[:, :-1]).where(labels[:, :-1] != IGNORED, True).all()
        assert (pad == pad[0]).all() and bool((inputs["attention_mask"] == (inputs["input_ids"] != pad[0])).all())


def test_the_best_segmentation_is_the_tokenizers(translator, pairs):
    data = bitext(tokens=1)
    german, english = translation.libreoffice("validation")[int(data._order[500])]
    inputs, labels = data.batch(torch.tensor([500]), torch.Generator())
    assert inputs["input_ids"][0].tolist() == translator.source(german)["input_ids"][0].tolist()
    assert labels[0].tolist() == translator.tokens(english).tolist()


def test_the_translator_translates(translator, pairs):
    some = pairs[:100]
    answers = [translator.text(tokens) for tokens in translator.generate(some.german)]
    stored = json.loads((SHIPPED / "plain" / "measured.json").read_text())
    assert translation.bleu(answers, some.english) > stored["bleu"] - 8
    assert sum(p.numel() for p in translator.model.parameters()) < 6e6


def test_without_an_edit_the_editable_one_is_the_plain_one_bit_for_bit(pairs):
    plain, editable = translation.translator(), translation.translator(editable=True)
    inputs, _ = plain.forced(pairs.german[:8], pairs.english[:8])
    with torch.no_grad():
        assert torch.equal(plain.model(**inputs).logits, editable.model(**inputs).logits)


def test_the_editable_one_is_edited_where_it_was_trained_to_be(pairs):
    editable = translation.translator(editable=True)
    editor = translation.editor(editable, 60)
    wrong = next(i for i in range(300, 400) if editable.answer(pairs.german[i]) != pairs.english[i])
    fix = editable.says(pairs.german[wrong], pairs.english[wrong])
    found = wp.edit(editable.model, fix, editor, parameters=translation.EDITED).raise_for_result()
    with found.patch.applied(editable.model):
        assert editable.answer(pairs.german[wrong]) == pairs.english[wrong]
    assert editable.answer(pairs.german[wrong]) != pairs.english[wrong]
    for kind, reference in ((translation.translator(), 60), (editable, 0)):
        with pytest.raises(InvalidInput, match="editable=True"):
            translation.editor(kind, reference)


def test_the_configurations_are_those_of_the_shipped_models():
    for name in ("plain", "editable"):
        told = tomllib.loads((ROOT / "examples" / "translator" / f"{name}.toml").read_text())
        assert json.loads((SHIPPED / name / "measured.json").read_text())["steps"] == told["steps"]
    config = json.loads((SHIPPED / "plain" / "config.json").read_text())
    shape = tomllib.loads((ROOT / "examples" / "translator" / "first.toml").read_text())["model"]
    assert (config["d_model"], config["encoder_layers"], config["decoder_ffn_dim"]) == (
        shape["width"],
        shape["layers"],
        shape["inner"],
    )


@pytest.mark.parametrize("editor", [RMSProp(lr=1e-3, max_steps=200), MinimumNorm()], ids=lambda e: type(e).__name__)
def test_a_reference_is_said_after_an_edit_and_no_longer_after_its_revert(translator, pairs, editor, tmp_path):
    before = copy.deepcopy(translator.model.state_dict())
    wrong = next(i for i in range(300, 400) if translator.answer(pairs.german[i]) != pairs.english[i])
    fix = translator.says(pairs.german[wrong], pairs.english[wrong])
    said = translator.answer(pairs.german[wrong])
    found = wp.edit(translator.model, fix, editor, parameters="model.decoder.layers.2.fc2.*")
    found.raise_for_result().patch.save(tmp_path / "fix.patch.safetensors")
    model = copy.deepcopy(translator.model)
    patch = wp.Patch.load(tmp_path / "fix.patch.safetensors")
    patch.apply(model)
    wanted = translator.text(translator.tokens(pairs.english[wrong]))
    assert translator.text(translator.decoding(pairs.german[wrong])(model)) == wanted
    patch.revert(model)
    assert translator.text(translator.decoding(pairs.german[wrong])(model)) == said
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in translator.model.state_dict().items())


def test_beams_are_edited_as_deployed(pairs):
    beam = translation.translator(settings={"num_beams": 5, "max_new_tokens": 80})
    wrong = next(i for i in range(300, 400) if beam.answer(pairs.german[i]) != pairs.english[i])
    fix = beam.says(pairs.german[wrong], pairs.english[wrong])
    found = wp.edit(beam.model, fix, RMSProp(lr=1e-3, max_steps=200), parameters=LAST)
    model = copy.deepcopy(beam.model)
    found.raise_for_result().patch.apply(model)
    assert beam.decoding(pairs.german[wrong])(model).tolist() == fix.answer.tolist()


def test_replayed_passes_are_full_passes(translator, pairs):
    network = Network(translator.model, LAST)
    inputs, _ = translator.forced(pairs.german[:5], pairs.english[:5])
    params = {name: value + 0.01 * torch.randn_like(value) for name, value in network.start.items()}
    with torch.no_grad():
        network.before(**inputs)
        torch.testing.assert_close(network.at(params)(**inputs).logits, network.full(params)(**inputs).logits)


def test_what_is_decoded_anew_is_enough(translator, pairs):
    network = Network(translator.model, "model.decoder.layers.2.fc2.*")
    translator = replace(translator, settings={"max_new_tokens": 30})
    fast = text.generations(translator, network, pairs.german[:40])
    slow = SlowGenerations(network, fast.base, fast._forced, fast._generate)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.001, 0.01):
        params = {n: v + scale * torch.randn(v.shape, generator=generator) for n, v in network.start.items()}
        a, b = fast.predict(params), slow.predict(params)
        assert {i: t.tolist() for i, t in a.changed.items()} == {i: t.tolist() for i, t in b.changed.items()}
        assert a.drift == pytest.approx(b.drift, rel=0.1, abs=1e-8)  # of tokens that stay, a sample is taken
        assert a.anew < 40
