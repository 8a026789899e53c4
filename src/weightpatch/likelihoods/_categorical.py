"""Classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import InvalidInput
from ._base import IGNORED, Likelihood, Of
from ._shapes import check_alike, check_targets, classes_last, dimension

__all__ = ["Categorical"]

_SUMS = 1e-5  # how far float32 probabilities of one position are from a sum of 1
_HALVES = 4e-3  # the same of float16 and bfloat16


@final
@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of several classes at each position; the answer is the likeliest class.

    Args:
        dim: the dimension of the classes; when not given the last one, and 1 for outputs of four and more dimensions,
            as of an image's pixels (n, classes, height, width).
        of: what the outputs are; when not given probabilities where no output is negative and each position's sum is 1,
            else logits.

    >>> Categorical(of=Of.probabilities).answer(torch.tensor([[0.2, 0.8]]))
    tensor([1])
    """

    dim: int | None = None
    of: Of | None = None

    @property
    def error_name(self) -> str:
        """What `figure` is called."""
        return "error"

    @property
    def unit(self) -> str:
        """The unit of `figure`."""
        return "%"

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be read off outputs."""
        return self.of is not None

    @property
    def discrete(self) -> bool:
        """True: an answer is right or wrong."""
        return True

    def fitted(self, outputs: Tensor) -> Categorical:
        """Fix the dimension and what the outputs are."""
        if self.of is not None:
            return self
        dim = dimension(outputs, self.dim)
        return Categorical(dim, self._of(classes_last(self, outputs, dim)))

    def logits(self, outputs: Tensor) -> Tensor:
        """Return logits with the classes on the last dimension, (n, ..., classes); differentiable.

        Those of probabilities are their logarithms, of 0 that of the smallest number.
        """
        laid = classes_last(self, outputs, dimension(outputs, self.dim))
        return laid.clamp_min(torch.finfo(laid.dtype).tiny).log() if self._of(laid) is Of.probabilities else laid

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return the probabilities of the classes, on the last dimension; NaN for all of a position with a NaN."""
        return self.logits(outputs).softmax(-1)

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return ``Σ_c p_c (log p_c - log q_c)``, (n, ...), nats."""
        check_alike(self, before, after)
        p, q = (self.logits(outputs).log_softmax(-1) for outputs in (before, after))
        possible = p > -torch.inf  # a class of probability 0 adds nothing, also where both sides are -inf
        return (p.exp() * (p.where(possible, 0) - q.where(possible, 0))).sum(-1)

    def answer(self, outputs: Tensor) -> Tensor:
        """Return the likeliest class of each position, (n, ...); -1, which is no class, where an output is NaN."""
        laid = classes_last(self, outputs, dimension(outputs, self.dim))
        best, index = laid.max(-1)
        return index.where(~best.isnan(), -1)

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return where the class is another one, (n, ...)."""
        check_alike(self, before, after)
        return self.answer(before) != self.answer(after)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1 where the class is wrong and 0 where it is right; NaN where the target is -100: ignored."""
        answers = self.answer(outputs)
        check_targets(self, targets, answers.shape, whole=True)
        targets = targets.to(answers.device)
        classes = outputs.shape[dimension(outputs, self.dim)]
        asked = targets != IGNORED
        if bool(((targets >= classes) | (targets < 0) & asked).any()):
            raise InvalidInput(
                f"targets go from {int(targets[asked].min())} to {int(targets.max())}; the model has {classes} "
                f"classes, so expected 0 to {classes - 1}, or {IGNORED} where nothing is asked"
            )
        return (answers != targets).double().masked_fill(~asked, torch.nan)

    def figure(self, mean: float) -> float:
        """Return the share of wrong answers, in percent."""
        return 100 * mean

    def log_prob(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return ``log p`` of classes (n, ...)."""
        return self.logits(outputs).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a class at each position."""
        chances = self.logits(outputs.detach()).double().softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, -2).cpu(), 1, generator=generator)
        return drawn.view(chances.shape[:-1]).to(outputs.device)

    def margin(self, outputs: Tensor, before: Tensor) -> Tensor:
        """Return by how much the best class beats the second, in units of the outputs."""
        best = classes_last(self, outputs, dimension(outputs, self.dim)).topk(2, -1).values
        return best[..., 0] - best[..., 1]

    def reach(self, error: Tensor) -> Tensor:
        """Return the largest difference of two errors."""
        laid = classes_last(self, error, dimension(error, self.dim))
        return laid.amax(-1) - laid.amin(-1)

    def _of(self, laid: Tensor) -> Of:
        return self.of or (Of.probabilities if _sums_to_one(laid) else Of.logits)


def _sums_to_one(laid: Tensor) -> bool:
    laid = laid.detach()
    if not laid.numel() or not bool((laid >= 0).all()):
        return False
    halved = any(torch.equal(laid.to(half).to(laid.dtype), laid) for half in (torch.float16, torch.bfloat16))
    return bool(((laid.double().sum(-1) - 1).abs() <= (_HALVES if halved else _SUMS)).all())
