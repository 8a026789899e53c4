"""Where edits come from while a network is trained: p(l_e)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Generator, Tensor

from .._calling import Function, Inputs, check_batch, check_classes, length, outputs, rows
from ..constraints import Classified, Constraint
from ..errors import InvalidInput
from .episodes import Episode

__all__ = ["Alter", "Listed", "Mistakes", "Mixed", "RandomLabels", "RankMatched", "Sampler"]

Alter: TypeAlias = Callable[[Inputs, Generator], Inputs]


class Sampler(ABC):
    """A distribution of edits. A draw depends on the generator and on the network of the moment alone."""

    @abstractmethod
    def draw(self, count: int, function: Function, generator: Generator) -> list[Episode]:
        """Draw edits, at least one and at most `count`.

        Args:
            count: how many are wanted.
            function: the network of the moment, in evaluation mode and without gradients.
            generator: all randomness comes from it; on the CPU.

        Raises:
            InvalidInput: there is nothing to draw.
        """


@final
@dataclass(frozen=True, eq=False)
class RandomLabels(Sampler):
    """A uniform random item is to get a uniform random label: the setting of the paper's CIFAR-10 experiments.

    Args:
        inputs: a batch of n items.
        classes: how many labels there are.
        altered: makes m altered copies of one item, for the generality term: (inputs, generator) to (m, ...).
        margin: by how much the label must win, in logits.
    """

    inputs: Inputs
    classes: int
    altered: Alter | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_batch(self.inputs, "RandomLabels")
        if self.classes < 2:
            raise InvalidInput(f"RandomLabels was given classes={self.classes}; expected at least 2")

    def draw(self, count: int, function: Function, generator: Generator) -> list[Episode]:
        """Draw items and labels; the network is not asked."""
        chosen = torch.randint(length(self.inputs), (count,), generator=generator, device="cpu")
        labels = torch.randint(self.classes, (count,), generator=generator, device="cpu")
        return _episodes(rows(self.inputs, chosen), labels, self.altered, self.margin, generator)


@dataclass(frozen=True, eq=False)
class Labelled(Sampler):
    """A sampler that compares the network's answers with true labels.

    Args:
        inputs: a batch of n items.
        labels: their true labels, shape (n,), integers.
        altered: makes m altered copies of one item, for the generality term: (inputs, generator) to (m, ...).
        margin: by how much the class of an edit must win, in logits.
        candidates: how many random items the network is asked about at a time.
    """

    inputs: Inputs
    labels: Tensor
    altered: Alter | None = None
    margin: float = 0.0
    candidates: int = 256

    def __post_init__(self) -> None:
        n, who = check_batch(self.inputs, type(self).__name__), type(self).__name__
        if self.labels.shape != (n,):
            raise InvalidInput(
                f"{who} was given {n} inputs and labels of shape {tuple(self.labels.shape)}; expected ({n},)"
            )
        check_classes(self.labels, who)
        if self.candidates < 1:
            raise InvalidInput(f"{who} was given candidates={self.candidates}; expected at least 1")

    def _asked(self, function: Function, some: Tensor) -> Tensor:
        """Return the network's logits of some items, (n, classes), where all labels are among these classes."""
        logits = outputs(function, rows(self.inputs, some))
        check_classes(self.labels, type(self).__name__, logits.shape[-1])
        return logits


@final
@dataclass(frozen=True, eq=False)
class Mistakes(Labelled):
    """The network's own mistakes are to get their true labels."""

    def draw(self, count: int, function: Function, generator: Generator) -> list[Episode]:
        """Ask about batches of items, in a random order, until there are enough mistakes or no more items."""
        found: list[Tensor] = []
        order = torch.randperm(len(self.labels), generator=generator, device="cpu")
        for some in torch.split(order, self.candidates):
            answers = self._asked(function, some).argmax(-1).to(self.labels.device)
            found.append(some[(answers != self.labels[some]).cpu()])
            if sum(map(len, found)) >= count:
                break
        chosen = torch.cat(found)[:count]
        if not len(chosen):
            raise InvalidInput(
                f"Mistakes has nothing to draw: the network makes no mistake on its {len(self.labels)} items; use "
                "RandomLabels or RankMatched, or items that it was not trained on"
            )
        return _episodes(rows(self.inputs, chosen), self.labels[chosen], self.altered, self.margin, generator)


