"""Labelled items with several answers each: tokens, pixels, tags."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np
from numpy.typing import ArrayLike

from ..bounds import Estimate, mean_difference
from ..errors import InvalidInput
from ._answers import interval, points
from ._findings import Measured
from ._numbers import Losses, worse

__all__ = ["Several"]


@final
@dataclass(frozen=True, eq=False)
class Several:
    """Two models' answers to the same labelled items, of which each has several; see `Paired` for one answer an item.

    The answers of one item depend on each other, so intervals and tests are those of items: of a ratio of means
    (Cochran 1977, 6.4), and Student's paired t.

    Args:
        name: of the items, or of the part of their answers that is meant, such as "class 3".
        before: how many answers of each item the first model has wrong, (n,); shares of an answer count as such.
        after: the same of the second model.
        answers: how many answers each item has, (n,); items without one do not count.
        changed: how many items changed at any answer.
    """

    name: str
    before: ArrayLike
    after: ArrayLike
    answers: ArrayLike
    changed: int

    def __post_init__(self) -> None:
        sides = [np.asarray(side, dtype=np.float64) for side in (self.before, self.after, self.answers)]
        if sides[0].ndim != 1 or len({side.shape for side in sides}) > 1 or not (sides[2] > 0).any():
            raise InvalidInput(
                f"Several {self.name!r} was given arrays of shapes {[side.shape for side in sides]}; expected three of "
                "one shape (n,), and an item with an answer"
            )
        counts = sides[2] > 0
        for name, side in zip(("before", "after", "answers"), sides, strict=True):
            object.__setattr__(self, name, side[counts])

    @property
    def what(self) -> str:
        """What is said to have changed: items, at any of their answers."""
        return "items"

    @property
    def n(self) -> int:
        """How many items."""
        return len(self._sides[0])

    def loss(self, level: float, times: float = 1) -> Estimate:
        """Return by how many percentage points the error rose, had there been so many times as many items."""
        before, after, answers = self._sides
        rise = float((after - before).sum() / answers.sum())
        residuals = after - before - rise * answers
        deviation = float(residuals.std(ddof=1)) if self.n > 1 else 0.0
        return mean_difference(rise, deviation / float(answers.mean()) / sqrt(times), self.n, level).scaled(100)

    def measured(self, limit: float, matters: float) -> Measured:
        """Return what is judged by limits in percentage points."""
        before, after, answers = self._sides
        total = int(answers.sum())
        many = f" with {total:,} answers" if total > self.n else ""
        least = 0.5 ** int((before != after).sum())

        def told(level: float) -> str:
            return (
                f"the error moved by {interval(self.loss(level), 'points')} ({100 * level:.4g} % interval, "
                f"{self.n:,} items{many})"
            )

        return Measured(
            name=self.name,
            n=self.n,
            p=max(least, worse(before, after)),
            least=least,
            doubled=bool(after.sum() > 0 and after.sum() >= 2 * before.sum()),
            loss=self.loss,
            told=told,
            limit=limit,
            matters=matters,
            unit=points(limit),
        )

    @property
    def _sides(self) -> tuple[Losses, Losses, Losses]:
        before, after, answers = (
            np.asarray(side, dtype=np.float64) for side in (self.before, self.after, self.answers)
        )
        return before, after, answers
