"""Pure functions on predictions: what changed, and how sure a mean or a share is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import final

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from ..bounds import Estimate
from ..errors import InvalidInput, ShapeMismatch

__all__ = ["Estimate", "Flips", "bootstrap_mean", "flips", "paired_bootstrap", "wilson"]

_DRAWS = 2000
_PAIRED_DRAWS = 1000
_CHUNK = 4_000_000  # indices drawn at once: 32 MB


@final
@dataclass(frozen=True)
class Flips:
    """How many answers changed: for the worse, for the better, and neither.

    With classes these go from right to wrong, from wrong to right, and from wrong to another wrong one. Answers of
    several positions or tags are worse where more of them are wrong; numbers, where they moved by more than a tolerance
    and are further off.
    """

    broken: int
    repaired: int
    other: int

    @property
    def total(self) -> int:
        """Count all answers that changed."""
        return self.broken + self.repaired + self.other


def flips(changed: Tensor, before: Tensor, after: Tensor) -> Flips:
    """Count the answers that changed, bool, by their losses before and after; three tensors of one shape."""
    if not changed.shape == before.shape == after.shape:
        raise ShapeMismatch(
            f"flips was given {tuple(changed.shape)} answers and losses of shapes {tuple(before.shape)} and "
            f"{tuple(after.shape)}; expected three equal shapes"
        )
    broken, repaired = int((changed & (after > before)).sum()), int((changed & (after < before)).sum())
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


def paired_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    figure: Callable[[Sequence[float]], float],
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Estimate figure(after) - figure(before) by the percentile interval of 1,000 seeded draws of items (Koehn 2004).

    A draw takes n of the n items, with replacement, and the same ones on both sides. Where nothing changed the
    interval has no width, and the share of items that may change says more (`weightpatch.bounds.upper_bound`).

    Args:
        before: what the figure needs to know of each item, (n, k), such as counts.
        after: the same of the other side, (n, k).
        figure: of the sums over items, k numbers.
        level: of the interval.
        seed: the same one gives the same interval on every machine.

    Raises:
        ShapeMismatch: the two sides do not belong together.
    """
    _check_level(level)
    sides = [np.asarray(side, dtype=np.float64) for side in (before, after)]
    if sides[0].ndim != 2 or sides[0].shape != sides[1].shape or not len(sides[0]):
        raise ShapeMismatch(
            f"a paired bootstrap was given statistics of shapes {sides[0].shape} and {sides[1].shape}; expected two "
            "equal shapes (n, k) of at least one item"
        )
    whole = [side.sum(0).tolist() for side in sides]
    random, n = np.random.default_rng(seed), len(sides[0])
    found = []
    for _ in range(_PAIRED_DRAWS):
        times = np.bincount(random.integers(0, n, n), minlength=n)
        first, second = ((times @ side).tolist() for side in sides)
        found.append(figure(second) - figure(first))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(figure(whole[1]) - figure(whole[0]), float(low), float(high))


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
