"""What edited sequence models generate for a test set: the plain way, and the fast way with the same answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from .._calling import Params
from ..network import Network
from .guessing import Guessing
from .standing import Forced, Readout, asked, mean_divergence, standing_of

__all__ = ["FastGenerations", "Generated", "Generations", "SlowGenerations"]

Generate = Callable[[nn.Module, Sequence[int]], list[Tensor]]


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

    @abstractmethod
    def predict(self, params: Params) -> Generated:
        """Return what the model generates with these parameters, rounded to its dtypes."""

    def _anew(self, params: Params, items: Sequence[int]) -> dict[int, Tensor]:
        if not items:
            return {}
        found = zip(items, self._generate(self._network.deployed(params), items), strict=True)
        return {item: tokens for item, tokens in found if tokens.tolist() != self.base[item].tolist()}


@final
class SlowGenerations(Generations):
    """Generate every answer with every edited model: what the fast way has to agree with."""

    def __init__(self, network: Network, base: Sequence[Tensor], forced: Sequence[Forced], generate: Generate) -> None:
        super().__init__(network, base, forced, generate)
        with network.isolated(), torch.no_grad():
            self._before = [asked(network.full(network.start), batch) for batch in forced]

    def predict(self, params: Params) -> Generated:
        """Generate every item anew."""
        with self._network.isolated(), torch.no_grad():
            function = self._network.full(params)
            drift = mean_divergence(self._before, [asked(function, batch) for batch in self._forced])
            items = range(len(self.base))
            return Generated(self._anew(params, items), drift, len(items))


@final
class FastGenerations(Generations):
    """Generate anew only where the answer may be another one.

    One look at every token of the unedited model's answers, whose unedited part was recorded, tells for all items at
    once: see `Standing`. Other items are written on from there, with the old answer as a guess, see `Guessing`. Items
    with a token that wins by less than rounding are generated; all are, where decoding is not greedy.

    Args:
        network: a view of the model.
        base: what the unedited model generates, the tokens of each item.
        forced: batches that ask for these.
        generate: generates the answers of a module to some items, by their numbers.
        guessing: how to check a guess, where `generate` takes the most likely token each time, and does nothing else;
            None where it does anything else.
        readout: of the model, where it is known to have one.
    """

    def __init__(
        self,
        network: Network,
        base: Sequence[Tensor],
        forced: Sequence[Forced],
        generate: Generate,
        *,
        guessing: Guessing | None,
        readout: Readout | None = None,
    ) -> None:
        super().__init__(network, base, forced, generate)
        self._guessing, self._standing = guessing, standing_of(network, forced, readout)

    def predict(self, params: Params) -> Generated:
        """Look at every token of the answers so far, and generate those items anew whose tokens do not all win."""
        with self._network.isolated(), torch.no_grad():
            lost, drift = self._standing.look(params)
            if self._guessing is None:
                return Generated(self._anew(params, range(len(self.base))), drift, len(self.base))
            known = self._guessing.answers(self._network.full(params), lost, self.base)
            left = [item for item in lost if item not in known]
            changed = {i: tokens for i, tokens in known.items() if tokens.tolist() != self.base[i].tolist()}
            return Generated(changed | self._anew(params, left), drift, len(lost))