@final
@dataclass(frozen=True, eq=False)
class RankMatched(Labelled):
    """A random item is to get the class at rank r of its prediction, r being that of true labels where it is wrong.

    Labels are then as plausible as those of real corrections. Source: Sinitsin et al., ICLR 2020, their ImageNet
    experiments. The ranks are those of mistakes on a random batch of candidates; where it has none, r is 2.
    """

    def draw(self, count: int, function: Function, generator: Generator) -> list[Episode]:
        """Measure the ranks on candidates, and ask the first of them for classes of such ranks."""
        some = torch.randperm(len(self.labels), generator=generator, device="cpu")[: max(self.candidates, count)]
        order = self._asked(function, some).argsort(-1, descending=True).cpu()
        ranks = (order == self.labels[some].cpu()[:, None]).int().argmax(-1)
        ranks = ranks[ranks > 0] if bool((ranks > 0).any()) else torch.ones(1, dtype=torch.int64, device="cpu")
        chosen = torch.randperm(len(some), generator=generator, device="cpu")[:count]
        wanted = ranks[torch.randint(len(ranks), (len(chosen),), generator=generator, device="cpu")]
        labels = order[chosen].gather(1, wanted[:, None]).squeeze(1)
        return _episodes(rows(self.inputs, some[chosen]), labels, self.altered, self.margin, generator)


@final
@dataclass(frozen=True, eq=False)
class Listed(Sampler):
    """Uniform random ones of a list, each at most once a draw.

    Args:
        constraints: constraints or episodes.
    """

    constraints: Sequence[Constraint | Episode]

    def __post_init__(self) -> None:
        if not self.constraints:
            raise InvalidInput("Listed was given no constraints; expected at least one, such as Classified(x, y)")

    def draw(self, count: int, function: Function, generator: Generator) -> list[Episode]:
        """Draw from the list; the network is not asked."""
        chosen = torch.randperm(len(self.constraints), generator=generator, device="cpu")[:count].tolist()
        some = [self.constraints[place] for place in chosen]
        return [item if isinstance(item, Episode) else Episode(item) for item in some]


@final
@dataclass(frozen=True, eq=False)
class Mixed(Sampler):
    """Each edit comes from one of several samplers.

    Args:
        parts: the samplers.
        weights: how often each is chosen, relative to the others; above 0.
    """

    parts: Sequence[Sampler]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        positive = all(math.isfinite(weight) and weight > 0 for weight in self.weights)
        if not self.parts or len(self.parts) != len(self.weights) or not positive:
            raise InvalidInput(
                f"Mixed was given {len(self.parts)} samplers and weights {list(self.weights)}; expected at least one "
                "sampler and one weight above 0 for each"
            )

    def draw(self, count: int, function: Function, generator: Generator) -> list[Episode]:
        """Draw how many come from each, then these."""
        weights = torch.tensor(self.weights, dtype=torch.float64, device="cpu")
        shares = torch.multinomial(weights, count, replacement=True, generator=generator).bincount(
            minlength=len(self.parts)
        )
        pairs = zip(self.parts, shares.tolist(), strict=True)
        return [episode for part, share in pairs if share for episode in part.draw(share, function, generator)]


def _episodes(
    inputs: Inputs, labels: Tensor, altered: Alter | None, margin: float, generator: Generator
) -> list[Episode]:
    """Make one edit of each row."""
    made = []
    for place in range(len(labels)):
        one, label = rows(inputs, slice(place, place + 1)), labels[place : place + 1]
        copies = None if altered is None else altered(one, generator)
        also = None if copies is None else Classified(copies, label.repeat(length(copies)))
        made.append(Episode(Classified(one, label, margin), also))
    return made
