"""What sequence models share: they generate, score and are asked for sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightpatch.constraints import IGNORED, Frame, Preferred, Says
from weightpatch.errors import InvalidInput
from weightpatch.likelihoods import Categorical, Of
from weightpatch.locality import Locality
from weightpatch.network import preserved_rng

__all__ = ["Decoding", "Generating"]

NEW_TOKENS = 128  # of an answer, where the settings do not say
_STEP = 16  # rows: what a step of a batch costs beside its rows, as measured on a small model


@dataclass(frozen=True, eq=False)
class Generating(ABC):
    """A model that generates text, with its tokenizer.

    Args:
        model: with `generate`, as those of transformers have it; it is never changed.
        tokenizer: its own.
        settings: what `generate` is given when nothing else is said: how the model is deployed, such as
            ``{"num_beams": 5}``; greedy decoding of at most 128 tokens when not given.
    """

    model: nn.Module
    tokenizer: Any
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    @abstractmethod
    def frame(self) -> Frame:
        """How the model is asked about sequences."""

    @abstractmethod
    def source(self, text: str) -> dict[str, Tensor]:
        """Return the model's inputs for one source or prompt, (1, ...)."""

    @abstractmethod
    def tokens(self, text: str, after: str = "") -> Tensor:
        """Return the tokens of an answer, (tokens,), int64.

        Args:
            text: the answer.
            after: the source or prompt that it follows.
        """

    @abstractmethod
    def cut(self, generated: Tensor, source: Mapping[str, Tensor]) -> Tensor:
        """Take the answers from what `generate` returns: (rows, tokens), without the start, the prompt and padding."""

    def text(self, tokens: Tensor) -> str:
        """Return an answer's text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decoding(self, text: str, most: int | None = None) -> Decoding:
        """Return what generates from one source with any model of this kind, as deployed.

        Args:
            text: the source or prompt.
            most: how many tokens of the answer are looked at; all when not given.
        """
        return Decoding(self, self.source(text), most)

    @torch.no_grad()
    def answers(self, text: str, count: int = 1, *, seed: int | None = None, **settings: Any) -> list[Tensor]:
        """Generate answers to one source; equal ones once, the likeliest first.

        Args:
            text: the source or prompt.
            count: how many sequences are asked for: of a beam as wide, or samples.
            seed: of samples, for ``do_sample=True``.
            settings: of `generate`, in place of the model's own.
        """
        wide = {} if settings.get("do_sample") else {"num_beams": max(count, settings.get("num_beams", 1))}
        source = self.source(text)
        with preserved_rng(source["input_ids"].device):
            if seed is not None:
                torch.manual_seed(seed)
            found = generated(self.model, source, {**self.settings, **wide, "num_return_sequences": count, **settings})
        unique: dict[tuple[int, ...], Tensor] = {}
        for row in self.cut(found, source):
            tokens = self.trimmed(row)
            unique.setdefault(tuple(tokens.tolist()), tokens)
        return list(unique.values())

    def answer(self, text: str) -> str:
        """Return what the model, as deployed, answers to one source."""
        return self.text(self.decoding(text)(self.model))

    def trimmed(self, row: Tensor) -> Tensor:
        """Cut one row behind its first end token, and drop the padding."""
        ends = self.ends
        for place, token in enumerate(row.tolist()):
            if token in ends:
                return row[: place + 1]
        return row

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        config: Any = self.model.generation_config
        ends = config.eos_token_id
        return frozenset([ends] if isinstance(ends, int) else ends or ())

    @property
    def limit(self) -> int:
        """How many tokens an answer may have."""
        return int(self.settings.get("max_new_tokens", NEW_TOKENS))

    def preferred(
        self, text: str, target: str | Tensor, over: Sequence[str | Tensor] | int = 32, margin: float = 0.0
    ) -> Preferred:
        """Ask for a target that the model prefers to alternatives.

        Args:
            text: the source or prompt.
            target: the answer wanted.
            over: the alternatives, or how many to take from a beam of the unedited model.
            margin: by how much the target's mean log-probability is to be higher, in nats.
        """
        wanted = self._tokens(target, text)
        others = self.answers(text, over) if isinstance(over, int) else [self._tokens(other, text) for other in over]
        others = [other for other in others if other.tolist() != wanted.tolist()]
        return Preferred(self.source(text), wanted, tuple(others), self.frame, margin)

    def says(self, text: str, answer: str | Tensor, margin: float = 0.05) -> Says:
        """Ask that the model, as deployed, generates an answer.

        Args:
            text: the source or prompt.
            answer: the answer wanted.
            margin: by how much each token is to win, in logits.
        """
        tokens = self._tokens(answer, text)
        return Says(self.source(text), tokens, self.frame, margin, self.decoding(text, len(tokens)))

    def kept(self, texts: Sequence[str], answers: Sequence[str | Tensor] | None = None) -> Locality:
        """Return what should stay: the distribution of every token of these answers; padding does not count.

        Args:
            texts: n sources or prompts.
            answers: n answers; what the model generates when not given.
        """
        inputs, labels = self.forced(texts, answers)
        return Locality(inputs, labels != IGNORED, likelihood=Categorical(-1, Of.logits))

    def forced(
        self, texts: Sequence[str], answers: Sequence[str | Tensor] | None = None
    ) -> tuple[dict[str, Any], Tensor]:
        """Return inputs that ask for every token of given answers, and these as labels, (n, length).

        Args:
            texts: n sources or prompts.
            answers: n answers; what the model generates when not given.
        """
        if not texts or (answers is not None and len(answers) != len(texts)):
            given = "none" if answers is None else len(answers)
            raise InvalidInput(f"given were {len(texts)} texts and {given} answers; expected as many, at least 1")
        rows = (
            self.generate(texts)
            if answers is None
            else [self._tokens(*pair) for pair in zip(answers, texts, strict=True)]
        )
        return self.frame.rows([self.source(text) for text in texts], rows)

    @torch.no_grad()
    def generate(self, texts: Sequence[str], model: nn.Module | None = None, batch_size: int = 64) -> list[Tensor]:
        """Return the tokens of the answers to n sources, as deployed.

        Args:
            texts: n sources or prompts.
            model: another model of this kind, such as an edited one.
            batch_size: sources at a time, of similar length.
        """
        sources = [self.source(text) for text in texts]
        lengths = [source["input_ids"].shape[1] for source in sources]

        def batch(some: Sequence[int]) -> dict[str, Any]:
            return self.gathered([sources[i] for i in some])

        return self.written(model or self.model, lengths, batch, batch_size)

    @torch.no_grad()
    def written(
        self, model: nn.Module, lengths: Sequence[int], batch: Callable[[Sequence[int]], Any], batch_size: int = 64
    ) -> list[Tensor]:
        """Return the tokens of the answers of a model of this kind, as deployed.

        Args:
            model: what writes.
            lengths: of n sources, or as far as known of their answers; those of like length are taken together.
            batch: makes model inputs of some sources, by their numbers.
            batch_size: sources at a time.
        """
        found: dict[int, Tensor] = {}
        for some in _batches(lengths, batch_size):
            inputs = batch(some)
            rows = self.cut(generated(model, inputs, self.settings), inputs)
            found |= {i: self.trimmed(row) for i, row in zip(some, rows, strict=True)}
        return [found[i] for i in range(len(lengths))]

    def encoded(self, texts: Sequence[str], edited: Sequence[str]) -> Callable[[Sequence[int]], dict[str, Any]] | None:
        """Return what gives a model the sources as its encoder has seen them, by their numbers; None without one.

        Args:
            texts: the sources.
            edited: names of parameters; None is returned, too, where one of them is the encoder's.
        """
        return None

    @abstractmethod
    def gathered(self, sources: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return several sources as one batch to generate from."""

    def _tokens(self, answer: str | Tensor, text: str) -> Tensor:
        return answer if isinstance(answer, Tensor) else self.tokens(answer, text)


