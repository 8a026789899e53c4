from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import tiny_text as tiny

import weightpatch as wp
from weightpatch._identity import digest
from weightpatch.constraints import IGNORED, All, CausalFrame, Kept, Preferred, Says, Seq2SeqFrame, token_scores
from weightpatch.editors import MinimumNorm, RMSProp
from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.network import Network
from weightpatch.tasks.text import CausalLM, Seq2Seq

PAD = tiny.WORDS - 1


def translator(seed: int = 0, **told) -> Seq2Seq:
    return Seq2Seq(tiny.marian(seed), tiny.Words(PAD, 0), {"max_new_tokens": 8, **told})


def language(seed: int = 0, **told) -> CausalLM:
    return CausalLM(tiny.gpt2(seed), tiny.Words(0), {"max_new_tokens": 8, **told})


KINDS = {"encoder-decoder": translator, "language model": language}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]()


def scores(kind, text, sequences):
    """The oracle: one unpadded sequence a pass, and log-softmax as it is written."""
    found = []
    for tokens in sequences:
        with torch.no_grad():
            if isinstance(kind, Seq2Seq):
                before = torch.cat([torch.tensor([PAD]), tokens[:-1]])[None]
                logits = kind.model(**kind.source(text), decoder_input_ids=before).logits[0]
            else:
                prompt = kind.source(text)["input_ids"][0]
                logits = kind.model(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        p = logits.double().softmax(-1)
        found.append(torch.stack([p[t, token].log() for t, token in enumerate(tokens.tolist())]))
    return found


def test_scores_of_padded_rows_are_those_of_single_sequences(kind):
    texts, sequences = ("3 4 5", "6", "7 8"), [torch.tensor(s) for s in ([1, 2, 3, 0], [9, 0], [5, 5, 5, 5, 5, 0])]
    inputs, labels = kind.frame.rows([kind.source(text) for text in texts], sequences)
    with torch.no_grad():
        padded = token_scores(kind.model(**inputs).logits, labels)
    for row, text, tokens in zip(range(3), texts, sequences, strict=True):
        asked = labels[row] != IGNORED
        assert labels[row, asked].tolist() == tokens.tolist()
        torch.testing.assert_close(padded[row, asked].double(), scores(kind, text, [tokens])[0], rtol=1e-4, atol=1e-4)
        assert (padded[row, ~asked] == 0).all()


@pytest.mark.parametrize("total", [False, True])
def test_preferred_is_the_gap_of_mean_or_total_scores(kind, total):
    target, over = torch.tensor([4, 7, 0]), [torch.tensor([4, 0]), torch.tensor([8, 1, 2, 3, 0])]
    fix = Preferred(kind.source("3 4 5"), target, tuple(over), kind.frame, 0.25, total)
    wanted, *others = [s.sum() if total else s.mean() for s in scores(kind, "3 4 5", [target, *over])]
    with torch.no_grad():
        found = fix.violation(kind.model)
    torch.testing.assert_close(
        found.double(), torch.stack([0.25 + other - wanted for other in others]), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=25)
@given(seed=st.integers(0, 30), words=st.lists(st.integers(1, PAD - 1), min_size=1, max_size=5), causal=st.booleans())
def test_says_holds_exactly_where_greedy_decoding_says_it(seed, words, causal):
    kind = language(seed) if causal else translator(seed)
    text = " ".join(map(str, words))
    said = kind.generate([text])[0][:5]
    frame, source = kind.frame, kind.source(text)
    assert Says(source, said, frame).satisfied(kind.model) or 0 in said.tolist()[-1:]  # an end that the length forces
    for place in range(len(said)):
        other = said.clone()
        other[place] = (other[place] + 1) % PAD
        assert not Says(source, other, frame).satisfied(kind.model)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_an_edited_model_generates_the_answer(name, beams):
    kind = KINDS[name](num_beams=beams)
    before = copy.deepcopy(kind.model.state_dict())
    answer = torch.tensor([5, 6, 7, 0] if name == "encoder-decoder" else [5, 6, 7])
    fix = kind.says("3 4 5", answer)
    found = wp.edit(kind.model, fix, RMSProp(lr=3e-3, max_steps=300), keep=kind.kept(["9 8", "7 7 7"]))
    assert found.result is wp.Result.satisfied
    assert all(torch.equal(value, before[key]) for key, value in kind.model.state_dict().items())
    after = copy.deepcopy(kind.model)
    found.patch.apply(after)
    assert kind.generate(["3 4 5"], after)[0][: len(answer)].tolist() == answer.tolist()
    found.patch.revert(after)
    assert all(torch.equal(value, before[key]) for key, value in after.state_dict().items())


def test_what_is_generated_has_the_last_word():
    kind = translator()
    answer, calls = torch.tensor([5, 6, 0]), []

    def decode(model):
        calls.append(model)
        return torch.tensor([8, 9, 0]) if len(calls) == 1 else torch.tensor([5]) if len(calls) == 2 else answer

    fix = Says(kind.source("3 4"), answer, kind.frame, 0.1, decode)
    found = wp.edit(kind.model, fix, RMSProp(lr=3e-3, max_steps=300))
    assert found.result is wp.Result.satisfied and len(calls) == 3
    assert [rival.tolist() for rival in found.constraint.rivals] == [[8, 9, 0]]
    assert found.constraint.margin == pytest.approx(0.25)  # [5] is only a beginning: no rival, so a larger margin
    assert all(type(model) is type(kind.model) and model is not kind.model for model in calls)


@pytest.mark.parametrize("demand", ["says", "preferred"])
def test_a_demand_asks_with_the_same_tensors_every_time_and_is_known_by_the_same_digest(demand):
    kind, seen = translator(), []
    fix = Says(kind.source("3 4"), torch.tensor([5, 6, 0]), kind.frame)
    fix = fix if demand == "says" else kind.preferred("3 4", torch.tensor([5, 6, 0]), over=[torch.tensor([7, 0])])
    name = digest(fix)

    def function(**inputs):
        seen.append(inputs["decoder_input_ids"])
        return kind.model(**inputs)

    first, again = fix.violation(function), fix.violation(function)
    assert seen[0] is seen[1] and torch.equal(first, again)  # what is replayed goes by identity
    assert digest(fix) == name


def test_after_the_first_rival_tokens_have_to_win_by_more():
    kind = translator()
    said = iter([[8, 9, 0], [8, 8, 0], [8, 8, 0], [5]])
    fix = Says(kind.source("3 4"), torch.tensor([5, 6, 0]), kind.frame, 0.1, lambda model: torch.tensor(next(said)))
    told = []
    for _ in range(4):
        fix = fix.refined(kind.model)
        told.append((len(fix.rivals), round(fix.margin, 3)))
    assert told == [(1, 0.1), (2, 0.25), (2, 0.55), (2, 1.15)]


def test_an_edit_that_never_generates_the_answer_is_not_called_satisfied():
    kind = translator()
    fix = Says(kind.source("3 4"), torch.tensor([5, 0]), kind.frame, 0.0, lambda model: torch.tensor([8, 9, 0]))
    found = wp.edit(kind.model, fix, RMSProp(lr=3e-3, max_steps=200))
    assert found.result is wp.Result.unsatisfied
    with pytest.raises(wp.errors.EditFailed):
        found.raise_for_result()


def test_what_is_said_already_is_asked_of_the_decoder_too():
    kind = translator()
    said = kind.generate(["3 4"])[0][:3]
    assert wp.edit(kind.model, Says(kind.source("3 4"), said, kind.frame)).result is wp.Result.already_satisfied
    calls = []

    def decode(model):
        calls.append(1)
        return torch.tensor([8, 9, 0]) if len(calls) == 1 else said

    fix = Says(kind.source("3 4"), said, kind.frame, 0.0, decode)
    found = wp.edit(kind.model, fix, RMSProp(lr=1e-3, max_steps=100))
    assert found.result in (wp.Result.satisfied, wp.Result.already_satisfied) and len(found.constraint.rivals) == 1
    assert len(calls) == 2


def test_a_decoder_that_never_agrees_is_not_overruled_by_demands_that_hold():
    kind = translator()
    said = kind.generate(["3 4"])[0][:3]
    fix = Says(kind.source("3 4"), said, kind.frame, 0.0, lambda model: torch.tensor([8, 9, 0]))
    found = wp.edit(kind.model, fix, RMSProp(lr=1e-3, max_steps=1))
    assert found.result not in (wp.Result.satisfied, wp.Result.already_satisfied)


def test_parts_of_all_are_refined_on_their_own():
    kind = translator()
    a = Says(kind.source("3 4"), torch.tensor([5, 0]), kind.frame, 0.0, lambda model: torch.tensor([8, 0]))
    b = Says(kind.source("4 4"), torch.tensor([6, 0]), kind.frame)
    refined = (a & b).refined(kind.model)
    assert isinstance(refined, All) and len(refined.parts[0].rivals) == 1 and refined.parts[1] is b
    assert (b & b).refined(kind.model) is None and Kept(torch.zeros(1, 2)).refined(kind.model) is None


@settings(max_examples=20)
@given(
    asked=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(0, 2)), min_size=1, max_size=8),
    causal=st.booleans(),
)
def test_neighbours_of_one_shape_are_asked_in_one_pass(asked, causal):
    kind = language() if causal else translator()
    parts = [
        Says(
            kind.source(" ".join(["3 4", "5 6"][place % 2].split()[:words])),
            torch.tensor([5, 6][:tokens]),
            kind.frame,
            0.1 * place,
            rivals=tuple(torch.tensor([7 + rival, 1][:tokens]) for rival in range(rivals)),
        )
        for place, (words, tokens, rivals) in enumerate(asked)
    ]
    calls = []

    def function(**inputs):
        calls.append(inputs)
        return kind.model(**inputs)

    whole = All((All(tuple(parts[:3])), *parts[3:])) if len(parts) > 3 else All(tuple(parts))
    with torch.no_grad():
        alone = torch.cat([part.violation(kind.model) for part in parts])
        torch.testing.assert_close(whole.violation(function), alone)
        pieces = whole.pieces(kind.model)  # of which each is differentiated on its own: in passes of their own
        assert torch.equal(torch.cat([piece.violation for piece in pieces]), alone)
    lengths = [words + tokens if causal else (words, tokens) for words, tokens, _ in asked]
    changes = 1 + sum(a != b for a, b in pairwise(lengths))
    assert changes <= len(calls) <= len(parts)
    assert sum(len(next(iter(inputs.values()))) for inputs in calls) == sum(1 + rivals for *_, rivals in asked)
    if sum(1 + rivals for *_, rivals in asked) <= 16:
        assert len(calls) == changes
    first = len(calls)
    with torch.no_grad():
        whole.violation(function)
    for before, again in zip(calls[:first], calls[first:], strict=True):  # what is replayed goes by identity
        assert all(before[name] is again[name] for name in before)


