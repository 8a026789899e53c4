from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

import tiny_text as tiny
import transformers

import weightpatch as wp
from weightpatch.editors import RMSProp
from weightpatch.errors import InvalidInput
from weightpatch.likelihoods import Bernoulli, Categorical, Gaussian
from weightpatch.tasks import text

WORDS = ["<pad>", "<end>", "<unk>", *(f"w{i}" for i in range(37))]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}w2 "
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=template
    )


@pytest.fixture(scope="module")
def language_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    model = tiny.gpt2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        id2label={0: "bad", 1: "fine", 2: "good"},
        label2id={"bad": 0, "fine": 1, "good": 2},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_says_what_it_holds(language_folder, classifier_folder):
    assert isinstance(text.load(language_folder), text.CausalLM)
    assert isinstance(text.load(classifier_folder), text.TextClassifier)
    model = text.load(language_folder).model
    assert not model.training and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["text", "seq2seq"])
def test_an_unknown_kind_is_explained(language_folder, kind):
    with pytest.raises(InvalidInput, match="expected one of translation, lm, text-classification"):
        text.load(language_folder, kind)


def test_what_is_no_model_is_explained(tmp_path):
    with pytest.raises(InvalidInput, match="does not exist"):
        text.load(tmp_path / "nothing")
    with pytest.raises(InvalidInput, match="that transformers can load"):
        text.load(tmp_path)


def test_a_classifier_of_texts_is_edited_by_name_of_the_class(classifier_folder):
    kind = text.load(classifier_folder)
    texts = ["w3 w4 w5", "w6"]
    before = copy.deepcopy(kind.model.state_dict())
    with torch.no_grad():
        today = kind.model(**kind.inputs(texts)).logits.argmax(1)
    wanted = ["good" if int(today[0]) != 2 else "bad", int(today[1])]
    found = wp.edit(
        kind.model, kind.classified(texts, wanted), keep=kind.kept(["w7 w8", "w9 w10 w11", "w3"]), parameters="*dense*"
    )
    found.raise_for_result()
    with found.patch.applied(kind.model), torch.no_grad():
        names = [kind.model.config.id2label[i] for i in kind.model(**kind.inputs(texts)).logits.argmax(1).tolist()]
    assert names[0] == wanted[0]
    assert all(torch.equal(value, before[key]) for key, value in kind.model.state_dict().items())
    with pytest.raises(InvalidInput, match="no class 'great'; expected one of bad, fine, good"):
        kind.classified(texts, ["great", "bad"])
    for label in (-1, 3):
        with pytest.raises(InvalidInput, match="expected 0 to 2"):
            kind.classified(texts, ["bad", label])


@pytest.mark.parametrize(
    ("problem", "kind"),
    [("multi_label_classification", Bernoulli), ("regression", Gaussian), ("single_label_classification", Categorical)],
)
def test_what_a_classifier_of_texts_answers_follows_from_its_problem_type(classifier_folder, problem, kind):
    model = text.load(classifier_folder)
    model.model.config.problem_type = problem
    assert isinstance(model.likelihood, kind)
    inputs, keep = model.inputs(["w3 w4 w5"]), model.kept(["w7 w8", "w9 w10 w11", "w3", "w4", "w5 w6", "w8 w3"])
    with torch.no_grad():
        today = model.model(**inputs).logits
    if kind is Bernoulli:
        tag = int(today[0].argmin())
        fix = model.tagged(["w3 w4 w5"], on=[tag]) if today[0, tag] < 0 else model.tagged(["w3 w4 w5"], off=[tag])
    elif kind is Gaussian:
        fix = model.within(["w3 w4 w5"], today + 0.2, 1e-4)
    else:
        fix = model.classified(["w3 w4 w5"], [int(today[0].argmin())])
    found = wp.edit(model.model, fix, RMSProp(lr=1e-3, max_steps=300), keep=keep, parameters="classifier.*")
    assert found.result is wp.Result.satisfied
    assert found.kept.likelihood.startswith(kind.__name__)
    others = {"classified": lambda: model.classified(["w3"], [0]), "tagged": lambda: model.tagged(["w3"], on=[0])}
    others.pop({Bernoulli: "tagged", Categorical: "classified"}.get(kind, ""), None)
    for ask in others.values():
        with pytest.raises(InvalidInput, match=f"problem_type='{problem}'"):
            ask()


def test_answers_of_a_language_model_follow_the_prompt(language_folder):
    kind = text.load(language_folder, settings={"max_new_tokens": 4})
    assert kind.source("w3 w4")["input_ids"].tolist() == [[6, 7]]
    assert kind.tokens("w5 w6", "w3 w4").tolist() == [8, 9]
    alone = [kind.answer(prompt) for prompt in ("w3", "w4 w5 w6", "w7 w8")]
    together = [kind.text(tokens) for tokens in kind.generate(["w3", "w4 w5 w6", "w7 w8"])]
    assert alone == together  # padded on the left


def test_a_chat_template_surrounds_the_prompt(language_folder):
    kind = text.load(language_folder, chat=True, settings={"max_new_tokens": 4})
    assert kind.source("w3")["input_ids"].tolist() == [[4, 6, 5]]
    assert kind.tokens("w9", "w3").tolist() == [12]
    fix = kind.says("w3", "w9")
    found = wp.edit(kind.model, fix, wp.editors.RMSProp(lr=3e-3, max_steps=200)).raise_for_result()
    with found.patch.applied(kind.model):
        assert kind.answer("w3").split()[0] == "w9"


def test_samples_depend_on_the_seed_alone(language_folder):
    kind = text.load(language_folder, settings={"max_new_tokens": 6})
    told = {"do_sample": True, "temperature": 1.2, "top_k": 0}
    state = torch.get_rng_state()
    a, b, c = (kind.answers("w3 w4", seed=seed, **told)[0].tolist() for seed in (1, 1, 2))
    assert a == b != c
    assert torch.equal(state, torch.get_rng_state())


def test_a_beam_gives_different_answers_the_likeliest_first(language_folder):
    kind = text.load(language_folder, settings={"max_new_tokens": 3})
    found = kind.answers("w3 w4", 6)
    assert len({tuple(tokens.tolist()) for tokens in found}) == len(found) == 6
    inputs, labels = kind.frame.batch(kind.source("w3 w4"), found)
    from weightpatch.constraints import token_scores

    with torch.no_grad():
        scores = token_scores(kind.model(**inputs).logits, labels).sum(1)
    lengths = torch.tensor([len(tokens) for tokens in found])
    assert (scores / lengths).diff().max() < 1e-5


def test_the_callers_mode_is_put_back(language_folder):
    kind = text.load(language_folder, settings={"max_new_tokens": 2})
    kind.model.train()
    kind.model.transformer.h[0].eval()
    kind.answer("w3")
    assert kind.model.training and not kind.model.transformer.h[0].training and kind.model.transformer.h[1].training
