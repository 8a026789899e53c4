"""Two models on one test set: what else changed, item by item."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from .._calling import Function, Inputs, length, outputs, rows
from ..errors import InvalidInput, ShapeMismatch
from ..likelihoods import Categorical, Of
from ..network import structural_clone
from ._paired import mcnemar, paired_difference
from .metrics import Estimate, Flips, flips

__all__ = ["ClassChange", "Comparison", "TestSet", "check_labels", "compare", "predict"]

TestSet: TypeAlias = "tuple[Inputs, Tensor]"

_LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@final
@dataclass(frozen=True)
class ClassChange:
    """What changed for the items of one class; errors are in percent, NaN for a class without items."""

    label: int
    n: int
    error_before: float
    error_after: float
    flips: Flips


@final
@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """The answers of two models to one labelled test set, and every way in which they differ.

    The answer is the class of the largest logit. An item with a NaN among its logits has no answer (class -1), counts
    as wrong, and gives every class probability 0.

    Attributes:
        before: the first model's logits, (n, classes), on the CPU.
        after: the second model's, the same shape.
        labels: the right classes, (n,), int64.
    """

    before: Tensor
    after: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.before.shape)
        if self.before.ndim != 2 or not shape[0] or shape[1] < 2 or self.after.shape != shape:
            raise ShapeMismatch(
                f"a comparison was given logits of shapes {shape} and {tuple(self.after.shape)}; expected two equal "
                "shapes (n, classes) with at least 1 item and 2 classes"
            )
        check_labels(self.labels, shape[0], shape[1])

    @property
    def n(self) -> int:
        """Count the items of the test set."""
        return len(self.labels)

    @cached_property
    def answers_before(self) -> Tensor:
        """The first model's classes, (n,)."""
        return _answers(self.before)

    @cached_property
    def answers_after(self) -> Tensor:
        """The second model's classes, (n,)."""
        return _answers(self.after)

    @cached_property
    def probabilities_before(self) -> Tensor:
        """The first model's probabilities, (n, classes)."""
        return self.before.softmax(1).nan_to_num(0.0)

    @cached_property
    def probabilities_after(self) -> Tensor:
        """The second model's probabilities, (n, classes)."""
        return self.after.softmax(1).nan_to_num(0.0)

    @property
    def error_before(self) -> float:
        """The first model's error, in percent."""
        return 100 * float((self.answers_before != self.labels).double().mean())

    @property
    def error_after(self) -> float:
        """The second model's error, in percent."""
        return 100 * float((self.answers_after != self.labels).double().mean())

    @cached_property
    def flips(self) -> Flips:
        """How many answers changed."""
        return flips(self.answers_before, self.answers_after, self.labels)

    @cached_property
    def drawdown(self) -> Estimate:
        """The error after minus the error before, in percentage points, with a paired 95 % interval (Tango 1998)."""
        return paired_difference(self.flips.broken, self.flips.repaired, self.n).scaled(100)

    @cached_property
    def p_value(self) -> float:
        """McNemar's exact p-value of the hypothesis that the two models are equally often right."""
        return mcnemar(self.flips.broken, self.flips.repaired)

    @cached_property
    def broken(self) -> Tensor:
        """Which items went from right to wrong, worst first (see `harm`), (m,)."""
        return self._by_harm(self._changed & (self.answers_before == self.labels))

    @cached_property
    def repaired(self) -> Tensor:
        """Which items went from wrong to right, worst first, (m,)."""
        return self._by_harm(self._changed & (self.answers_after == self.labels))

    @cached_property
    def other(self) -> Tensor:
        """Which items went from wrong to another wrong answer, worst first, (m,)."""
        wrong = (self.answers_before != self.labels) & (self.answers_after != self.labels)
        return self._by_harm(self._changed & wrong)

    @property
    def flipped(self) -> Tensor:
        """Which items changed their answer: broken, then other, then repaired, each worst first, (m,)."""
        return torch.cat([self.broken, self.other, self.repaired])

    @cached_property
    def harm(self) -> Tensor:
        """The probability that the right class lost, (n,); negative where it gained."""
        label = self.labels[:, None]
        return (self.probabilities_before.gather(1, label) - self.probabilities_after.gather(1, label)).squeeze(1)

    @cached_property
    def shift(self) -> Tensor:
        """How the probability of the first model's answer changed, (n,); 0 where it had none."""
        answer = self.answers_before.clamp_min(0)[:, None]
        change = (self.probabilities_after.gather(1, answer) - self.probabilities_before.gather(1, answer)).squeeze(1)
        return change.masked_fill(self.answers_before < 0, 0.0)

    @cached_property
    def kl(self) -> float:
        """The mean of KL(before || after), in nats; NaN where a model has no answer."""
        return float(Categorical(-1, Of.logits).divergence(self.before.double(), self.after.double()).mean())

    @cached_property
    def per_class(self) -> tuple[ClassChange, ...]:
        """What changed for each right class, in the order of the classes."""
        return tuple(self._of_class(label) for label in range(self.before.shape[1]))

    def to_json(self) -> dict[str, Any]:
        """Return every number as plain values; what is not finite becomes None."""
        shifts = np.quantile(self.shift.double().numpy(), _LEVELS).tolist()
        return {
            "n": self.n,
            "error_before": self.error_before,
            "error_after": self.error_after,
            "drawdown": asdict(self.drawdown),
            "p_value": self.p_value,
            "flips": asdict(self.flips),
            "broken": self.broken.tolist(),
            "repaired": self.repaired.tolist(),
            "other": self.other.tolist(),
            "kl": self.kl if abs(self.kl) < float("inf") else None,
            "shift": {
                "mean": float(self.shift.double().mean()),
                "quantiles": dict(zip(map(str, _LEVELS), shifts, strict=True)),
            },
            "per_class": [
                {
                    "class": row.label,
                    "n": row.n,
                    "error_before": row.error_before if row.n else None,
                    "error_after": row.error_after if row.n else None,
                    **asdict(row.flips),
                }
                for row in self.per_class
            ],
        }

    def __repr__(self) -> str:
        d, f = self.drawdown, self.flips
        return (
            f"Comparison(n={self.n}, error {self.error_before:.2f} -> {self.error_after:.2f} %, "
            f"drawdown {d.value:+.3f} points [{d.low:+.3f}, {d.high:+.3f}], "
            f"{f.broken} broken, {f.repaired} repaired, {f.other} other, p={self.p_value:.2g})"
        )

    @cached_property
    def _changed(self) -> Tensor:
        return self.answers_before != self.answers_after

    def _by_harm(self, chosen: Tensor) -> Tensor:
        index = chosen.nonzero().squeeze(1)
        return index[self.harm[index].argsort(descending=True, stable=True)]

    def _of_class(self, label: int) -> ClassChange:
        mine = self.labels == label
        before, after = self.answers_before[mine], self.answers_after[mine]
        n = len(before)
        wrong, still = (100 * float((x != label).double().mean()) if n else float("nan") for x in (before, after))
        return ClassChange(label, n, wrong, still, flips(before, after, self.labels[mine]))


