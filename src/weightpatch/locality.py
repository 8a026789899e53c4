"""What must stay as it was: one measure, used as a penalty, as a training term and as a metric."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ._calling import Function, Inputs, check_batch, outputs
from .errors import ShapeMismatch

__all__ = ["Locality", "divergence"]


@final
@dataclass(frozen=True, eq=False)
class Locality:
    """How far the predictions on these inputs move: the mean of KL(before || after), in nats.

    Both sides must be functions in the same mode (the driver and `evaluate` give two evaluation-mode functions), so
    that an edit that changes nothing drifts by exactly 0.

    Args:
        inputs: a batch of n items.
        mask: which positions count, bool, the shape of the logits without their class dimension: (n,) or (n, length).
            Positions where it is False (padding) count neither in the sum nor in the mean.
        answers: the logits to stay with, as `bind` fixes them; those of the model that is edited when not given.
    """

    inputs: Inputs
    mask: Tensor | None = None
    answers: Tensor | None = None

    def __post_init__(self) -> None:
        check_batch(self.inputs, "Locality")
        if self.mask is not None and not bool(self.mask.any()):
            raise ShapeMismatch(
                "Locality was given a mask that is False everywhere; expected at least one position to count"
            )

    @torch.no_grad()
    def bind(self, function: Function) -> Locality:
        """Return what should stay as `function` answers now: what many edits change is then measured together."""
        return replace(self, answers=outputs(function, self.inputs).detach())

    def drift(self, before: Function, after: Function) -> Tensor:
        """Return the mean KL divergence over the positions that count, a scalar in nats.

        The reference, `before` unless `answers` are bound, is detached: gradient flows through `after` alone.
        """
        reference = self.answers
        if reference is None:
            with torch.no_grad():
                reference = outputs(before, self.inputs).detach()
        answers = outputs(after, self.inputs)
        if self.mask is not None and reference.shape == answers.shape:
            if self.mask.shape != answers.shape[:-1]:
                raise ShapeMismatch(
                    f"Locality was given a mask of shape {tuple(self.mask.shape)}; expected {tuple(answers.shape[:-1])}"
                )
            reference, answers = reference[self.mask], answers[self.mask]
        return divergence(reference, answers).mean()


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(softmax(before) || softmax(after)) over the last dimension of logits, in nats, shape (...,)."""
    if before.shape != after.shape or before.shape[-1] < 2:
        raise ShapeMismatch(
            f"a KL divergence was asked of outputs {tuple(before.shape)} and {tuple(after.shape)}; expected two equal "
            "shapes of logits with at least 2 classes on the last dimension"
        )
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    possible = p > -torch.inf  # a class of probability 0 adds nothing, also where both sides are -inf
    return (p.exp() * (p.where(possible, 0) - q.where(possible, 0))).sum(-1)
