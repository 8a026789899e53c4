"""What a test set asks of answers: by which likelihood they are judged, and which of its targets count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from .._calling import Inputs, Output
from ..errors import InvalidInput, ShapeMismatch
from ..likelihoods import Categorical, Likelihood
from .metrics import Flips, flips

__all__ = ["Asked", "Judged", "TestSet", "check_targets", "chosen", "counted", "item_means"]

NAN = float("nan")

TestSet: TypeAlias = "tuple[Inputs, Tensor]"


def chosen(likelihood: Likelihood | None, outputs: Tensor, targets: Tensor) -> Likelihood:
    """Return what answers are judged by, fitted on outputs of the model before: classes where that can be seen.

    Args:
        likelihood: what the outputs mean; when not given one class at each position, where targets are integers.
        outputs: of the model before, (n, ..., k).
        targets: of the same items, (n, ...) or (n, ..., k).
    """
    if likelihood is None:
        _check_classes(outputs, targets)
        likelihood = Categorical()
    return likelihood.fitted(outputs)


def counted(loss: Tensor) -> Tensor:
    """Return which positions of a test set count, (n, ...), bool: those whose loss is a number.

    Raises:
        InvalidInput: none does.
    """
    counts = ~loss.isnan()
    if not bool(counts.any()):
        raise InvalidInput(
            f"no target of the test set counts, of {loss.numel()}; expected at least one that is neither NaN nor "
            "-100, which say that nothing is asked there"
        )
    return counts


def item_means(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over the positions of each item that count, (n,), float64; NaN for items without one."""
    return _sums(values, counts) / counts.reshape(len(counts), -1).sum(1)


def check_targets(targets: Any, n: int) -> None:
    """Refuse targets that are not a tensor of `n` items, before anything is run."""
    if not isinstance(targets, Tensor) or not targets.ndim or len(targets) != n:
        given = _shown(targets) if isinstance(targets, Tensor) else type(targets).__name__
        raise ShapeMismatch(
            f"the targets of the test set are {given}; expected a tensor (n, ...) with n = {n}, one an input"
        )


@final
@dataclass(frozen=True, eq=False)
class Asked:
    """What a test set asks, before any output is seen.

    Attributes:
        targets: what is right; None where only answers matter.
        likelihood: what outputs mean; classes when not given.
        output: which tensor of a structured answer is meant.
    """

    targets: Tensor | None = None
    likelihood: Likelihood | None = None
    output: Output = None

    @property
    def discrete(self) -> bool:
        """Whether answers alone matter."""
        return self.likelihood is None or self.likelihood.discrete

    def read(self, outputs: Tensor) -> tuple[Likelihood, Tensor | None]:
        """Return the likelihood, fitted on outputs of the model before, and which positions count; None for all."""
        if self.targets is None:
            return (self.likelihood or Categorical()).fitted(outputs), None
        targets = self.targets.to(outputs.device)
        likelihood = chosen(self.likelihood, outputs, targets)
        return likelihood, counted(likelihood.loss(outputs, targets))


@final
@dataclass(frozen=True, eq=False)
class Judged:
    """Outputs of two models on one test set, judged position by position.

    Attributes:
        before: the first model's outputs, (n, ..., k).
        after: the second model's.
        targets: what is right.
        likelihood: what the outputs mean, fitted.
    """

    before: Tensor
    after: Tensor
    targets: Tensor
    likelihood: Likelihood

    def against(self, after: Tensor) -> Judged:
        """Return the same first model beside another one; what is known of it is not found again."""
        found = Judged(self.before, after, self.targets, self.likelihood)
        found.__dict__.update(loss_before=self.loss_before, counts=self.counts, answers_before=self.answers_before)
        return found

    @cached_property
    def answers_before(self) -> Tensor:
        """The first model's answers."""
        return self.likelihood.answer(self.before)

    @cached_property
    def answers_after(self) -> Tensor:
        """The second model's answers."""
        return self.likelihood.answer(self.after)

    @cached_property
    def loss_before(self) -> Tensor:
        """The first model's losses, (n, ...), float64."""
        return self.likelihood.loss(self.before, self.targets)

    @cached_property
    def losses(self) -> tuple[Tensor, Tensor]:
        """The losses of both, (n, ...), float64."""
        if isinstance(self.likelihood, Categorical):  # the same, without a second look at all classes
            wrong = (self.answers_after != self.targets.to(self.after.device)).double()
            return self.loss_before, wrong.where(self.counts, NAN)
        return self.loss_before, self.likelihood.loss(self.after, self.targets)

    @cached_property
    def counts(self) -> Tensor:
        """Which positions count, (n, ...)."""
        return counted(self.loss_before)

    @cached_property
    def changed(self) -> Tensor:
        """At which positions that count the answer is another one, (n, ...)."""
        if isinstance(self.likelihood, Categorical):
            return (self.answers_before != self.answers_after) & self.counts
        return self.likelihood.changed(self.before, self.after) & self.counts

    @cached_property
    def items(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of each item's losses, before and after, and how many of its positions count, three times (n,)."""
        before, after = (_sums(loss, self.counts) for loss in self.losses)
        return before, after, self.counts.reshape(len(self.counts), -1).sum(1)

    @cached_property
    def moved(self) -> Tensor:
        """Which items changed at any position that counts, (n,), bool."""
        return self.changed.reshape(len(self.changed), -1).any(1)

    @property
    def flips(self) -> Flips:
        """How many items changed, for worse and for better."""
        return flips(self.moved, *self.items[:2])

    def errors(self, chosen: Tensor | None = None) -> tuple[float, float]:
        """Return the figures of the likelihood, before and after, of some items, (n,) bool, or of all."""
        before, after, n = (part if chosen is None else part[chosen] for part in self.items)
        total = int(n.sum())
        figure = self.likelihood.figure
        return (figure(float(before.sum()) / total), figure(float(after.sum()) / total)) if total else (NAN, NAN)


def _sums(values: Tensor, counts: Tensor) -> Tensor:
    return values.double().where(counts, 0.0).reshape(len(values), -1).sum(1)


def _check_classes(outputs: Tensor, targets: Tensor) -> None:
    classes = 1 if outputs.ndim >= 4 else outputs.ndim - 1
    positions = tuple(size for place, size in enumerate(outputs.shape) if place != classes)
    whole = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
    if outputs.ndim < 2 or not whole or tuple(targets.shape) != positions:
        wanted = "integers of shape " + str(positions) if outputs.ndim > 1 else "a likelihood"
        raise ShapeMismatch(
            f"the targets of the test set are {_shown(targets)} and the model's outputs {_shown(outputs)}; expected "
            f"{wanted}: right classes. For other answers say what the outputs mean: likelihood=Bernoulli() for tags, "
            "likelihood=Gaussian() for numbers, likelihood=Categorical(dim=...) for classes on another dimension"
        )


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]}{tuple(tensor.shape)}"
