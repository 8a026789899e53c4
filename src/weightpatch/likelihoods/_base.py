"""What a likelihood is: a distribution of answers, one at each position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

import torch
from torch import Tensor

from ..errors import InvalidInput

__all__ = ["IGNORED", "Likelihood", "Of"]

IGNORED = -100  # a target where nothing is asked, as torch's losses have it


class Of(Enum):
    """What numbers stand for probabilities."""

    logits = "logits"
    probabilities = "probabilities"
    log_probabilities = "log_probabilities"

    def __repr__(self) -> str:
        return f"Of.{self.name}"


class Likelihood(ABC):
    """The distribution of an answer, one at each *position*: an item, a token of a sequence, a pixel of an image.

    Outputs have shape (n, ..., k): k numbers a position. What is returned for each position has shape (n, ...). A
    likelihood without `log_prob` and `sample` gives no two-sided statistics; one without `margin` and `reach` is
    measured by exact passes.
    """

    @property
    def name(self) -> str:
        """What reports call it, with its units."""
        return repr(self)

    @property
    def error_name(self) -> str:
        """What `figure` is called."""
        return "loss"

    @property
    def unit(self) -> str:
        """The unit of `figure`."""
        return ""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be read off outputs."""
        return True

    @property
    def discrete(self) -> bool:
        """Whether the loss depends on the answer alone, from 0 where that is right to 1 where nothing of it is."""
        return False

    def fitted(self, outputs: Tensor) -> Likelihood:
        """Return this likelihood with everything fixed that was left to be read off outputs, such as a scale."""
        return self

    @abstractmethod
    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return KL(before || after) of each position in nats, shape (n, ...), differentiable in `after`."""

    @abstractmethod
    def answer(self, outputs: Tensor) -> Tensor:
        """Return what a user of the model reads, (n, ...); one whose answers have k parts overrides `changed` too."""

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return at which positions the answer is another one, (n, ...), bool."""
        return self.answer(before) != self.answer(after)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return how wrong each position is, (n, ...), float64; NaN where the target does not count."""
        raise InvalidInput(f"{self!r} does not say what an error is; write its `loss(outputs, targets)`")

    def figure(self, mean: float) -> float:
        """Return the figure that reports print, of a mean loss."""
        return mean

    def log_prob(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return the log-likelihood of answers, (n, ...), differentiable in `outputs`."""
        raise InvalidInput(f"{self!r} has no log-likelihood; write its `log_prob(outputs, answers)` and `sample`")

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw answers, in the form that `log_prob` takes; the generator is on the CPU."""
        raise InvalidInput(f"{self!r} cannot be sampled; write its `sample(outputs, generator)` and `log_prob`")

    def margin(self, outputs: Tensor, before: Tensor) -> Tensor | None:
        """Return how far each position is from changing its verdict `changed`, (n, ...); None where it does not say."""
        return None

    def reach(self, error: Tensor) -> Tensor:
        """Return by how much errors of the outputs, (n, ..., k), move `margin` at most, (n, ...)."""
        raise InvalidInput(f"{self!r} has a margin and no reach; write its `reach(error)`")
