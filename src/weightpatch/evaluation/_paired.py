"""Statistics of two models that answer the same n questions: an interval for the difference, and an exact test."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, lgamma, log, sqrt
from statistics import NormalDist

from ..errors import InvalidInput
from .metrics import Estimate

__all__ = ["mcnemar", "paired_difference"]

_HALVINGS = 60  # of an interval at most 1 wide: to the last bit of a float64


def paired_difference(broken: int, repaired: int, n: int, level: float = 0.95) -> Estimate:
    """Estimate the change of an error rate, (broken - repaired) / n, with Tango's score interval (Tango 1998).

    The interval holds the differences d that a score test does not reject: ``|b - c - nd| <= z √(n(2q + d(1 - d)))``,
    where q is the rate of repairs that is likeliest given d. It is paired (answers that agree do not widen it) and
    honest without a single flip, where the textbook interval has width 0.
    """
    _check(broken, repaired, n)
    z, d = NormalDist().inv_cdf((1 + level) / 2), (broken - repaired) / n

    def rejected(guess: float) -> bool:
        return abs(broken - repaired - n * guess) > z * sqrt(_variance(broken, repaired, n, guess))

    return Estimate(d, _edge(d, -1.0, rejected), _edge(d, 1.0, rejected))


def mcnemar(broken: int, repaired: int) -> float:
    """Return McNemar's exact two-sided p-value: how likely so uneven a split of the flips is for two equal models.

    ``min(1, 2 P[X <= min(b, c)])`` with X binomial of b + c throws of a fair coin; items wrong both times do not
    count.
    """
    _check(broken, repaired, max(broken + repaired, 1))
    flips = broken + repaired
    choices = lgamma(flips + 1)
    tail = (
        exp(choices - lgamma(k + 1) - lgamma(flips - k + 1) - flips * log(2)) for k in range(min(broken, repaired) + 1)
    )
    return min(1.0, 2 * sum(tail))


def _variance(broken: int, repaired: int, n: int, d: float) -> float:
    """Return n(2q + d(1 - d)), the variance of b - c where the true difference is d."""
    linear = (2 * n - broken + repaired) * d - broken - repaired
    root = sqrt(max(0.0, linear * linear + 8 * n * repaired * d * (1 - d)))
    return max(0.0, n * ((root - linear) / (2 * n) + d * (1 - d)))


def _edge(inside: float, outside: float, rejected: Callable[[float], bool]) -> float:
    if not rejected(outside):
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside


def _check(broken: int, repaired: int, n: int) -> None:
    if broken < 0 or repaired < 0 or broken + repaired > n or n < 1:
        raise InvalidInput(
            f"a paired comparison was given {broken} broken and {repaired} repaired of {n}; expected counts of at "
            "least 0 that add up to at most n, and n at least 1"
        )