def test_no_logits_of_a_prompt_are_asked_for_where_the_model_can_leave_them_out():
    kind = language()
    assert kind.frame.keeps == "logits_to_keep"
    source, answer = kind.source("3 4 5 6 7"), torch.tensor([5, 6])
    rivals = (torch.tensor([8, 1, 2]), torch.tensor([9]))
    lengths = []

    def function(**inputs):
        answers = kind.model(**inputs)
        lengths.append(answers.logits.shape[1])
        return answers

    whole, few = CausalFrame(pad=0, options={"use_cache": False}), kind.frame
    for make, asked in (
        (lambda frame: Says(source, answer, frame, 0.1), 2),
        (lambda frame: Says(source, answer, frame, 0.1, rivals=rivals), 3),
        (lambda frame: Preferred(source, answer, rivals, frame), 3),
        (lambda frame: All((Says(source, answer, frame), Says(kind.source("3 4 5 6"), rivals[0], frame))), 3),
    ):
        with torch.no_grad():
            truth, found = (make(frame).violation(function) for frame in (whole, few))
        torch.testing.assert_close(found, truth)
        assert lengths[0] > lengths[1] == asked and len(lengths) == 2  # those of one shape in one pass
        lengths.clear()


def test_demands_whose_options_hold_tensors_are_asked_one_by_one():
    kind = language()
    frame = CausalFrame(pad=0, options={"use_cache": False, "output_hidden_states": torch.tensor(False)})
    part = Says(kind.source("3 4"), torch.tensor([5]), frame)
    assert part.joined(part) is None and part.joined(Kept(torch.zeros(1, 2))) is None


