"""Verdicts from errors in numbers, such as the RMSE of a regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from ..bounds import Estimate, mean_difference, student_tail
from ..errors import ShapeMismatch
from ._answers import Changed, change_finding, tolerated
from ._findings import Finding, Measured, group_findings, joined, overall
from ._value import Level, Limits, Verdict

__all__ = ["Losses", "judge_losses", "worse"]

Losses: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float64]]"
Figure: TypeAlias = Callable[[float], float]

_LIMITS = Limits()


def judge_losses(
    before: ArrayLike,
    after: ArrayLike,
    slices: Mapping[str, ArrayLike] | None = None,
    *,
    outputs: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    changed: Changed | None = None,
    figure: Figure = sqrt,
    name: str = "RMSE",
    unit: str = "",
    limits: Limits = _LIMITS,
) -> Verdict:
    """Judge two models by the loss of each item, paired.

    With mean losses b̄ before and ā after, the growth is ``figure(ā) / figure(b̄) - 1``. Its interval is that of the
    ratio of means, ``R ± t s(a - R b) / (b̄ √n)`` (Cochran 1977, 6.4); a slice is worse where the paired t test says
    so after Holm's correction. Both take means for normal: a few items with most of the loss need more items.

    Args:
        before: the first model's losses, (n,), such as squared errors; items where they are not finite do not count.
        after: the second model's, (n,).
        slices: which items belong to each slice, by its name, bool, (n,).
        outputs: the losses of each of several outputs before and after, twice (n,), by its name; they are judged as
            slices are.
        changed: how many answers changed, and of how many, where that was counted.
        figure: the figure that is told, of a mean loss; increasing, such as a likelihood's `figure`.
        name: what the figure is called.
        unit: its unit.
        limits: what the edit may cost; `growth`, `worst_growth` and `changed` are used.

    Raises:
        ShapeMismatch: losses or slices are not as long as each other.

    >>> judge_losses([1.0, 2.0] * 500, [4.0, 8.1] * 500).level
    Level.red
    """
    b, a = (np.asarray(losses, dtype=np.float64) for losses in (before, after))
    masks = {key: np.asarray(mask, dtype=bool) for key, mask in (slices or {}).items()}
    _check(b, a, masks)
    counts = np.isfinite(b)
    figures = _Figures(figure, name, unit)
    untested = [] if masks else ["No column was given: no slice of the items could be tested."]
    untested += [] if changed is not None else ["Changed answers were not counted."]
    if not counts.any():
        reason = f"Side effects were not measured: no item has a finite loss before, so that there is no {name}."
        return joined([Finding(Level.amber, reason, "Give items with targets.")], untested)
    lost = int((~np.isfinite(a[counts])).sum())
    if lost:
        reason = f"{lost:,} of {int(counts.sum()):,} items have no finite loss any more, so that there is no {name}."
        return joined([Finding(Level.red, reason)], untested)
    findings = [overall(figures.measured("all items", b[counts], a[counts], limits.growth, limits.growth), limits)]
    parts = [(key, mask & counts) for key, mask in masks.items() if (mask & counts).any()]
    sides = [(key, b[mask], a[mask]) for key, mask in parts] + _finite(outputs or {})
    groups = [figures.measured(*side, limits.worst_growth, limits.growth) for side in sides]
    findings += group_findings(groups, limits)
    if changed is not None:
        findings.append(tolerated(change_finding(changed, limits), limits))
    return joined(findings, untested)


@dataclass(frozen=True)
class _Figures:
    """How mean losses are told."""

    figure: Figure
    name: str
    unit: str

    def measured(self, name: str, before: Losses, after: Losses, limit: float, matters: float) -> Measured:
        """Return what is judged by a limit of growth; losses are finite, at least one."""
        p, unit = worse(before, after), f" {self.unit}" if self.unit else ""
        first, second = self.figure(float(before.mean())), self.figure(float(after.mean()))

        def growth(level: float, times: float) -> Estimate:
            return _growth(before, after, self.figure, p, level, times).scaled(100)

        def told(level: float) -> str:
            moved, items = growth(level, 1), f"({100 * level:.4g} % interval, {len(before):,} items)"
            if first == 0:
                return f"{self.name} moved from 0 to {second:.4g}{unit} {items}"
            grew = f"{moved.value:+.2f} % [{moved.low:+.2f}, {moved.high:+.2f}]"
            return f"{self.name} grew by {grew}, from {first:.4g} to {second:.4g}{unit} {items}"

        least = 1.0 if bool((before == after).all()) else 0.5 ** len(before)
        doubled = second > 0 and second >= 2 * first
        return Measured(name, len(before), p, least, doubled, growth, told, 100 * limit, 100 * matters, "%")


def _growth(before: Losses, after: Losses, figure: Figure, p: float, level: float, times: float) -> Estimate:
    """Estimate the growth of a figure of the mean, had there been so many times as many items."""
    base, now = float(before.mean()), float(after.mean())
    if figure(base) == 0:
        return Estimate(inf, inf if p <= 1 - level else 0.0, inf) if figure(now) > 0 else Estimate(0.0, 0.0, 0.0)
    residuals = after - now / base * before
    deviation = float(residuals.std(ddof=1)) / sqrt(times) if len(residuals) > 1 else 0.0
    mean = mean_difference(now, deviation, len(residuals), level)
    low, value, high = (figure(max(0.0, edge)) / figure(base) - 1 for edge in (mean.low, mean.value, mean.high))
    return Estimate(value, low, high)


def worse(before: Losses, after: Losses) -> float:
    """Return the one-sided p-value of "the mean loss did not grow": of the paired t test, and at least that of signs.

    A t test of a few losses that grew alike is surer than so few can be.
    """
    difference = after - before
    n, mean = len(difference), float(difference.mean())
    deviation = float(difference.std(ddof=1)) if n > 1 else 0.0
    t = mean / deviation * sqrt(n) if deviation else inf if mean > 0 else -inf
    return max(student_tail(t, n - 1) if n > 1 and t > -inf else float(mean <= 0), 0.5**n)


def _finite(outputs: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> list[tuple[str, Losses, Losses]]:
    """Return the losses of each output on the items where it has some."""
    found = []
    for name, given in outputs.items():
        before, after = (np.asarray(losses, dtype=np.float64) for losses in given)
        _check(before, after, {})
        counts = np.isfinite(before) & np.isfinite(after)
        if counts.any():
            found.append((name, before[counts], after[counts]))
    return found


def _check(before: Losses, after: Losses, masks: Mapping[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]) -> None:
    wrong = {name: mask.shape for name, mask in masks.items() if mask.shape != before.shape}
    if before.ndim != 1 or after.shape != before.shape or wrong:
        slices = f", and slices of shapes {wrong}" if wrong else ""
        raise ShapeMismatch(
            f"judge_losses was given losses of shapes {before.shape} before and {after.shape} after{slices}; expected "
            "one number an item, (n,), everywhere"
        )
