"""What edited sequence models generate for a test set: the plain way, and the fast way with the same answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from .._calling import Function, Inputs, Params, outputs
from ..network import Network
from .guessing import Guessing, sure_tokens

__all__ = ["FastGenerations", "Forced", "Generated", "Generations", "SlowGenerations"]

Generate = Callable[[nn.Module, Sequence[int]], list[Tensor]]


@final
@dataclass(frozen=True, eq=False)
class Forced:
    """A batch that asks for every token of what the unedited model generates.

    Attributes:
        items: the numbers of the test items, m of them.
        inputs: the model's inputs, m rows.
        labels: the tokens, (m, length), below 0 where nothing is asked.
    """

    items: tuple[int, ...]
    inputs: Inputs
    labels: Tensor


@final
@dataclass(frozen=True, eq=False)
class Generated:
    """What one edited model generates, against the unedited one.

    Attributes:
        changed: the items that are answered otherwise, with the tokens.
        drift: mean KL(before || after) over the tokens of the unedited model's answers, nats.
        anew: how many items were written anew, the others being provably as before.
    """

    changed: Mapping[int, Tensor]
    drift: float
    anew: int


class Generations(ABC):
    """Generated answers of edited models to one test set.

    Args:
        network: a view of the model.
        base: what the unedited model generates, the tokens of each item.
        forced: batches that ask for these.
        generate: generates the answers of a module to some items, by their numbers.
    """

    def __init__(self, network: Network, base: Sequence[Tensor], forced: Sequence[Forced], generate: Generate) -> None:
        self._network, self.base, self._forced, self._generate = network, base, forced, generate
        self._before: list[Tensor] = []
        for batch in forced:
            with network.isolated(), torch.no_grad():
                self._before.append(self._start(batch).log_softmax(-1))

    @abstractmethod
    def _start(self, batch: Forced) -> Tensor:
        """Return the unedited model's logits of the tokens asked for, (tokens, vocabulary)."""

    @abstractmethod
    def predict(self, params: Params) -> Generated:
        """Return what the model generates with these parameters, rounded to its dtypes."""

    def _anew(self, params: Params, items: Sequence[int]) -> dict[int, Tensor]:
        if not items:
            return {}
        found = zip(items, self._generate(self._network.deployed(params), items), strict=True)
        return {item: tokens for item, tokens in found if tokens.tolist() != self.base[item].tolist()}

    def _drift(self, logits: Sequence[Tensor]) -> float:
        total = sum(
            float((before.exp() * (before - after.log_softmax(-1))).sum(dtype=torch.float64))
            for before, after in zip(self._before, logits, strict=True)
        )
        return total / max(1, sum(map(len, self._before)))  # none where every token is forced


@final
class SlowGenerations(Generations):
    """Generate every answer with every edited model: what the fast way has to agree with."""

    def _start(self, batch: Forced) -> Tensor:
        return _asked(self._network.full(self._network.start), batch)

    def predict(self, params: Params) -> Generated:
        """Generate every item anew."""
        with self._network.isolated(), torch.no_grad():
            function = self._network.full(params)
            drift = self._drift([_asked(function, batch) for batch in self._forced])
            items = range(len(self.base))
            return Generated(self._anew(params, items), drift, len(items))


@final
class FastGenerations(Generations):
    """Generate anew only where the answer may be another one.

    Greedy decoding writes a sequence again if and only if every token of it is the most likely one after those before
    it: one pass over the unedited model's answers, whose unedited part was recorded, tells for all items at once. Other
    items are written on from there, with the old answer as a guess, see `Guessing`. Items with a token that wins by
    less than rounding are generated; all are, where decoding is not greedy.

    Args:
        network: a view of the model.
        base: what the unedited model generates, the tokens of each item.
        forced: batches that ask for these.
        generate: generates the answers of a module to some items, by their numbers.
        guessing: how to check a guess, where `generate` takes the most likely token each time, and does nothing else;
            None where it does anything else.
    """

    def __init__(
        self,
        network: Network,
        base: Sequence[Tensor],
        forced: Sequence[Forced],
        generate: Generate,
        *,
        guessing: Guessing | None,
    ) -> None:
        self._guessing, self._recordings = guessing, list[Any]()
        super().__init__(network, base, forced, generate)

    def _start(self, batch: Forced) -> Tensor:
        recording = self._network.record(batch.inputs)
        self._recordings.append(recording)
        logits = _asked(lambda *args, **kwargs: recording.output, batch)
        recording.output = None
        return logits

    def predict(self, params: Params) -> Generated:
        """Look at every token of the answers so far, and generate those items anew whose tokens do not all win."""
        doubtful, logits = list[int](), list[Tensor]()
        with self._network.isolated(), torch.no_grad():
            for batch, recording in zip(self._forced, self._recordings, strict=True):
                answer = self._network.run(params, recording)
                logits.append(_asked(lambda *args, answer=answer, **kwargs: answer, batch))
                won = self._won(logits[-1], batch)
                doubtful += [item for item, sure in zip(batch.items, won.tolist(), strict=True) if not sure]
            drift = self._drift(logits)
            if self._guessing is None:
                return Generated(self._anew(params, range(len(self.base))), drift, len(self.base))
            items = sorted(doubtful)
            function = self._network.full(params)
            known = self._guessing.answers(function, items, [self.base[i] for i in items])
            left = [item for item in items if item not in known]
            changed = {i: tokens for i, tokens in known.items() if tokens.tolist() != self.base[i].tolist()}
            return Generated(changed | self._anew(params, left), drift, len(items))

    @staticmethod
    def _won(logits: Tensor, batch: Forced) -> Tensor:
        """Say for which rows every token wins by more than rounding, (m,), bool."""
        asked = batch.labels >= 0
        tokens, sure = sure_tokens(logits)
        won = torch.ones_like(asked)
        won[asked] = sure & (tokens == batch.labels[asked])
        return won.all(1)


def _asked(function: Function, batch: Forced) -> Tensor:
    """Return the logits of the tokens that are asked for, (tokens, vocabulary)."""
    return outputs(function, batch.inputs)[batch.labels >= 0].float()