def test_a_plain_encoder_decoder_is_edited():
    torch.manual_seed(0)
    model = tiny.Plain()
    source = {"source": torch.tensor([[3, 4, 5]])}
    frame = Seq2SeqFrame(start=(1,), pad=2, name="target")
    found = wp.edit(model, Says(source, torch.tensor([7, 8, 0]), frame, 0.1), RMSProp(lr=3e-3, max_steps=200))
    assert found.result is wp.Result.satisfied
    found.patch.apply(model)
    so_far = torch.tensor([[1]])
    with torch.no_grad():
        for wanted in (7, 8, 0):
            token = model.eval()(source["source"], so_far)[0, -1].argmax()
            assert token == wanted
            so_far = torch.cat([so_far, token.view(1, 1)], 1)


def test_a_least_norm_edit_of_the_head_makes_a_sentence():
    kind = language()
    fix = kind.says("3 4 5", torch.tensor([5, 6]), margin=0.1)
    found = wp.edit(kind.model, fix, MinimumNorm(), parameters="transformer.ln_f.*")
    assert found.result is wp.Result.satisfied
    assert found.certificate.affine


def test_answers_that_are_no_plain_tensors_are_seen_to_bend_too():
    kind = language()
    fix = kind.says("3 4 5", torch.tensor([5, 6]), margin=0.1)
    found = wp.edit(kind.model, fix, MinimumNorm(), parameters="transformer.h.0.mlp.*")
    assert found.result is wp.Result.satisfied
    assert not found.certificate.affine


