"""Greedy decoding that checks a guess at the answer, many tokens a pass, and writes on where the guess is wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, final

import torch
from torch import Tensor

from .._calling import Function, Inputs, outputs

__all__ = ["ROUNDING", "Guessing", "Lost", "sure_tokens"]

Force = Callable[[Sequence[int], Sequence[Tensor]], tuple[Inputs, Tensor]]

ROUNDING = 1e-4  # of the largest logit: how far those of a pass with a cache, or of other rows, may be off
_PASSES = 4  # after which what is left is cheaper to decode, unless it is little
_LITTLE = 100  # tokens
_MUCH = 400  # tokens: a pass over so many takes longer than decoding them, a token at a time with a cache
_LONGER = 1.25  # how much longer than the shortest of a pass an answer may be
_CONTEXT = 4  # tokens before a place that say where in the old answer writing is


def sure_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token of each place, (...,), and whether it wins by more than rounding.

    Args:
        logits: (..., vocabulary).
    """
    best = logits.topk(2, -1)
    return best.indices[..., 0], best.values[..., 0] - best.values[..., 1] > ROUNDING * logits.abs().amax(-1)


class Lost(NamedTuple):
    """The first place where an answer is no longer what is most likely, and the token that is; below 0 if unsure."""

    place: int
    token: int


@final
@dataclass(frozen=True, eq=False)
class Guessing:
    """Greedy answers from guesses, as those of the unedited model are for an edited one.

    A pass over a guess says for every place which token is the most likely one after those before it. Up to the first
    place where that is not the guess's token, this is what greedy decoding writes; it goes on there with the right
    token, and with the old answer from where that goes on alike. Sources: speculative decoding (Leviathan et al., ICML
    2023), for greedy choice; prompt lookup (Saxena, 2023), for the guess.

    Args:
        force: returns inputs that ask for every token of given answers of given items, and these as labels,
            (n, length), below 0 where nothing is asked.
        ends: the tokens that end an answer.
        limit: how many tokens an answer may have.
        last: the last one of an answer as long as that, whatever is likely; None where it is not forced.
    """

    force: Force
    ends: Collection[int]
    limit: int
    last: int | None = None

    @torch.no_grad()
    def answers(self, function: Function, lost: Mapping[int, Lost], base: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the answers that are certain, by item; the others have to be decoded.

        Args:
            function: the model.
            lost: where the old answers end to be right, by item.
            base: the old answers of all items.
        """
        old = {item: base[item].tolist() for item in lost}
        found: dict[int, list[int]] = {}
        written: dict[int, list[int]] = {}
        for item, (place, token) in lost.items():
            if token >= 0:
                ended = token in self.ends or place + 1 == self.limit
                (found if ended else written)[item] = [*old[item][:place], token]
        for number in count():
            if sum(len(old[item]) for item in written) > (_MUCH if number < _PASSES else _LITTLE) or not written:
                break
            guesses = {
                item: [*start, *continued(start, old[item])][: self.limit - 1] for item, start in written.items()
            }
            now, written = written, {}
            for some in _alike(guesses):
                asked = {i: base[i].new_tensor([*guesses[i], guesses[i][-1]]) for i in some}  # one more, to write on
                for item, tokens, sure in self._likeliest(function, asked):
                    start, ended = self._checked(len(now[item]), guesses[item], tokens, sure)
                    if start:
                        (found if ended else written)[item] = start
        return {item: base[item].new_tensor(tokens) for item, tokens in found.items()}

    def _likeliest(
        self, function: Function, asked: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, list[int], list[bool]]]:
        """Yield of every item which token is the most likely one at each place asked for, and whether for sure."""
        inputs, labels = self.force(list(asked), list(asked.values()))
        tokens, sure = sure_tokens(outputs(function, inputs).float())
        for row, item in enumerate(asked):
            places = labels[row] >= 0
            yield item, tokens[row, places].tolist(), sure[row, places].tolist()

    def _checked(self, begin: int, guess: list[int], tokens: list[int], sure: list[bool]) -> tuple[list[int], bool]:
        """Return what is written for certain, and whether it is the whole answer; nothing where it cannot be told.

        Args:
            begin: how many tokens of the guess are certain already.
            guess: m tokens.
            tokens: the most likely ones at m + 1 places.
            sure: whether each wins by more than rounding.
        """
        for place in range(begin, len(tokens)):
            longest = place + 1 == self.limit
            if longest and self.last is not None:
                return [*guess[:place], self.last], True
            if not sure[place]:
                return [], False
            if tokens[place] in self.ends or longest:
                return [*guess[:place], tokens[place]], True
            if place == len(guess) or tokens[place] != guess[place]:
                return [*guess[:place], tokens[place]], False
        raise AssertionError("there is a token behind every guess")


def continued(written: Sequence[int], old: Sequence[int]) -> Sequence[int]:
    """Guess how an answer goes on: as an old one does behind the place that is most like its end.

    Args:
        written: its tokens so far, n of them, at least one.
        old: the tokens of the old answer.
    """
    n = len(written)

    def likeness(end: int) -> float:
        same = 0
        while same < min(_CONTEXT, end, n) and old[end - 1 - same] == written[n - 1 - same]:
            same += 1
        return same - abs(end - n) / (2 * _CONTEXT) if same else -abs(end - n)

    best = max(range(1, len(old) + 1), key=likeness)
    return old[best:] if likeness(best) > 0 else old[n:]


def _alike(guesses: Mapping[int, list[int]]) -> Iterator[list[int]]:
    """Yield the items in groups of like length, so that passes are not mostly padding."""
    some: list[int] = []
    for item in sorted(guesses, key=lambda item: len(guesses[item])):
        if some and len(guesses[item]) > _LONGER * len(guesses[some[0]]) + 2:
            yield some
            some = []
        some.append(item)
    if some:
        yield some
