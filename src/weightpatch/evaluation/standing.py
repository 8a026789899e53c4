"""Which answers of an unedited sequence model an edited one gives again, and how far its distributions have moved."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from typing import Any, final

import torch
from torch import Tensor, nn

from .._calling import Function, Inputs, Params, outputs
from ..likelihoods import Categorical, Of
from ..network import Network
from .guessing import ROUNDING, Lost, sure_tokens

__all__ = ["ByLogits", "ByStates", "Forced", "Readout", "Standing", "asked", "mean_divergence", "standing_of"]

_CLASSES = Categorical(-1, Of.logits)
_SAMPLED = 1024  # tokens, of those that moved, on which the divergence is measured
_AT_ONCE = 2**23  # logits
_AT_A_TIME = 512  # tokens: fewer take as long each, more are looked at in vain


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

    @property
    def places(self) -> list[tuple[int, int]]:
        """The item of each token asked for, and its place in the answer; those before it are asked for too."""
        return [
            (item, place)
            for item, n in zip(self.items, (self.labels >= 0).sum(1).tolist(), strict=True)
            for place in range(n)
        ]


@final
@dataclass(frozen=True, eq=False)
class Readout:
    """The last, linear layer of a model: logits are ``W h + b``, with b the same for all tokens.

    Attributes:
        states: answers h, (m, length, width), to the model's inputs, and holds the model's own parameters.
        prefix: what their names have there before those of the model.
        weight: W, (vocabulary, width); no edit moves it.
    """

    states: nn.Module
    prefix: str
    weight: Tensor


class Standing(ABC):
    """Looks at every token of the unedited model's answers at once.

    Greedy decoding writes an answer again if and only if every token of it is the most likely one after those before.
    """

    @abstractmethod
    def look(self, params: Params) -> tuple[dict[int, Lost], float]:
        """Return the items that may be answered otherwise, in order, and the mean KL(before || after) of a token."""


@final
class ByLogits(Standing):
    """By the logits of all tokens.

    Args:
        network: a view of the model.
        forced: batches that ask for the answers.
    """

    def __init__(self, network: Network, forced: Sequence[Forced]) -> None:
        self._network, self._forced = network, forced
        self._recordings, self._before = list[Any](), list[Tensor]()
        with network.isolated(), torch.no_grad():
            for batch in forced:
                recording = network.record(batch.inputs)
                self._before.append(_picked(recording.output, batch))
                recording.output = None
                self._recordings.append(recording)

    def look(self, params: Params) -> tuple[dict[int, Lost], float]:
        """Look at what is most likely, and by more than rounding."""
        lost, logits = dict[int, Lost](), list[Tensor]()
        for batch, recording in zip(self._forced, self._recordings, strict=True):
            logits.append(_picked(self._network.run(params, recording), batch))
            _note(lost, batch.places, logits[-1], batch.labels[batch.labels >= 0])
        return dict(sorted(lost.items())), mean_divergence(self._before, logits)


@final
class ByStates(Standing):
    """By what the readout is given: the logits are computed only of tokens that may have lost.

    A state that moves by d changes the lead of its token over another by at most ``|d| |w - w'|``, with the readout's
    rows of the two (Cauchy–Schwarz); so there is a radius within which the token surely stays, found once; one that
    does not move at all keeps its token, however narrowly that wins. The divergence of many tokens is estimated on
    1,024 of those that moved. At first it is ``dᵀ C d / 2``, with C the covariance of the readout's rows under a
    token's distribution, and it grows no faster than |d| later on, so that half of them are drawn in proportion to
    |d|² tr C, a quarter to |d| and a quarter alike, and all are weighted accordingly; of fewer it is exact.

    Args:
        states: a view of the model up to its readout.
        forced: batches that ask for the answers.
        readout: of the model.
        logits: the unedited model's, of each batch, (tokens, vocabulary).

    Raises:
        ValueError: the logits are not those of the readout.
    """

    def __init__(self, states: Network, forced: Sequence[Forced], readout: Readout, logits: Iterable[Tensor]) -> None:
        self._states, self._forced, self._prefix = states, forced, readout.prefix
        self._weight = readout.weight.detach().float()
        self._places = [place for batch in forced for place in batch.places]
        self._items, self._depths = torch.tensor(self._places, dtype=torch.int64, device="cpu").reshape(-1, 2).T
        self._labels = torch.cat([batch.labels[batch.labels >= 0] for batch in forced])
        self._recordings, bias = list[Any](), None
        found, radii, spreads = list[Tensor](), list[Tensor](), list[Tensor]()
        with states.isolated(), torch.no_grad():
            for batch, told in zip(forced, logits, strict=True):
                recording = states.record(batch.inputs)
                found.append(_picked(recording.output, batch))
                recording.output = None
                self._recordings.append(recording)
                rest = told - found[-1] @ self._weight.T
                bias = rest[:1] if bias is None or not len(bias) else bias
                if not bool(((rest - bias).abs() <= ROUNDING * told.abs().amax(1, keepdim=True)).all()):
                    raise ValueError("the logits are not a linear function of the states")
                radii.append(self._radii(told, batch.labels[batch.labels >= 0]))
                spreads.append(self._spreads(told))
        assert bias is not None
        self._bias = bias
        self._before, self._radius, self._spread = torch.cat(found), torch.cat(radii), torch.cat(spreads)

    def _radii(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return how far each state may move before its token can lose, (tokens,); negative where it may have."""
        squares, largest = self._weight.square().sum(1), logits.abs().amax(1)
        found = []
        for some in self._parts(torch.arange(len(labels), device=labels.device)):
            rows = self._weight[labels[some]]
            both = squares[labels[some], None] + squares
            apart = (both - 2 * rows @ self._weight.T + 1e-5 * both).sqrt()  # never less than it is, by rounding
            lead = logits[some].gather(1, labels[some, None]) - logits[some] - 2 * ROUNDING * largest[some, None]
            radius = (lead / apart).scatter(1, labels[some, None], torch.inf)
            found.append(radius.amin(1))
        # within this the largest logit at most doubles, and with it what rounding may do
        return torch.minimum(torch.cat(found), largest / squares.max().sqrt())

    def _spreads(self, logits: Tensor) -> Tensor:
        """Return tr C of every token, (tokens,), never quite 0."""
        p, squares = _CLASSES.probabilities(logits), self._weight.square().sum(1)
        found = p @ squares - (p @ self._weight).square().sum(1)
        return found.clamp_min(1e-6 * float(squares.max()))

    def look(self, params: Params) -> tuple[dict[int, Lost], float]:
        """Look at how far the states have moved, and at the logits of those that moved too far."""
        named = {f"{self._prefix}{name}": value for name, value in params.items()}
        answers = zip(self._forced, self._recordings, strict=True)
        states = torch.cat([_picked(self._states.run(named, recording), batch) for batch, recording in answers])
        far = (states - self._before).norm(dim=1)
        safe = (far < self._radius) | (far == 0)  # never with NaN
        lost = dict[int, Lost]()
        left = (~safe).nonzero().squeeze(1).cpu()
        left = left[self._depths[left].argsort(stable=True)]
        while len(left):  # what is behind the first lost place of an item is not looked at
            some, left = left[:_AT_A_TIME], left[_AT_A_TIME:]
            logits = states[some] @ self._weight.T + self._bias
            _note(lost, [self._places[i] for i in some.tolist()], logits, self._labels[some])
            left = left[~torch.isin(self._items[left], self._items.new_tensor(list(lost)))]
        return dict(sorted(lost.items())), self._divergence(states, far) / max(1, len(states))

    def _divergence(self, states: Tensor, far: Tensor) -> float:
        """Return the divergence of all tokens, added up.

        Args:
            states: of the edited model, (tokens, width).
            far: how far each has moved, (tokens,).
        """
        if not bool(far.isfinite().all()):
            return math.nan
        some = (far > 0).nonzero().squeeze(1)
        weight = torch.ones(len(some), dtype=torch.float64, device=far.device)
        if len(some) > _SAMPLED:
            length = far[some].double()
            likely = length.square() * self._spread[some]
            chance = likely / (2 * likely.sum()) + length / (4 * length.sum()) + 1 / (4 * len(some))
            seed = int(far.sum(dtype=torch.float64).view(torch.int64)) >> 1  # another one for each edit
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.multinomial(chance.cpu(), _SAMPLED, True, generator=generator).to(some.device)
            some, weight = some[drawn], 1 / (_SAMPLED * chance[drawn])
        total = 0.0
        for part, own in zip(self._parts(some), self._parts(weight), strict=True):
            logits = states[part] @ self._weight.T + self._bias
            total += float((own * self._divergences(part, logits).double()).sum())
        return total

    def _divergences(self, some: Tensor, after: Tensor) -> Tensor:
        return _CLASSES.divergence(self._before[some] @ self._weight.T + self._bias, after)

    def _parts(self, some: Tensor) -> list[Tensor]:
        size = max(1, _AT_ONCE // len(self._weight))
        return [some[begin : begin + size] for begin in range(0, len(some), size)]


def _note(lost: dict[int, Lost], places: Sequence[tuple[int, int]], logits: Tensor, labels: Tensor) -> None:
    """Note for each item the first place that is lost.

    Args:
        lost: is added to.
        places: item and place of n tokens, those of an item in order.
        logits: (n, vocabulary).
        labels: the tokens that were the most likely ones, (n,).
    """
    tokens, sure = sure_tokens(logits)
    for i in (~(sure & (tokens == labels))).nonzero().squeeze(1).tolist():
        item, place = places[i]
        lost.setdefault(item, Lost(place, int(tokens[i]) if bool(sure[i]) else -1))


def standing_of(network: Network, forced: Sequence[Forced], readout: Readout | None) -> Standing:
    """Return the faster of the two ways that serves this model.

    Args:
        network: a view of the model.
        forced: batches that ask for the answers.
        readout: of the model, where it is known to have one.
    """
    if readout is None:
        return ByLogits(network, forced)
    logits = (asked(network.full(network.start), batch) for batch in forced)
    view = Network(readout.states, [escape(f"{readout.prefix}{name}") for name in network.names])
    try:
        return ByStates(view, forced, readout, logits)
    except Exception:  # not linear in the states, or they are had in another way: logits always serve
        return ByLogits(network, forced)


def asked(function: Function, batch: Forced) -> Tensor:
    """Return the logits of the tokens that are asked for, (tokens, vocabulary)."""
    return outputs(function, batch.inputs)[batch.labels >= 0].float()


def mean_divergence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the mean KL(before || after) of a token, nats; 0 where there is none.

    Args:
        before: logits, (tokens, vocabulary) of each batch.
        after: the same of an edited model.
    """
    pairs = zip(before, after, strict=True)
    total = sum(float(_CLASSES.divergence(old, new).sum(dtype=torch.float64)) for old, new in pairs)
    return total / max(1, sum(map(len, before)))  # none where every token is forced


def _picked(answer: Any, batch: Forced) -> Tensor:
    return asked(lambda *args, **kwargs: answer, batch)
