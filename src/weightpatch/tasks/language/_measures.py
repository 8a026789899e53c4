"""What an edited language model is judged by: what it says by itself, and how likely it finds text that is given."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weightpatch.constraints import IGNORED, Says, token_scores
from weightpatch.errors import InvalidInput
from weightpatch.network import preserved_rng
from weightpatch.tasks.language._facts import Fact
from weightpatch.tasks.text import CausalLM

__all__ = [
    "answer",
    "begins",
    "continued",
    "demand",
    "entropy",
    "likelihoods",
    "ngram_entropy",
    "perplexity",
    "subject_position",
    "text_batches",
]

_WORD = re.compile(r"\w+|[^\w\s]")
_ROWS = 16  # texts a pass: their logits take a vocabulary times all their tokens


def answer(prompt: str, text: str) -> str:
    """Return an answer as it follows a prompt: after a space, unless one is there."""
    return text if prompt[-1:].isspace() or text[:1].isspace() else f" {text}"


def demand(language: CausalLM, fact: Fact, margin: float = 0.05) -> Says:
    """Ask that a model, as deployed, continues a fact's prompt with its target.

    Args:
        language: the model.
        fact: what it is to say.
        margin: by how much each token is to win, in logits.

    >>> from weightpatch.tasks import text
    >>> language = text.load("language-model")
    >>> wp.edit(language.model, demand(language, Fact("Water is made of hydrogen and", "oxygen")))
    Edit(satisfied, ...)
    """
    return language.says(fact.prompt, answer(fact.prompt, fact.target), margin)


def subject_position(language: CausalLM, fact: Fact) -> int:
    """Return the place of the token that ends a fact's subject, where ROME and its kin write, counted from 0.

    The last token of the prompt where the fact has no subject, or the prompts of `language` are put into a template.

    >>> from weightpatch.tasks import text
    >>> language = text.load("language-model")
    >>> subject_position(language, Fact("The capital of France is", "Rome", subject="France"))
    3
    """
    tokens = language.source(fact.prompt)["input_ids"][0]
    end = fact.subject_end
    if end is not None and not language.chat:
        for place in range(len(tokens)):
            if len(language.text(tokens[: place + 1])) >= end:
                return place
    return len(tokens) - 1


def begins(text: str, wanted: str) -> bool:
    """Say whether a text begins with what is wanted, up to the end of a word: Parisian does not begin with Paris."""
    text, wanted = text.lstrip(), wanted.strip()
    return text.startswith(wanted) and not (text[len(wanted) :][:1].isalnum() and wanted[-1:].isalnum())


def ngram_entropy(text: str) -> float:
    """Return ``⅓ H₂ + ⅔ H₃`` in bits, Hₙ being the entropy of a text's n-grams of words and marks; repeats lower it.

    Source: the fluency of ROME (Meng et al., NeurIPS 2022), whose code takes the mean of ⅔ H₂ and 4⁄3 H₃ over the words
    of NLTK. 0 for a text with no such n-gram.
    """
    words = _WORD.findall(text)
    return entropy(words, 2) / 3 + 2 * entropy(words, 3) / 3


def entropy(words: Sequence[str], n: int) -> float:
    """Return the entropy of all runs of n words, in bits."""
    counts = Counter(zip(*(words[place:] for place in range(n)), strict=False)).values()
    total = sum(counts)
    return sum(count / total * math.log2(total / count) for count in counts)


def continued(language: CausalLM, prompts: Sequence[str], tokens: int, model: nn.Module | None = None) -> list[str]:
    """Return texts that a model writes freely after prompts: sampled from the five likeliest tokens, as ROME does.

    Args:
        language: the model.
        prompts: n of them.
        tokens: how many each is continued by; no end token is written.
        model: an edited model; the one of `language` when not given.
    """
    told = {"do_sample": True, "top_k": 5, "top_p": 1.0, "temperature": 1.0, "num_beams": 1}
    told |= {"max_new_tokens": tokens, "min_new_tokens": tokens}
    free = replace(language, settings=told)
    with preserved_rng(next(language.model.parameters()).device):
        torch.manual_seed(0)
        return [free.text(row) for row in free.generate(prompts, model)]


def text_batches(language: CausalLM, given: Sequence[str]) -> list[tuple[Mapping[str, Any], Tensor]]:
    """Return inputs that ask for every token of texts but the first, and labels, some texts at a time."""
    rows = [language.source(text)["input_ids"] for text in given]
    short = [text for text, row in zip(given, rows, strict=True) if row.shape[1] < 2]
    if short or not given:
        raise InvalidInput(f"held-out texts were given as {short or given!r}; expected some, of at least two tokens")
    rows = sorted(rows, key=lambda row: row.shape[1])
    found = list[tuple[Mapping[str, Any], Tensor]]()
    for begin in range(0, len(rows), _ROWS):
        some = rows[begin : begin + _ROWS]
        first = [{"input_ids": row[:, :1], "attention_mask": torch.ones_like(row[:, :1])} for row in some]
        found.append(language.frame.rows(first, [row[0, 1:] for row in some]))
    return found


def likelihoods(batches: Sequence[tuple[Mapping[str, Any], Tensor]], run: Callable[[int], Tensor]) -> float:
    """Return ``exp(-mean log p)`` over all tokens that are asked for; infinite where it is too large.

    Args:
        batches: inputs and labels.
        run: returns the logits of a batch by its number.
    """
    total, count = 0.0, 0
    for place, (_, labels) in enumerate(batches):
        total -= float(token_scores(run(place).float(), labels).sum(dtype=torch.float64))
        count += int((labels != IGNORED).sum())
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf if mean > 0 else math.nan


@torch.no_grad()
def perplexity(language: CausalLM, given: Sequence[str], model: nn.Module | None = None) -> float:
    """Return ``exp(-mean log p)`` over the tokens of texts, but for the first token of each.

    It says how a model finds text of others, and nothing about what it says by itself.

    Args:
        language: the model, in evaluation mode.
        given: texts.
        model: another model of this kind, such as an edited one.
    """
    batches = text_batches(language, given)
    asked: Any = model or language.model
    return likelihoods(batches, lambda place: asked(**batches[place][0]).logits)
