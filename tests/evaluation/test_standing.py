from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import tiny_text as tiny
from hypothesis import given
from hypothesis import strategies as st

from weightpatch.evaluation import standing
from weightpatch.evaluation.guessing import Guessing, Lost, continued
from weightpatch.evaluation.standing import ByLogits, ByStates, Forced, standing_of
from weightpatch.network import Network
from weightpatch.tasks import text
from weightpatch.tasks.text._readout import readout_of
from weightpatch.training import SparseBlock, add_block

PAD = tiny.WORDS - 1
TEXTS = tuple(" ".join(str(1 + (7 * i + 3 * j) % (PAD - 1)) for j in range(1 + i % 5)) for i in range(24))
LAST = {"translator": "model.decoder.layers.1.fc2.*", "language": "transformer.h.1.mlp.c_proj.*"}


def views(name, block=False):
    if name == "translator":
        model = tiny.marian()
        model.generation_config.forced_eos_token_id = None
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(3))
        kind = text.Seq2Seq(model, tiny.Words(PAD, 0), {"max_new_tokens": 7})
    else:
        kind = text.CausalLM(tiny.gpt2(), tiny.Words(0), {"max_new_tokens": 7})
    parameters = LAST[name]
    if block:
        parameters = add_block(kind.model, "lm_head", 32, kind=SparseBlock)
    network = Network(kind.model, parameters)
    base = kind.generate(TEXTS)
    forced = [
        Forced(tuple(some), *kind.forced([TEXTS[i] for i in some], [base[i] for i in some]))
        for some in (range(0, 9), range(9, 24))
    ]
    return kind.model, network, forced


def moved(network, scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: value + scale * torch.randn(value.shape, generator=generator) for key, value in network.start.items()}


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 0.03, 0.1, 5.0])
@pytest.mark.parametrize("name", LAST)
def test_states_say_what_logits_say(name, scale, block):
    model, network, forced = views(name, block)
    fast, slow = standing_of(network, forced, readout_of(model, network.names)), ByLogits(network, forced)
    assert isinstance(fast, ByStates)
    params = moved(network, scale)
    with network.isolated(), torch.no_grad():
        (lost, drift), (truly, exact) = fast.look(params), slow.look(params)
    assert lost == truly and list(lost) == sorted(lost)
    assert drift == pytest.approx(exact, rel=1e-3, abs=1e-8)
    assert scale < 5 or len(lost) > 3


@pytest.mark.parametrize("name", LAST)
def test_most_tokens_are_not_looked_at_after_a_small_edit(name, monkeypatch):
    model, network, forced = views(name)
    fast = standing_of(network, forced, readout_of(model, network.names))
    seen = []
    monkeypatch.setattr(standing, "_note", lambda lost, places, logits, labels: seen.append(len(logits)))
    with network.isolated(), torch.no_grad():
        fast.look(moved(network, 1e-4))
    assert sum(seen) < len(fast._labels) / 4


def test_what_does_not_move_stays_however_narrowly_it_wins():
    model, network, forced = views("translator")
    fast = standing_of(network, forced, readout_of(model, network.names))
    fast._radius.fill_(-1.0)
    with network.isolated(), torch.no_grad():
        assert fast.look(network.start) == ({}, 0.0)
        assert len(fast.look(moved(network, 1e-3))[0]) == 0  # looked at, and found to win


def test_of_many_tokens_the_divergence_is_estimated_without_bias(monkeypatch):
    model, network, forced = views("language")
    exact = ByLogits(network, forced)
    fast = standing_of(network, forced, readout_of(model, network.names))
    params = moved(network, 1e-3)
    monkeypatch.setattr(standing, "_SAMPLED", 40)
    found = []
    make = torch.Generator
    with network.isolated(), torch.no_grad():
        truth = exact.look(params)[1]
        for seed in range(200):
            monkeypatch.setattr(torch, "Generator", lambda seed=seed: _Seeded(make(), seed))
            found.append(fast.look(params)[1])
    monkeypatch.setattr(torch, "Generator", make)
    mean, spread = torch.tensor(found).mean(), torch.tensor(found).std()
    assert 0 < spread < truth / 2
    assert abs(mean - truth) < 4 * spread / len(found) ** 0.5


class _Seeded:
    """Stands for torch.Generator: `manual_seed` takes another seed than the one asked for."""

    def __init__(self, made, seed):
        self.made, self.seed = made, seed

    def manual_seed(self, seed):
        return self.made.manual_seed(self.seed)


def test_an_answer_that_is_not_a_number_is_lost():
    model, network, forced = views("translator")
    fast = standing_of(network, forced, readout_of(model, network.names))
    params = {name: torch.full_like(value, torch.nan) for name, value in network.start.items()}
    with network.isolated(), torch.no_grad():
        lost, drift = fast.look(params)
    assert set(lost) == set(range(24)) and {one.token for one in lost.values()} == {-1}
    assert drift != drift


