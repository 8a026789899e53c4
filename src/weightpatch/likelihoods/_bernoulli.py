"""Tags."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidInput
from ._base import IGNORED, Likelihood, Of
from ._shapes import aligned, check_alike, check_targets, dimension, events

__all__ = ["Bernoulli"]

_MANY = 32  # outputs that all lie in [0, 1] by no accident


@final
@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Tags that are on or off independently of each other: multi-label models, and binary ones of one output.

    Args:
        of: what the outputs are, logits or probabilities; when not given probabilities where many outputs all lie in
            [0, 1], else logits.
        dim: the dimension of the tags; when not given the last one, and 1 for outputs of four and more dimensions.
            Outputs of shape (n,) are one tag.
    """

    of: Of | None = None
    dim: int | None = None

    @property
    def error_name(self) -> str:
        """What `figure` is called."""
        return "tags wrong"

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

    def fitted(self, outputs: Tensor) -> Bernoulli:
        """Fix the dimension and what the outputs are.

        Raises:
            InvalidInput: few outputs that all lie in [0, 1] can be either.
        """
        if self.of is not None:
            return self
        of = self._of(outputs)
        return Bernoulli(of, self.dim if outputs.ndim == 1 else dimension(outputs, self.dim))

    def logits(self, outputs: Tensor) -> Tensor:
        """Return logits with the tags on the last dimension, (n, ..., tags); differentiable."""
        laid, of = events(outputs, self.dim), self._of(outputs)
        if of is Of.probabilities:
            tiny = torch.finfo(laid.dtype)
            return laid.clamp_min(tiny.tiny).log() - (1 - laid).clamp_min(tiny.tiny).log()
        return laid if of is Of.logits else laid - torch.log(-torch.expm1(laid.clamp_max(-1e-38)))

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return the probability of each tag to be on, (n, ..., tags)."""
        return self.logits(outputs).sigmoid()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the sum over tags of ``p log(p/q) + (1-p) log((1-p)/(1-q))``, (n, ...), nats."""
        check_alike(self, before, after)
        a, b = self.logits(before), self.logits(after)
        on, off = F.logsigmoid(a) - F.logsigmoid(b), F.logsigmoid(-a) - F.logsigmoid(-b)
        p = a.sigmoid()
        return (p * on.where(p > 0, 0) + (1 - p) * off.where(p < 1, 0)).sum(-1)

    def answer(self, outputs: Tensor) -> Tensor:
        """Return which tags are on, p > ½, (n, ..., tags), as 0 and 1; -1 where an output is NaN."""
        z = self.logits(outputs)
        return (z > 0).long().masked_fill(z.isnan(), -1)

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return where any tag changed, (n, ...)."""
        check_alike(self, before, after)
        return (self.answer(before) != self.answer(after)).any(-1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the share of tags that are wrong; targets are 0 or 1, and -100 where nothing is asked."""
        answers = self.answer(outputs)
        given = aligned(targets.to(answers.device), outputs, self.dim)
        check_targets(self, given, answers.shape, whole=False)
        given = given.long()
        if bool(((given != 0) & (given != 1) & (given != IGNORED)).any()):
            raise InvalidInput(
                f"targets of tags go from {int(given.min())} to {int(given.max())}; expected 0 for off, 1 for on, and "
                f"{IGNORED} where nothing is asked"
            )
        counts = given != IGNORED
        wrong = ((answers != given) & counts).double().sum(-1)
        asked = counts.sum(-1)
        return (wrong / asked).masked_fill(asked == 0, torch.nan)

    def figure(self, mean: float) -> float:
        """Return the share of wrong tags, in percent."""
        return 100 * mean

    def log_prob(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return the sum over tags of the log-probability of answers (n, ..., tags)."""
        z = self.logits(outputs)
        return F.logsigmoid(z.where(answers > 0, -z)).sum(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw every tag."""
        p = self.logits(outputs.detach()).double().sigmoid().cpu()
        return (torch.rand(p.shape, generator=generator, dtype=p.dtype, device="cpu") < p).long().to(outputs.device)

    def margin(self, outputs: Tensor, before: Tensor) -> Tensor:
        """Return how far the tag nearest to the threshold is from it, in units of the outputs."""
        laid = events(outputs, self.dim)
        edge = {Of.logits: 0.0, Of.probabilities: 0.5, Of.log_probabilities: math.log(0.5)}[self._of(outputs)]
        return (laid - edge).abs().amin(-1)

    def reach(self, error: Tensor) -> Tensor:
        """Return the largest error."""
        return events(error, self.dim).abs().amax(-1)

    def _of(self, outputs: Tensor) -> Of:
        if self.of is not None:
            return self.of
        inside = bool(((outputs >= 0) & (outputs <= 1)).all())
        if inside and outputs.numel() < _MANY:
            raise InvalidInput(
                f"Bernoulli was given {outputs.numel()} outputs that all lie between 0 and 1, which may be logits or "
                "probabilities; say which: likelihood=Bernoulli(of=Of.logits) or Bernoulli(of=Of.probabilities)"
            )
        return Of.probabilities if inside else Of.logits
