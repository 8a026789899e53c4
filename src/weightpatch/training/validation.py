"""How well the network of the moment can be edited, on items it is not trained on; and which moment was the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from .._calling import Function, Inputs, check_batch
from ..editors import Editor
from ..errors import InvalidInput
from ..evaluation import Comparison, evaluate, predict
from ..locality import Locality
from .items import derived
from .samplers import Sampler

__all__ = ["Accurate", "Figures", "Frugal", "Validation"]


@final
@dataclass(frozen=True)
class Figures:
    """What one validation found.

    Attributes:
        step: after how many training steps.
        base_error: the unedited network's, in percent.
        success: the share of edits that hold, from 0 to 1; edits that held before any step are not counted.
        drawdown: the mean of err(edited) - err(base), in percentage points.
        drift: the mean KL(before || after) on the validation items, nats.
        steps: the mean number of updates an edit takes.
        generality: the share of altered copies answered as demanded; None where there are none.
        agreement: before any edit, the share of items answered as the original network does, from 0 to 1; None where
            `Validation.reference` is not given.
        base_drift: before any edit, the mean KL(original || now), nats; None like `agreement`.
    """

    step: int
    base_error: float
    success: float
    drawdown: float
    drift: float
    steps: float
    generality: float | None = None
    agreement: float | None = None
    base_drift: float | None = None


@final
@dataclass(frozen=True, eq=False)
class Validation:
    """A validation split and the edits tried on it; never give it the test set.

    Args:
        inputs: a batch of n items that are not trained on.
        labels: shape (n,), integers.
        sampler: of edits; draws the same ones at every validation, unless it asks the network.
        edits: how many.
        keep: what should stay, for editors that have a `keep_weight`.
        altered: makes altered copies, for `Figures.generality`, as `weightpatch.evaluate` takes it.
        seed: of the draw.
        reference: the original network's logits on these inputs, (n, classes), as `weightpatch.evaluation.predict`
            makes them: then the drift of the network itself, before any edit, is measured too.
    """

    inputs: Inputs
    labels: Tensor
    sampler: Sampler
    edits: int = 20
    keep: Locality | None = None
    altered: Callable[[Any], Any] | None = None
    seed: int = 0
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        n = check_batch(self.inputs, "Validation")
        if self.labels.shape != (n,) or self.edits < 1:
            raise InvalidInput(
                f"Validation was given {n} inputs, labels of shape {tuple(self.labels.shape)} and edits={self.edits}; "
                f"expected labels of shape ({n},) and at least 1 edit"
            )
        if self.reference is not None and (self.reference.ndim != 2 or len(self.reference) != n):
            given = tuple(self.reference.shape)
            raise InvalidInput(f"Validation was given a reference of shape {given}; expected logits ({n}, classes)")

    def measure(self, model: nn.Module, editor: Editor, names: Sequence[str], step: int = 0) -> Figures:
        """Try every edit on its own.

        Args:
            model: in any mode.
            editor: what makes the edits.
            names: the parameters that may move.
            step: noted in the figures.
        """
        with answering(model) as function:
            drawn = self.sampler.draw(self.edits, function, derived(self.seed, "validation"))
            since = (None, None) if self.reference is None else self._base_drift(function, self.reference)
        report = evaluate(
            model,
            [episode.constraint for episode in drawn],
            editor,
            test=(self.inputs, self.labels),
            parameters=tuple(names),
            keep=self.keep,
            altered=self.altered,
            progress=False,
        )
        found = report.summary
        means = [float("nan") if part is None else part.value for part in (found.drawdown, found.drift)]
        generality = None if found.generality is None else found.generality.value
        success, steps = found.success.value, found.steps.value
        return Figures(step, report.base_error, success, means[0], means[1], steps, generality, *since)

    def _base_drift(self, function: Function, reference: Tensor) -> tuple[float, float]:
        """Return the agreement and the KL of the network with the original, before any edit."""
        now = Comparison(reference.cpu(), predict(function, self.inputs), self.labels.cpu().long())
        return 1 - len(now.flipped) / now.n, now.kl


@final
@dataclass(frozen=True)
class Accurate:
    """The smallest base error: how plain training chooses."""

    def __call__(self, history: Sequence[Figures]) -> int:
        """Return the index of the best; the earliest of equals."""
        return min(range(len(history)), key=lambda i: history[i].base_error)


@final
@dataclass(frozen=True)
class Frugal:
    """The smallest base error + drawdown among those whose success is within a slack of the best success.

    Args:
        slack: how much less success is as good, from 0 to 1.
    """

    slack: float = 0.01

    def __call__(self, history: Sequence[Figures]) -> int:
        """Return the index of the best; the earliest of equals."""
        most = max(figures.success for figures in history)
        fit = [i for i, figures in enumerate(history) if figures.success >= most - self.slack - 1e-12]
        return min(fit, key=lambda i: _cost(history[i]))


def _cost(figures: Figures) -> float:
    total = figures.base_error + figures.drawdown
    return total if total == total else float("inf")


@contextmanager
def answering(model: nn.Module) -> Iterator[Function]:
    """Yield the network as samplers ask it: in evaluation mode and without gradients; its modes are put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, training in modes:
            module.training = training