class Capped(nn.Module):
    """A language model whose logits are not linear in the states."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.lm_head, self.whole = model.base_model, model.lm_head, model

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, **inputs):
        return 5 * torch.tanh(self.whole(**inputs).logits / 5)


class Other(Capped):
    """One whose base model is called in another way."""

    def __init__(self, model):
        super().__init__(model)
        self.base_model = nn.Identity()

    def forward(self, **inputs):
        return self.whole(**inputs).logits


@pytest.mark.parametrize("kind", [Capped, Other])
def test_logits_that_are_not_linear_in_known_states_are_looked_at(kind):
    model, _, forced = views("language")
    capped = kind(model).eval()
    network = Network(capped, "whole.transformer.h.1.mlp.c_proj.*")
    assert readout_of(capped, network.names) is not None
    assert isinstance(standing_of(network, forced, readout_of(capped, network.names)), ByLogits)


def test_a_readout_that_is_edited_or_unknown_is_none():
    model, *_ = views("translator")
    assert readout_of(model, ["model.decoder.layers.1.fc2.weight"]) is not None
    assert readout_of(model, ["lm_head.weight"]) is None  # tied to the embeddings
    assert readout_of(model, ["model.shared.weight"]) is None
    assert readout_of(model.double(), ["model.decoder.layers.1.fc2.weight"]) is None
    assert readout_of(tiny.Plain(), ["out.weight"]) is None


# ---------------------------------------------------------------- guesses


@pytest.mark.parametrize(
    ("written", "old", "rest"),
    [
        ([1, 2, 9], [1, 2, 3, 4, 5], [4, 5]),  # a token is another one
        ([1, 2, 4], [1, 2, 3, 4, 5], [5]),  # one is left out
        ([1, 2, 9, 3], [1, 2, 3, 4, 5], [4, 5]),  # one is put in
        ([7, 8, 9, 3, 4], [1, 2, 3, 4, 5], [5]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3], []),
        ([9], [1], []),
    ],
)
def test_a_guess_goes_on_where_the_old_answer_is_alike(written, old, rest):
    assert list(continued(written, old)) == rest


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 6), min_size=1, max_size=9),
    st.integers(0, 8),
)
def test_greedy_answers_are_found_whatever_is_guessed(seed, old, place):
    """The model is a table of logits by the last two tokens: decoding it plainly is the reference."""
    table = torch.randn(7, 7, 7, generator=torch.Generator().manual_seed(seed))

    def function(tokens):
        before = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.int64), tokens[:, :-1]], 1)
        return table[before, tokens]

    def force(items, answers):
        assert max(map(len, answers)) <= 30  # or a model with few positions could not take them
        padded = nn.utils.rnn.pad_sequence(list(answers), batch_first=True, padding_value=-1)
        shifted = torch.cat([torch.zeros(len(padded), 1, dtype=torch.int64), padded[:, :-1].clamp_min(0)], 1)
        return shifted, padded

    written: list[int] = []
    while len(written) < 30 and 0 not in written:
        two = [0, 0, *written][-2:]
        written.append(int(table[two[0], two[1]].argmax()))
    old = [*written[:place], *old] if 0 not in written[:place] else old
    same = next((i for i, (a, b) in enumerate(zip(old, written, strict=False)) if a != b), len(old))
    if same == len(old) or same >= len(written):
        return
    lost = {0: Lost(same, written[same])}
    found = Guessing(force, frozenset([0]), 30).answers(function, lost, [torch.tensor(old)])
    assert found[0].tolist() == written


def test_answers_that_are_unsure_are_left_to_decoding_and_no_other():
    table = torch.tensor([[0.0, 2.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # after 0: two tokens tie

    def force(items, answers):
        padded = nn.utils.rnn.pad_sequence(list(answers), batch_first=True, padding_value=-1)
        return torch.cat([torch.zeros(len(padded), 1, dtype=torch.int64), padded[:, :-1].clamp_min(0)], 1), padded

    guessing = Guessing(force, frozenset([0]), 8)
    base = [torch.tensor([1, 1, 0]), torch.tensor([2, 2, 0]), torch.tensor([1, 1, 1, 1, 1, 0])]
    assert guessing.answers(lambda t: table[t], {0: Lost(0, -1)}, base) == {}
    (longest,) = guessing.answers(lambda t: table[t], {1: Lost(1, 2)}, base).values()
    assert longest.tolist() == [2] * 8  # never ends
    (forced,) = replace(guessing, last=0).answers(lambda t: table[t], {1: Lost(1, 2)}, base).values()
    assert forced.tolist() == [*[2] * 7, 0]
    (found,) = guessing.answers(lambda t: table[t], {1: Lost(1, 0)}, base).values()
    assert found.tolist() == [2, 0]