def test_forced_first_tokens_are_not_scored():
    frame = Seq2SeqFrame(start=(2, 9), pad=1)
    inputs, labels = frame.batch({"input_ids": torch.tensor([[3]])}, [torch.tensor([5, 6]), torch.tensor([7])])
    assert inputs["decoder_input_ids"].tolist() == [[2, 9, 5], [2, 9, 1]]
    assert labels.tolist() == [[IGNORED, 5, 6], [IGNORED, 7, IGNORED]]


def test_prompts_are_not_scored():
    inputs, labels = CausalFrame(pad=0).batch(
        {"input_ids": torch.tensor([[3, 4]])}, [torch.tensor([5, 6]), torch.tensor([7])]
    )
    assert inputs["input_ids"].tolist() == [[3, 4, 5], [3, 4, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [[IGNORED, 5, 6], [IGNORED, 7, IGNORED]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"target": torch.tensor([1.0])}, "float32"),
        ({"target": torch.tensor([], dtype=torch.int64)}, "shape (0,)"),
        ({"target": torch.tensor([-1])}, "-1"),
        ({"target": "text"}, "'text'"),
        ({"over": ()}, "at least one"),
        ({"over": (torch.tensor([4, 0]),)}, "target itself"),
        ({"margin": -1.0}, "margin=-1.0"),
        ({"source": {"input_ids": torch.ones(2, 3, dtype=torch.int64)}}, "2 items"),
    ],
)
def test_bad_demands_are_explained(change, told):
    given = {
        "source": {"input_ids": torch.tensor([[3]])},
        "target": torch.tensor([4, 0]),
        "over": (torch.tensor([5]),),
        "frame": Seq2SeqFrame(start=(1,), pad=1),
    }
    with pytest.raises(InvalidInput, match=r".") as error:
        Preferred(**{**given, **change})
    assert told in str(error.value)


def test_a_classifier_is_no_sequence_model():
    fix = Says({"input": torch.zeros(1, 4)}, torch.tensor([1]), Seq2SeqFrame(start=(1,), pad=1))
    with pytest.raises(ShapeMismatch, match="vocabulary"):
        fix.violation(lambda input, decoder_input_ids: torch.zeros(1, 5))


def test_deployed_models_share_what_is_not_edited():
    model = tiny.marian()
    network = Network(model, "model.decoder.layers.1.fc2.*")
    moved = {name: value + 1 for name, value in network.start.items()}
    made = network.deployed(moved)
    own = dict(made.named_parameters())
    for name, value in model.named_parameters():
        assert torch.equal(own[name], value + 1 if name in moved else value)
        assert (own[name].data_ptr() == value.data_ptr()) == (name not in moved)
    assert not made.training and made.lm_head.weight is made.model.shared.weight
