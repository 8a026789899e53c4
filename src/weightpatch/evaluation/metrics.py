"""Pure functions on predictions: what changed, and how sure a mean or a share is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import final

import numpy as np
from torch import Tensor

from ..errors import InvalidInput, ShapeMismatch

__all__ = ["Estimate", "Flips", "bootstrap_mean", "flips", "wilson"]

_DRAWS = 2000
_CHUNK = 4_000_000  # indices drawn at once: 32 MB


@final
@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval, in the value's own units."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Estimate:
        """Return the same estimate in other units: everything times a positive `factor`."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@final
@dataclass(frozen=True)
class Flips:
    """How many answers changed: right to wrong, wrong to right, and wrong to another wrong one."""

    broken: int
    repaired: int
    other: int

    @property
    def total(self) -> int:
        """Count all answers that changed."""
        return self.broken + self.repaired + self.other


def flips(before: Tensor, after: Tensor, labels: Tensor) -> Flips:
    """Count the answers that changed between two vectors of classes, each of shape (n,), judged by the labels (n,)."""
    if not before.shape == after.shape == labels.shape:
        raise ShapeMismatch(
            f"flips was given classes of shapes {tuple(before.shape)} and {tuple(after.shape)} and labels of shape "
            f"{tuple(labels.shape)}; expected three equal shapes (n,)"
        )
    changed = before != after
    broken = int((changed & (before == labels)).sum())
    repaired = int((changed & (after == labels)).sum())
    return Flips(broken, repaired, int(changed.sum()) - broken - repaired)


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """Estimate a share from `successes` of `n` trials, with Wilson's score interval (Wilson 1927).

    With z the two-sided normal quantile: ``(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)``. Unlike the textbook
    interval it stays within [0, 1] and is honest at shares of 0 and 1. No trial at all gives (NaN, 0, 1).
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise InvalidInput(f"wilson was given {successes} successes of {n}; expected 0 <= successes <= n")
    if n == 0:
        return Estimate(float("nan"), 0.0, 1.0)
    z, p = NormalDist().inv_cdf((1 + level) / 2), successes / n
    middle, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (middle - half) / scale
    high = 1.0 if successes == n else (middle + half) / scale
    return Estimate(p, low, high)


def bootstrap_mean(values: Sequence[float], level: float = 0.95, seed: int = 0) -> Estimate:
    """Estimate a mean with the percentile bootstrap interval of 2,000 seeded draws (Efron 1979).

    The same values and seed give the same interval on every machine. No value at all gives NaN three times.
    """
    _check_level(level)
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    means = _resampled_means(data, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(data.mean()), float(low), float(high))


def _resampled_means(data: np.ndarray[tuple[int], np.dtype[np.float64]], random: np.random.Generator) -> list[float]:
    means: list[float] = []
    rows = max(1, _CHUNK // data.size)
    while len(means) < _DRAWS:
        index = random.integers(0, data.size, (min(rows, _DRAWS - len(means)), data.size))
        means.extend(data[index].mean(1).tolist())
    return means


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InvalidInput(f"the confidence level was {level}; expected a share between 0 and 1, such as 0.95")
