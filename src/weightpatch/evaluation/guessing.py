"""Greedy decoding that checks a guess at the answer, many tokens a pass, and writes on where the guess is wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import final

import torch
from torch import Tensor

from .._calling import Function, Inputs, outputs

__all__ = ["Guessing", "sure_tokens"]

Force = Callable[[Sequence[int], Sequence[Tensor]], tuple[Inputs, Tensor]]

_ROUNDING = 1e-4  # of the largest logit: how far those of a pass with a cache, or of other rows, may be off
_PASSES = 6  # after which what is left is cheaper to decode, unless it is little
_LITTLE = 200  # tokens
_MUCH = 1500  # tokens: a pass over so many takes longer than decoding them, a token at a time with a cache
_LONG = 0.5  # of the limit: one such answer would make all passes long


def sure_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token of each place, (...,), and whether it wins by more than rounding.

    Args:
        logits: (..., vocabulary).
    """
    best = logits.topk(2, -1)
    return best.indices[..., 0], best.values[..., 0] - best.values[..., 1] > _ROUNDING * logits.abs().amax(-1)


@final
@dataclass(frozen=True, eq=False)
class Guessing:
    """Greedy answers from guesses, as those of the unedited model are for an edited one.

    A pass over a guess says for every place which token is the most likely one after those before it. Up to the first
    place where that is not the guess's token, this is what greedy decoding writes; it goes on there with the right
    token and the rest of the guess. Source: speculative decoding (Leviathan et al., ICML 2023), for greedy choice.

    Args:
        force: returns inputs that ask for every token of given answers of given items, and these as labels,
            (n, length), below 0 where nothing is asked.
        ends: the tokens that end an answer.
        limit: how many tokens an answer may have; items that reach it are not decided here.
    """

    force: Force
    ends: Collection[int]
    limit: int

    @torch.no_grad()
    def answers(self, function: Function, items: Sequence[int], guesses: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the answers that are certain, by item; the others have to be decoded.

        Args:
            function: the model.
            items: n of them.
            guesses: the tokens of one answer each.
        """
        found: dict[int, Tensor] = {}
        pairs = zip(items, guesses, strict=True)
        open_ = {item: guess for item, guess in pairs if len(guess) <= _LONG * self.limit}
        if sum(map(len, open_.values())) > _MUCH:
            return {}
        for number in count():
            if not open_ or (number >= _PASSES and sum(map(len, open_.values())) > _LITTLE):
                break
            now, open_ = open_, {}
            asked = [torch.cat([guess, guess[-1:]]) for guess in now.values()]  # one place more, to write on
            inputs, labels = self.force(list(now), asked)
            tokens, sure = sure_tokens(outputs(function, inputs).float())
            for row, (item, guess) in enumerate(now.items()):
                places = (labels[row] >= 0).nonzero().squeeze(1)
                answer, certain = self._checked(guess, tokens[row, places], sure[row, places])
                if certain:
                    found[item] = answer
                elif certain is None and len(answer) < self.limit:
                    open_[item] = answer
        return found

    def _checked(self, guess: Tensor, tokens: Tensor, sure: Tensor) -> tuple[Tensor, bool | None]:
        """Return a better guess, and whether it is the answer: True, not yet (None), or it cannot be told (False)."""
        wrong = (tokens[: len(guess)] != guess).nonzero()
        place = int(wrong[0]) if len(wrong) else len(guess)
        if not bool(sure[: place + 1].all()):
            return guess, False
        ended = [t for t in range(min(place + 1, len(tokens))) if int(tokens[t]) in self.ends]
        if ended:
            answer = tokens[: ended[0] + 1]
            return answer, len(answer) < self.limit
        token = tokens[place : place + 1]
        rest = guess[place + 1 :]
        if place + 1 < len(guess) and int(token) == int(guess[place + 1]):  # the guess has a token too many
            rest = guess[place + 2 :]
        return torch.cat([guess[:place], token, rest]), None
