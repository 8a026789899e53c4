"""What a model makes of facts before and after edits: decoded freely, and never from the answer's own beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, final

import torch
from torch import nn

from weightpatch._calling import Params, outputs
from weightpatch.errors import InvalidInput
from weightpatch.evaluation import Estimate
from weightpatch.evaluation.metrics import wilson
from weightpatch.network import Network
from weightpatch.patches import fingerprint
from weightpatch.tasks.language._facts import Fact
from weightpatch.tasks.language._measures import (
    answer,
    begins,
    continued,
    likelihoods,
    ngram_entropy,
    perplexity,
    text_batches,
)
from weightpatch.tasks.text import CausalLM

__all__ = ["Judge", "Judgement", "Share", "Unedited", "unedited"]


@final
@dataclass(frozen=True)
class Share:
    """How many of some prompts were answered in a way.

    Attributes:
        hits: how many were.
        of: how many there are.
    """

    hits: int
    of: int

    def __add__(self, other: Share) -> Share:
        return Share(self.hits + other.hits, self.of + other.of)

    @property
    def estimate(self) -> Estimate:
        """The share with its 95 % interval, which takes prompts to be independent; NaN where there are none."""
        return wilson(self.hits, self.of)

    def __str__(self) -> str:
        return f"{100 * self.hits / self.of:.1f} %" if self.of else ""


@final
@dataclass(frozen=True)
class Unedited:
    """What the unedited model makes of facts, which edited ones are compared with; measured once for several editors.

    Attributes:
        fingerprint: of the model's weights.
        facts: n of them.
        held_out: the texts of the perplexity.
        tokens: how many tokens an answer is decoded to.
        continuation: how many tokens a free continuation has; 0 for none.
        continuations: of how many facts of a set continuations are written.
        answers: of each fact, the tokens that follow the prompt, the paraphrases and the neighbours, in this order.
        said: of each fact, whether its target is said already.
        right: of each fact, which neighbours are answered right; False where no answer is known.
        fluency: of the first `continuations` facts, the n-gram entropy of what is written freely, bits.
        perplexity: on `held_out`; None without texts.
    """

    fingerprint: str
    facts: tuple[Fact, ...]
    held_out: tuple[str, ...]
    tokens: int
    continuation: int
    continuations: int
    answers: tuple[tuple[tuple[int, ...], ...], ...]
    said: tuple[bool, ...]
    right: tuple[tuple[bool, ...], ...]
    fluency: tuple[float, ...]
    perplexity: float | None


def unedited(
    language: CausalLM,
    facts: Sequence[Fact],
    *,
    held_out: Sequence[str] = (),
    tokens: int = 10,
    continuation: int = 50,
    continuations: int = 10,
) -> Unedited:
    """Measure a model before edits, to hand it to several calls of `evaluate_facts` as `before`.

    Args:
        language: the model, decoded as it is deployed: greedily, unless its settings say otherwise.
        facts: n of them.
        held_out: texts for the perplexity.
        tokens: how many tokens an answer is decoded to; longer than every target.
        continuation: how many tokens a free continuation has, for fluency; 0 for none.
        continuations: of how many facts of a set these are written.

    Raises:
        InvalidInput: there is no fact, or a target has no fewer than `tokens` tokens.
    """
    if not facts or continuation < 0 or continuations < 0:
        raise InvalidInput(
            f"unedited was given {len(facts)} facts, continuation={continuation} and continuations={continuations}; "
            "expected at least one fact, and numbers of at least 0"
        )
    continuations = continuations if continuation else 0
    for fact in facts:
        long = len(language.tokens(answer(fact.prompt, fact.target), fact.prompt))
        if long >= tokens:
            raise InvalidInput(
                f"the target {fact.target!r} has {long} tokens, and answers are decoded to tokens={tokens}; ask for "
                "more"
            )
    said = [_decoded(language, fact, tokens) for fact in facts]
    return Unedited(
        fingerprint(language.model),
        tuple(facts),
        tuple(held_out),
        tokens,
        continuation,
        continuations,
        tuple(said),
        tuple(_told(language, fact, rows)[0] for fact, rows in zip(facts, said, strict=True)),
        tuple(tuple(_right(language, fact, rows)) for fact, rows in zip(facts, said, strict=True)),
        tuple(_fluency(language, [fact], continuation) for fact in facts[:continuations]),
        perplexity(language, held_out) if held_out else None,
    )


@final
@dataclass(frozen=True)
class Judgement:
    """What one edited model makes of some facts; see `FactsRow`."""

    said: Share
    paraphrases: Share
    same: Share
    right: Share
    fluency: float | None
    perplexity: float | None


@final
class Judge:
    """Judges edited models.

    Args:
        language: the unedited model.
        before: what it makes of the facts.
        network: a view of it; held-out texts are recorded, and what edits cannot change of them is run once.
    """

    def __init__(self, language: CausalLM, before: Unedited, network: Network) -> None:
        self._language, self._before, self._network = language, before, network
        self._texts = text_batches(language, before.held_out) if before.held_out else []
        self._recordings = [network.record(inputs) for inputs, _ in self._texts]

    def judge(self, params: Params, places: Sequence[int]) -> Judgement:
        """Return what the model with these parameters makes of the facts at these places."""
        before, language = self._before, self._language
        with self._network.isolated(), torch.no_grad():
            model = self._network.deployed(params)
            said = paraphrases = same = right = Share(0, 0)
            for place in places:
                fact = before.facts[place]
                rows = _decoded(language, fact, before.tokens, model)
                asked = 1 + len(fact.paraphrases)
                told = _told(language, fact, rows)
                said += Share(int(told[0]), 1)
                paraphrases += Share(sum(told[1:]), asked - 1)
                kept = [new == old for new, old in zip(rows[asked:], before.answers[place][asked:], strict=True)]
                same += Share(sum(kept), len(kept))
                still = zip(before.right[place], _right(language, fact, rows), strict=True)
                right += Share(sum(was and now for was, now in still), sum(before.right[place]))
            facts = [before.facts[place] for place in places[: before.continuations]]
            fluency = _fluency(language, facts, before.continuation, model) if facts else None
            return Judgement(said, paraphrases, same, right, fluency, self._perplexity(params))

    def _perplexity(self, params: Params) -> float | None:
        def run(place: int) -> Any:
            made = self._network.run(params, self._recordings[place])
            return outputs(lambda **_: made, self._texts[place][0])

        return likelihoods(self._texts, run) if self._texts else None


def _decoded(
    language: CausalLM, fact: Fact, tokens: int, model: nn.Module | None = None
) -> tuple[tuple[int, ...], ...]:
    """Return what is said to a fact's prompts: always in one batch, so that an unchanged model says the same."""
    prompts = [fact.prompt, *fact.paraphrases, *(question.prompt for question in fact.neighbours)]
    asked = replace(language, settings={**language.settings, "max_new_tokens": tokens})
    return tuple(tuple(row.tolist()) for row in asked.generate(prompts, model, batch_size=len(prompts)))


def _told(language: CausalLM, fact: Fact, rows: Sequence[Sequence[int]]) -> list[bool]:
    """Say to which of the prompt and the paraphrases the target is said."""
    asked = rows[: 1 + len(fact.paraphrases)]
    return [begins(language.text(torch.tensor(row, device="cpu")), fact.target) for row in asked]


def _right(language: CausalLM, fact: Fact, rows: Sequence[Sequence[int]]) -> list[bool]:
    """Say which neighbours are answered right."""
    said = [language.text(torch.tensor(row, device="cpu")) for row in rows[1 + len(fact.paraphrases) :]]
    asked = zip(said, fact.neighbours, strict=True)
    return [any(begins(text, known) for known in question.answers) for text, question in asked]


def _fluency(language: CausalLM, facts: Sequence[Fact], tokens: int, model: nn.Module | None = None) -> float:
    prompts = [prompt for fact in facts for prompt in (fact.generation or (fact.prompt,))]
    return fmean(map(ngram_entropy, continued(language, prompts, tokens, model)))