def compare(
    before: nn.Module | Function, after: nn.Module | Function, test: TestSet, *, batch_size: int = 128
) -> Comparison:
    """Run two models, or functions, on one labelled test set and say everything that differs.

    A module runs in evaluation mode as a structural clone: its own mode, hooks and buffers are left as they are. A
    function is called as it is.

    Args:
        before: the first model.
        after: the second one; of any architecture that answers with the same classes.
        test: the inputs, as the models take them, and the right classes, (n,), integers.
        batch_size: how many items each call gets.
    """
    inputs, labels = test
    check_labels(labels, length(inputs))
    logits = [predict(_runnable(model), inputs, batch_size) for model in (before, after)]
    return Comparison(logits[0], logits[1], labels.detach().cpu().long())


def predict(function: Function, inputs: Inputs, batch_size: int = 128) -> Tensor:
    """Return the logits for all inputs, in batches and without gradients, (n, ...), on the CPU."""
    if batch_size < 1:
        raise InvalidInput(f"batch_size was {batch_size}; expected at least 1")
    n = length(inputs)
    if not n:
        raise InvalidInput("the test set is empty; expected at least one item on dimension 0 of its inputs")
    with torch.no_grad():
        parts = [outputs(function, rows(inputs, slice(i, i + batch_size))).cpu() for i in range(0, n, batch_size)]
    return torch.cat(parts)


def check_labels(labels: Tensor, n: int, classes: int | None = None) -> None:
    """Refuse labels that are not `n` integers, or not indices into `classes` classes."""
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.dtype == torch.bool
        or labels.shape != (n,)
    ):
        given = f"{str(labels.dtype)[6:]}{tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ShapeMismatch(f"the labels of the test set are {given}; expected integers of shape ({n},), one an input")
    if classes is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InvalidInput(
            f"the labels of the test set go from {int(labels.min())} to {int(labels.max())}; the models answer with "
            f"{classes} classes, so expected 0 to {classes - 1}"
        )


def _runnable(model: nn.Module | Function) -> Function:
    return structural_clone(model).eval() if isinstance(model, nn.Module) else model


def _answers(logits: Tensor) -> Tensor:
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)