@dataclass(frozen=True, eq=False)
class Decoding:
    """Generates from one source with any model of a kind, as deployed; returns the answer's tokens.

    Attributes:
        kind: what generates.
        source: from what.
        most: where the likeliest token is written each time, writing ends after as many: what follows changes nothing
            before it.
    """

    kind: Generating
    source: Mapping[str, Tensor]
    most: int | None = None

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Tensor:
        """Return the tokens, (tokens,), with the end token where one was written."""
        settings = dict(self.kind.settings)
        if self.most is not None and settings.get("num_beams", 1) == 1 and not settings.get("do_sample"):
            settings["stopping_criteria"] = [*settings.get("stopping_criteria", ()), self._enough]
        return self.kind.trimmed(self.kind.cut(generated(model, self.source, settings), self.source)[0])

    def _enough(self, written: Tensor, scores: Any, **told: Any) -> Tensor:
        """Say of each row whether it is as long as it is looked at."""
        enough = self.kind.cut(written, self.source).shape[1] >= (self.most or 0)
        return torch.full(written.shape[:1], enough, dtype=torch.bool, device=written.device)


def generated(model: Any, source: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Run `generate` in evaluation mode, with the caller's modes put back; (rows, tokens)."""
    plain = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS}
    with evaluating(model):
        found: Tensor = model.generate(**source, **{**plain, **settings})
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    training = [(module, module.training) for module in model.modules() if module.training]
    try:
        if training:
            model.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return what to write together, by number: where the rows of a batch go on until the longest ends, the cheapest.

    Args:
        lengths: of n answers, about.
        most: rows of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, begins = [0], [0]  # the cost of the first so many, and where their last batch begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = {begin: best[begin] + longest * (_STEP + end - begin) for begin in range(max(0, end - most), end)}
        begins.append(min(costs, key=lambda begin: costs[begin]))
        best.append(costs[begins[end]])
    found, end = list[list[int]](), len(order)
    while end:
        found.append(order[begins[end] : end])
        end = begins[end]
    return found[::-1]
