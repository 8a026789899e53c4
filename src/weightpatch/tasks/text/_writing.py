"""Greedy decoding of many sources at once by an encoder–decoder, where an answer that ends leaves the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from weightpatch.tasks.text._generating import Generating, evaluating

__all__ = ["GreedyWriter", "greedy_writer"]

Encoded = Callable[[Sequence[int]], dict[str, Any]]

_ROWS = 128  # of a batch: more of them differ too much in length
_LEFT = 0.8  # the share of rows left at which the others are dropped: dropping copies the cache
_TRIED = 16  # answers


@final
@dataclass(frozen=True, eq=False)
class GreedyWriter:
    """Writes what `generate` does where it takes the likeliest token each time, at less cost.

    `generate` goes on with every row until the longest of its batch ends, and looks at more than the likeliest token.

    Args:
        encoded: gives the model some sources, by their numbers, as its encoder has seen them: `encoder_outputs` and
            `attention_mask`.
        start: the tokens that the decoder starts with.
        ends: those that end an answer.
        limit: how many tokens an answer may have.
        last: the last one of an answer as long as that, whatever is likely; None where it is not forced.
    """

    encoded: Encoded
    start: Sequence[int]
    ends: Sequence[int]
    limit: int
    last: int | None = None

    @torch.no_grad()
    def __call__(self, model: nn.Module, items: Sequence[int], lengths: Sequence[int]) -> list[Tensor]:
        """Return the tokens of answers.

        Args:
            model: writes them, and keeps what it has seen as models of transformers do.
            items: the numbers of n sources.
            lengths: of their answers, about: those of like length are written together.
        """
        found = dict[int, Tensor]()
        order = sorted(range(len(items)), key=lambda i: lengths[i])
        with evaluating(model):
            for begin in range(0, len(order), _ROWS):
                some = [items[i] for i in order[begin : begin + _ROWS]]
                found |= dict(zip(some, self._written(model, some), strict=True))
        return [found[item] for item in items]

    def _written(self, model: nn.Module, items: Sequence[int]) -> list[Tensor]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        given = self.encoded(items)
        states, mask = given["encoder_outputs"].last_hidden_state, given["attention_mask"]
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        named = {("cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"): cache}
        rows = torch.arange(len(items), device=states.device)
        written = states.new_zeros(len(items), self.limit, dtype=torch.int64)
        lengths = torch.full_like(rows, self.limit)
        ends, asked = rows.new_tensor(self.ends), rows.new_tensor(self.start).expand(len(items), -1)
        for place in range(self.limit):
            encoder = BaseModelOutput(last_hidden_state=states)
            told = model(encoder_outputs=encoder, attention_mask=mask, decoder_input_ids=asked, use_cache=True, **named)
            tokens = told.logits[:, -1].float().argmax(-1)
            if place + 1 == self.limit and self.last is not None:
                tokens = torch.full_like(tokens, self.last)
            written[rows, place] = tokens
            ended = torch.isin(tokens, ends)
            lengths[rows[ended]] = lengths[rows[ended]].clamp_max(place + 1)  # a row may go on behind its end
            asked = tokens[:, None]
            left = (lengths[rows] > place + 1).nonzero().squeeze(1)
            if not len(left):
                break
            if len(left) <= _LEFT * len(rows):
                cache.batch_select_indices(left)
                rows, states, mask, asked = rows[left], states[left], mask[left], asked[left]
        return [row[:n] for row, n in zip(written, lengths.tolist(), strict=True)]


def greedy_writer(kind: Generating, encoded: Encoded, base: Sequence[Tensor], last: int | None) -> GreedyWriter | None:
    """Return what writes as a model that decodes greedily does; None where it would write anything else.

    Args:
        kind: the model.
        encoded: gives it the sources, as its encoder has seen them.
        base: what it generates from them.
        last: see `GreedyWriter`.
    """
    start: Sequence[int] = kind.frame.start  # type: ignore[attr-defined]
    found = GreedyWriter(encoded, start, sorted(kind.ends), kind.limit, last)
    some = sorted(range(len(base)), key=lambda i: len(base[i]))[:: max(1, len(base) // _TRIED)]
    try:
        answers = found(kind.model, some, [len(base[i]) for i in some])
    except Exception:  # it is asked in another way, or keeps in another what it has seen: `generate` always serves
        return None
    same = all(base[i].tolist() == tokens.tolist() for i, tokens in zip(some, answers, strict=True))
    return found if same else None
