"""Attention can be differentiated twice where Editable Training does so, and runs on fused kernels elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import tiny_text as tiny
from torch import Tensor, nn
from torch.nn import functional as F

import weightpatch as wp
from weightpatch.constraints import CausalFrame, Classified, Says, Seq2SeqFrame
from weightpatch.editors import GradientDescent
from weightpatch.network import Network
from weightpatch.training import EditableObjective


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return tiny.spread(LlamaForCausalLM(config).eval())


CAUSAL = CausalFrame(pad=0, options={"use_cache": False})
TRANSLATION = Seq2SeqFrame(start=(tiny.WORDS - 1,), pad=tiny.WORDS - 1, options={"use_cache": False})
MODELS = {  # model, frame, attention and what follows, what follows the last attention
    "marian": (tiny.marian, TRANSLATION, "model.decoder.layers.*", "model.decoder.layers.1.fc*"),
    "gpt2": (tiny.gpt2, CAUSAL, "transformer.h.*", "transformer.h.1.mlp.*"),
    "llama": (llama, CAUSAL, "model.layers.*", "model.layers.1.mlp.*"),
}
DIGITS = {"marian": 1e-9, "gpt2": 1e-9, "llama": 1e-5}  # Llama's norms, and its eager softmax, are in float32 always
WAYS = {"one graph": 1e9, "step by step": 0.0}


def source(*ids: int) -> dict[str, Tensor]:
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def kept(frame: Any) -> wp.Locality:
    """Two rows of different lengths: one is padded, and masked."""
    sources = [source(9, 3, 2), source(4, 8, 1)]
    inputs, labels = frame.rows(sources, [torch.tensor([5, 7, 11, 6]), torch.tensor([12, 2])])
    return wp.Locality(inputs, labels >= 0)


def fix(frame: Any, margin: float) -> Says:
    return Says(source(5, 6, 7), torch.tensor([8, 9, 10, 3]), frame, margin)


def gradient(model: nn.Module, objective: EditableObjective, frame: Any) -> tuple[float, dict[str, Tensor]]:
    loss = objective([fix(frame, 50.0)], keep=kept(frame))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


@pytest.mark.parametrize("graph_bytes", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_training_through_fused_attention_is_that_through_eager_attention(name: str, graph_bytes: float):
    make, frame, attention, _ = MODELS[name]
    found = {}
    for implementation in ("sdpa", "eager"):
        model = make().double()
        model.set_attn_implementation(implementation)
        objective = EditableObjective(
            model,
            GradientDescent(lr=1e-2, max_steps=3),
            parameters=attention,
            c_edit=0.5,
            c_loc=0.5,
            graph_bytes=graph_bytes,
        )
        found[implementation] = gradient(model, objective, frame)
        assert objective.terms.steps == 3
    (loss, grads), (expected, wanted) = found["sdpa"], found["eager"]
    assert loss == pytest.approx(expected, rel=DIGITS[name])
    assert grads.keys() == wanted.keys() and any("attn" in name for name in wanted)
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for key, grad in wanted.items():
        assert float((grads[key] - grad).abs().max()) <= DIGITS[name] * largest, key


@pytest.mark.parametrize("name", ["marian", "gpt2"])
def test_its_gradient_meets_finite_differences(name: str):
    make, frame, attention, _ = MODELS[name]
    model = make().double()
    assert model.config._attn_implementation == "sdpa"
    editor = GradientDescent(lr=1e-2, max_steps=2)

    def objective(of: nn.Module) -> EditableObjective:  # the reference of L_loc is a constant, which differences miss
        return EditableObjective(of, editor, parameters=attention, c_edit=1.0, c_loc=0.0)

    _, grads = gradient(model, objective(model), frame)
    torch.manual_seed(1)
    along = {key: torch.randn_like(grad) for key, grad in grads.items()}
    if name == "marian":  # torch takes the padding's embedding for a constant, and this decoder starts with it
        along["model.shared.weight"][-1] = 0

    def at(t: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for key, p in moved.named_parameters():
                if key in along:
                    p.add_(along[key], alpha=t)
            return float(objective(moved)([fix(frame, 50.0)], keep=kept(frame)))

    expected = sum(float((grads[key] * step).sum()) for key, step in along.items())
    assert expected == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_replay_of_fused_attention_is_that_of_eager_attention(name: str):
    make, frame, attention, late = MODELS[name]
    for parameters in (attention, late):
        plans, answers = [], []
        for implementation in ("sdpa", "eager"):
            model = make()
            model.set_attn_implementation(implementation)
            network = Network(model, parameters)
            recording = network.record(kept(frame).inputs)
            moved = {key: 1.1 * value for key, value in network.start.items()}
            with torch.no_grad():
                replayed, full = network.run(moved, recording), network.full(moved)(**kept(frame).inputs)
            assert torch.equal(replayed.logits, full.logits)
            plans.append(set(recording.plan.names))
            answers.append(full.logits)
        assert plans[0] == plans[1] and plans[0]
        assert torch.allclose(*answers, rtol=1e-4, atol=1e-4)


NOTED: list[bool] = []


class Noting(nn.Module):
    """Attention with a readout, which notes whether fused kernels were allowed in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(10, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        NOTED.append(torch.backends.cuda.flash_sdp_enabled())  # which the CPU obeys too
        q, k, v = self.mix(self.embed(tokens))[:, None].chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


@pytest.mark.parametrize("first_order", [False, True], ids=["exact", "first order"])
def test_kernels_with_second_derivatives_run_in_the_steps_of_editable_training_alone(first_order: bool):
    model, seen = Noting(), NOTED
    demand = Classified(torch.tensor([[1, 2, 3]]), torch.tensor([2]), margin=50.0)
    keep = wp.Locality(torch.randint(10, (4, 3)))
    editor = GradientDescent(lr=1e-2, max_steps=3)
    seen.clear()
    objective = EditableObjective(model, editor, parameters="mix.*", replay=False, first_order=first_order)
    objective(demand, keep=keep).backward()
    assert model.mix.weight.grad.abs().max() > 0
    assert any(seen) and (not all(seen)) == (not first_order)
    seen.clear()
    with torch.no_grad():
        objective(demand, keep=keep)
    model(torch.tensor([[1]]))
    assert wp.edit(model, demand, editor, keep=keep, parameters="mix.*").steps == 3
    assert all(seen)
