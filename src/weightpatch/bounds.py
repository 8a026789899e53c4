"""How sure a count is: exact bounds, intervals and tests, without scipy.

Counts of judged items are all that is known of the items that were not judged. Everything here is a pure function of
such counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, expm1, lgamma, log, log1p, sqrt
from statistics import NormalDist
from typing import final

from .errors import InvalidInput

__all__ = [
    "Estimate",
    "holm",
    "lower_bound",
    "mcnemar",
    "mean_difference",
    "paired_difference",
    "sign_test",
    "student_quantile",
    "student_tail",
    "upper_bound",
]

_HALVINGS = 60  # of an interval at most 1 wide: to the last bit of a float64
_TERMS = 100_000  # of a continued fraction, which takes about the root of its counts
_TINY = 1e-300


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


def upper_bound(changed: float, n: int, tries: int = 1, level: float = 0.95) -> float:
    """Return the largest share of all items that may change, given that `changed` of `n` judged items did.

    The one-sided upper bound of Clopper and Pearson (1934): the share p at which `changed` or fewer of n would be seen
    with probability ``α = (1 - level) / tries``. It is exact: the true share is above it in at most that share of
    cases. Items are taken for a random sample of those that matter.

    Args:
        changed: how many of the judged items changed; an expected count need not be whole.
        n: how many items were judged; of 0 items nothing is known, and the bound is 1.
        tries: how many candidates were judged on these items before one of them was chosen (Bonferroni's correction).
        level: the confidence; more gives a larger bound.

    Raises:
        InvalidInput: the counts are impossible.

    >>> round(upper_bound(0, 10), 4), round(upper_bound(0, 200), 4)
    (0.2589, 0.0149)
    """
    _check_share(changed, n, tries, level)
    if changed == n:
        return 1.0
    error = (1 - level) / tries
    if changed == 0:
        return -expm1(log(error) / n)
    return _edge(changed / n, 1.0, lambda p: _beta(n - changed, changed + 1, 1 - p) < error)


def lower_bound(changed: float, n: int, tries: int = 1, level: float = 0.95) -> float:
    """Return the smallest share of all items that may change; see `upper_bound`, whose mirror image it is.

    >>> round(lower_bound(47, 100), 2)
    0.38
    """
    _check_share(changed, n, tries, level)
    return 1 - upper_bound(n - changed, n, tries, level)


@lru_cache(maxsize=4096)
def paired_difference(broken: float, repaired: float, n: float, level: float = 0.95) -> Estimate:
    """Estimate the change of an error rate, (broken - repaired) / n, with Tango's score interval (Tango 1998).

    The interval holds the differences d that a score test does not reject: ``|b - c - nd| <= z √(n(2q + d(1 - d)))``,
    where q is the rate of repairs that is likeliest given d. It is paired (answers that agree do not widen it) and
    honest without a single flip, where the textbook interval has width 0. Counts that are expected of other items need
    not be whole.
    """
    _check_flips(broken, repaired, n)
    z, d = NormalDist().inv_cdf((1 + level) / 2), (broken - repaired) / n

    def rejected(guess: float) -> bool:
        return abs(broken - repaired - n * guess) > z * sqrt(_variance(broken, repaired, n, guess))

    return Estimate(d, _edge(d, -1.0, rejected), _edge(d, 1.0, rejected))


def sign_test(broken: int, repaired: int) -> float:
    """Return the exact one-sided p-value of "not worse than before": how likely so many broken items are by chance.

    ``P[X >= broken]`` with X binomial of broken + repaired throws of a fair coin; items that did not flip do not count.

    >>> f"{sign_test(17, 0):.2g}"
    '7.6e-06'
    """
    _check_flips(broken, repaired, max(broken + repaired, 1))
    return 1.0 if broken == 0 else _beta(broken, repaired + 1, 0.5)


def mcnemar(broken: int, repaired: int) -> float:
    """Return McNemar's exact two-sided p-value: how likely so uneven a split of the flips is for two equal models.

    ``min(1, 2 P[X <= min(b, c)])`` with X binomial of b + c throws of a fair coin; items wrong both times do not
    count.
    """
    return min(1.0, 2 * sign_test(max(broken, repaired), min(broken, repaired)))


def mean_difference(mean: float, deviation: float, n: int, level: float = 0.95) -> Estimate:
    """Estimate the mean of n paired differences with Student's t interval; a single one says nothing.

    Args:
        mean: of the differences.
        deviation: their standard deviation, with n - 1 in the denominator.
        n: how many.
        level: of the two-sided interval.
    """
    if n < 2:
        return Estimate(mean, -float("inf"), float("inf"))
    half = student_quantile((1 - level) / 2, n - 1) * deviation / sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def student_tail(t: float, freedom: int) -> float:
    """Return P[T > t] of Student's t with so many degrees of freedom."""
    if abs(t) < 1:  # where freedom / (freedom + t²) rounds to 1
        half = _beta(0.5, freedom / 2, t * t / (freedom + t * t)) / 2
        return 0.5 - half if t > 0 else 0.5 + half
    tail = _beta(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return tail if t > 0 else 1 - tail


@lru_cache(maxsize=64)
def student_quantile(tail: float, freedom: int) -> float:
    """Return the t above which a share `tail`, at most a half, of Student's distribution lies."""
    high = 1.0
    while student_tail(high, freedom) > tail:
        high *= 2
    return high * _edge(0.0, 1.0, lambda share: student_tail(high * share, freedom) < tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values: reject where one is at most α, and a true hypothesis is rejected at all in a share α.

    The i-th smallest of m becomes the largest so far of ``(m - i + 1) p`` (Holm 1979); the order stays as it was.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    found, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = largest
    return found


@lru_cache(maxsize=4096)
def _beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), of which binomials and Student's t are made."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on this side of the mean
        return 1 - _beta(b, a, 1 - x)
    front = a * log(x) + b * log1p(-x) + lgamma(a + b) - lgamma(a) - lgamma(b)
    return exp(front) * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction of I_x(a, b) by Lentz's method (Press et al., Numerical Recipes, 6.4)."""
    c, d = 1.0, 1 / _off_zero(1 - (a + b) * x / (a + 1))
    found = d
    for m in range(1, _TERMS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / _off_zero(1 + term * d), _off_zero(1 + term / c)
            found *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return found


def _off_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _variance(broken: float, repaired: float, n: float, d: float) -> float:
    """Return n(2q + d(1 - d)), the variance of b - c where the true difference is d."""
    linear = (2 * n - broken + repaired) * d - broken - repaired
    root = sqrt(max(0.0, linear * linear + 8 * n * repaired * d * (1 - d)))
    return max(0.0, n * ((root - linear) / (2 * n) + d * (1 - d)))


def _edge(inside: float, outside: float, rejected: Callable[[float], bool]) -> float:
    """Return where, between a value that is not rejected and another one, the rejected ones begin."""
    if not rejected(outside):
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside


def _check_flips(broken: float, repaired: float, n: float) -> None:
    if broken < 0 or repaired < 0 or broken + repaired > n or n < 1:
        raise InvalidInput(
            f"a paired comparison was given {broken} broken and {repaired} repaired of {n}; expected counts of at "
            "least 0 that add up to at most n, and n at least 1"
        )


def _check_share(changed: float, n: int, tries: int, level: float) -> None:
    if not 0 <= changed <= n or tries < 1 or not 0 < level < 1:
        raise InvalidInput(
            f"a bound was asked for {changed} changed of {n} items, tries={tries}, level={level}; expected "
            "0 <= changed <= n, at least 1 try and a level between 0 and 1, such as 0.95"
        )
