"""What one test finds, and how the findings of many make a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from ..bounds import Estimate, holm
from ._value import Level, Limits, Verdict

__all__ = ["Finding", "Measured", "group_findings", "joined", "more", "overall"]

_MOST = 10_000_000  # items; more will not be judged to settle a verdict
_TOLD = 5  # groups of one level; the others are counted


@dataclass(frozen=True)
class Finding:
    """One test's outcome: a sentence, and where it is amber another one on what would settle it.

    `few` marks one that is amber only because too few items were judged.
    """

    level: Level
    reason: str
    settle: str = ""
    few: bool = False


@dataclass(frozen=True)
class Measured:
    """A loss that was measured on all items, or on one class or slice.

    Attributes:
        name: of the items.
        n: how many.
        p: the one-sided p-value of "not worse than before".
        least: the smallest p-value that could have come out, given how many items flipped.
        doubled: whether the error at least doubled.
        loss: the loss and its interval at a level, had there been so many times as many items of the same kind.
        told: the loss in words.
        limit: the largest loss within the limits, in the loss's unit.
        matters: of a class or slice: from this loss on it matters that it is certain.
        unit: of the limit.
    """

    name: str
    n: int
    p: float
    least: float
    doubled: bool
    loss: Callable[[float, float], Estimate]
    told: Callable[[float], str]
    limit: float
    matters: float
    unit: str

    @property
    def shown(self) -> str:
        """The limit in words."""
        return f"the limit of {self.limit:g} {self.unit}"


def joined(findings: Sequence[Finding], untested: Sequence[str] = ()) -> Verdict:
    """Return the verdict of several findings: the worst level, the worst reasons first."""
    ordered = sorted(findings, key=lambda finding: finding.level, reverse=True)
    level = ordered[0].level
    settle = [finding.settle for finding in ordered if finding.settle and level is Level.amber]
    few = level is Level.amber and all(finding.few for finding in ordered if finding.level is level)
    return Verdict(level, tuple(finding.reason for finding in ordered), tuple(untested), tuple(settle), few)


def overall(measured: Measured, limits: Limits) -> Finding:
    """Judge a loss of all items by its interval."""
    loss, told = measured.loss(limits.level, 1), f"Over {measured.name}, {measured.told(limits.level)}; "
    worse = measured.p <= 1 - limits.level
    if worse and loss.low > measured.limit:
        return Finding(Level.red, f"{told}that is more than {measured.shown}.")
    if worse and measured.doubled:
        return Finding(Level.red, f"{told}the error at least doubled (p = {measured.p:.2g}).")
    if measured.n < limits.judged:
        reason = f"{told}fewer than {limits.judged:,} items were judged."
        return Finding(Level.amber, reason, _advice(measured, limits), few=loss.value <= measured.limit)
    if loss.high <= measured.limit:
        return Finding(Level.green, f"{told}that is at most {measured.shown}.")
    return Finding(Level.amber, f"{told}that may be more than {measured.shown}.", _advice(measured, limits))


def group_findings(groups: Sequence[Measured], limits: Limits) -> list[Finding]:
    """Judge classes and slices, corrected for how many there are (Holm 1979; intervals by Bonferroni).

    Only groups in which enough items flipped for a test to reject at all are counted (Tarone 1990).
    """
    if not groups:
        return []
    error = 1 - limits.level
    tested = [group for group in groups if group.least <= error]
    adjusted = dict(zip(map(id, tested), holm([group.p for group in tested]), strict=True))
    count = max(1, len(tested))
    ordered = sorted(groups, key=lambda group: adjusted.get(id(group), 1.0))
    found = [_group(group, adjusted.get(id(group), 1.0), count, limits) for group in ordered]
    told = [finding for finding in found if finding is not None]
    return _shortened(told) if told else [_none_worse(groups, limits)]


def more(n: int, least: int, settled: Callable[[int], bool]) -> int | None:
    """Return about how many items more than n settle something, two digits; None where no feasible number does."""
    total = max(n, least, 1)
    low = n
    while not settled(total):
        low, total = total, 2 * total
        if total > _MOST:
            return None
    while total - low > max(1, total // 100):
        middle = (low + total) // 2
        low, total = (low, middle) if middle >= least and settled(middle) else (middle, total)
    return _rounded(max(1, total - n))


def _group(group: Measured, p: float, count: int, limits: Limits) -> Finding | None:
    """Return what is amiss with a class or slice, of which so many are tested; None where nothing seems to be."""
    error, level = 1 - limits.level, 1 - (1 - limits.level) / count
    loss, look = group.loss(level, 1), f"Look at the items of {group.name} that became worse."
    corrected = "" if count == 1 else f" after Holm's correction for {count} groups"
    tested = f"p = {p:.2g}{corrected}" if group.least <= error else "too few changed for a test"

    def found(colour: Level, says: str, settle: str = "") -> Finding:
        return Finding(colour, f"In {group.name}, {group.told(level)}, {tested}; {says}.", settle)

    if p <= error and group.doubled:
        return found(Level.red, "its error at least doubled")
    if p <= error and loss.low > group.limit:
        return found(Level.red, f"that is more than {group.shown}")
    if p <= error and loss.high > group.matters:
        return found(Level.amber, "it is certainly worse than before", look)
    if loss.value > group.limit or (group.p <= error and loss.high > group.limit):
        wanted = more(group.n, 0, lambda n: _clear(group.loss(level, n / group.n), group.limit))
        settle = look if wanted is None else f"Judge about {wanted:,} more items of {group.name}."
        return found(Level.amber, f"that may be more than {group.shown}", settle)
    return None


def _none_worse(groups: Sequence[Measured], limits: Limits) -> Finding:
    worst = max(groups, key=lambda group: group.loss(limits.level, 1).value)
    least = min(groups, key=lambda group: group.n)
    return Finding(
        Level.green,
        f"No class or slice of {len(groups):,} is known to be worse than the limits allow. The worst is {worst.name}: "
        f"{worst.told(limits.level)}. The smallest is {least.name}, with {least.n:,} items.",
    )


def _shortened(found: list[Finding]) -> list[Finding]:
    """Return the first few findings of each level, and how many more there are of it."""
    kept = []
    for level in (Level.red, Level.amber):
        some = [finding for finding in found if finding.level is level]
        kept += some[:_TOLD]
        if len(some) > _TOLD:
            kept.append(Finding(level, f"So it is in {len(some) - _TOLD:,} more classes and slices ({level.name})."))
    return kept


def _advice(measured: Measured, limits: Limits) -> str:
    def settled(n: int) -> bool:
        return _clear(measured.loss(limits.level, n / measured.n), measured.limit)

    wanted = more(measured.n, limits.judged, settled)
    if wanted is None:
        return f"The loss is too near {measured.shown} for more items to settle it; state another limit."
    return f"Judge about {wanted:,} more items, if they are like those that were judged."


def _clear(loss: Estimate, limit: float) -> bool:
    return loss.high <= limit or loss.low > limit


def _rounded(count: int) -> int:
    """Round up to two digits."""
    unit: int = 10 ** max(0, floor(log10(count)) - 1)
    return ceil(count / unit) * unit
