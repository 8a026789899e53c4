"""Verdicts from counts of answers: how many changed, and which of them to the worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Protocol, final

from ..bounds import Estimate, lower_bound, paired_difference, sign_test, upper_bound
from ..errors import InvalidInput
from ._findings import Finding, Measured, group_findings, joined, more, overall
from ._value import Level, Limits, Verdict

__all__ = [
    "Changed",
    "Counted",
    "Paired",
    "change_finding",
    "interval",
    "judge_answers",
    "judge_edit",
    "judge_score",
    "points",
    "tolerated",
]

_LIMITS = Limits()


@final
@dataclass(frozen=True)
class Changed:
    """How many answers changed.

    Args:
        changed: how many.
        n: of how many judged items, at least 1.
        what: the items' name in the plural, such as "held-out translations".
        tries: how many candidates were judged on these items before one of them was chosen.
        likelihood: what says when an answer is another one, such as "Gaussian(scale=2.0, tolerance=0.2)".
    """

    changed: int
    n: int
    what: str = "answers"
    tries: int = 1
    likelihood: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.changed <= self.n or self.n < 1 or self.tries < 1:
            raise InvalidInput(
                f"Changed was given {self.changed} changed of {self.n} items and tries={self.tries}; expected "
                "0 <= changed <= n, and n and tries of at least 1. Where nothing was judged, pass None"
            )

    @property
    def share(self) -> float:
        """The share of the judged items."""
        return self.changed / self.n

    def told(self, level: float) -> str:
        """Return the share with its upper bound in words."""
        bound = upper_bound(self.changed, self.n, self.tries, level)
        tries = f", corrected for {self.tries} candidates" if self.tries > 1 else ""
        by = f", as {self.likelihood} counts them" if self.likelihood else ""
        return (
            f"{100 * self.share:.2f} % of the {self.what} changed, at most {100 * bound:.2f} % at {100 * level:g} % "
            f"confidence ({self.changed:,} of {self.n:,}{tries}){by}"
        )


@final
@dataclass(frozen=True)
class Paired:
    """Two models' answers to the same labelled items: all, those of one class, or those of one slice.

    Args:
        name: of the items, such as "class 3" or "camera = left".
        n: how many, at least 1.
        broken: how many went from right to wrong.
        repaired: how many went from wrong to right.
        wrong: how many the first model answered wrongly.
        other: how many went from wrong to another wrong answer.
    """

    name: str
    n: int
    broken: int
    repaired: int
    wrong: int
    other: int = 0

    def __post_init__(self) -> None:
        counts = (self.broken, self.repaired, self.other, self.wrong)
        fits = self.broken <= self.n - self.wrong and self.repaired + self.other <= self.wrong
        if min(counts) < 0 or self.n < 1 or not fits:
            raise InvalidInput(
                f"Paired {self.name!r} was given n={self.n}, wrong={self.wrong}, broken={self.broken}, "
                f"repaired={self.repaired}, other={self.other}; expected at least one item, at most n - wrong broken, "
                "and at most wrong repaired and others"
            )

    @property
    def what(self) -> str:
        """What is said to have changed: an item has one answer."""
        return "answers"

    @property
    def changed(self) -> int:
        """How many answers changed."""
        return self.broken + self.repaired + self.other

    @property
    def doubled(self) -> bool:
        """Whether the error at least doubled."""
        return self.broken > 0 and self.wrong + self.broken - self.repaired >= 2 * self.wrong

    def loss(self, level: float, times: float = 1) -> Estimate:
        """Return by how many percentage points the error rose, had there been so many times as many items (Tango)."""
        broken, repaired = times * self.broken, times * self.repaired
        return paired_difference(broken, repaired, max(times * self.n, broken + repaired), level).scaled(100)

    def measured(self, limit: float, matters: float) -> Measured:
        """Return what is judged by limits in percentage points."""

        def told(level: float) -> str:
            return (
                f"the error moved by {interval(self.loss(level), 'points')} ({100 * level:.4g} % interval, "
                f"{self.n:,} items, {self.broken:,} broken, {self.repaired:,} repaired)"
            )

        return Measured(
            name=self.name,
            n=self.n,
            p=sign_test(self.broken, self.repaired),
            least=0.5 ** (self.broken + self.repaired),
            doubled=self.doubled,
            loss=self.loss,
            told=told,
            limit=limit,
            matters=matters,
            unit=points(limit),
        )


class Counted(Protocol):
    """Counts of labelled items: `Paired`, or `Several`."""

    @property
    def n(self) -> int:
        """How many items."""

    @property
    def changed(self) -> int:
        """How many changed."""

    @property
    def what(self) -> str:
        """What is said to have changed, in the plural."""

    def measured(self, limit: float, matters: float) -> Measured:
        """Return what is judged by limits in percentage points."""


def judge_edit(kept: Changed | None, held_out: Changed | None, limits: Limits = _LIMITS) -> Verdict:
    """Judge an edit by answers without labels.

    Green: few enough held-out answers changed, by the upper bound. Red: too many changed, by the lower bound. Amber:
    everything else; nothing measured, nothing held out, and fewer than `limits.judged` held-out items always are.

    Args:
        kept: items that the search has seen; None where there are none.
        held_out: items that no part of the search has seen; None where there are none.
        limits: what the edit may cost.

    >>> judge_edit(None, Changed(0, 500)).level
    Level.green
    >>> judge_edit(None, Changed(0, 3)).reasons
    ('0.00 % of the answers changed, at most 63.16 % at 95 % confidence (0 of 3); fewer than 200 items were judged.',)
    """
    untested = ["No labels were given: neither error rates nor classes nor slices could be tested."]
    if kept is None and held_out is None:
        reason = "Side effects were not measured: nothing was kept."
        return joined([Finding(Level.amber, reason, f"Keep {_enough(limits)}.", few=True)], untested)
    findings = [] if held_out is None else [change_finding(held_out, limits)]
    if kept is not None:
        findings.append(_kept_finding(kept, limits))
    if held_out is None:
        reason = "Only items that the search has seen were judged; other items may change more often."
        settle = f"Judge {_enough(limits)} that the search has not seen."
        findings.append(Finding(Level.amber, reason, settle, few=True))
    return joined(findings, untested)


def judge_answers(
    overall_counts: Counted,
    classes: Sequence[Counted] = (),
    slices: Sequence[Counted] = (),
    limits: Limits = _LIMITS,
) -> Verdict:
    """Judge two models by their answers to labelled items.

    Green: the interval of the overall loss lies within its limit, no class or slice is known to be worse, and few
    enough answers changed. Red: the interval lies beyond the limit, and the exact test rejects; or a class or slice is
    worse, after Holm's correction, and its error doubled or its corrected interval lies beyond its limit. Amber:
    everything else.

    Args:
        overall_counts: of all items: `Paired`, or `Several` where each has several answers.
        classes: of the items of each class or tag; those without items are left out.
        slices: of the items of each slice; see `weightpatch.evaluation.slices`.
        limits: what the edit may cost.

    >>> small = Paired("all items", 10_000, 60, 49, wrong=800)
    >>> judge_answers(small, [Paired("class 3", 1000, 17, 0, wrong=15)]).level
    Level.red
    """
    groups = [group.measured(limits.worst, limits.loss) for group in (*classes, *slices)]
    changed = Changed(overall_counts.changed, overall_counts.n, overall_counts.what)
    findings = [
        overall(overall_counts.measured(limits.loss, limits.loss), limits),
        *group_findings(groups, limits),
        tolerated(change_finding(changed, limits), limits),
    ]
    untested = [] if classes else ["No classes were given: none could be tested."]
    untested += [] if slices else ["No column was given: no slice of the items could be tested."]
    return joined(findings, untested)


def judge_score(loss: Estimate, changed: Changed, name: str = "BLEU", limits: Limits = _LIMITS) -> Verdict:
    """Judge two models by one score of all their answers, such as BLEU, with references.

    Args:
        loss: how many points of the score were lost, with a paired interval at `limits.level`.
        changed: how many answers changed, and of how many.
        name: of the score.
        limits: what the edit may cost.
    """

    def scaled(level: float, times: float) -> Estimate:
        low, high = ((edge - loss.value) / sqrt(times) for edge in (loss.low, loss.high))
        return Estimate(loss.value, loss.value + low, loss.value + high)

    def told(level: float) -> str:
        shown = interval(loss, "points")
        return f"the loss of {name} is {shown} ({100 * level:g} % interval, {changed.n:,} items)"

    measured = Measured(
        "all items", changed.n, 0.0, 0.0, False, scaled, told, limits.loss, limits.loss, points(limits.loss)
    )
    findings = [overall(measured, limits), tolerated(change_finding(changed, limits), limits)]
    return joined(findings, ["A score of all answers has no classes: none could be tested."])


def change_finding(seen: Changed, limits: Limits) -> Finding:
    """Judge the share of answers that changed by its exact one-sided bounds."""
    told, limit = f"{seen.told(limits.level)}; ", f"the limit of {100 * limits.changed:g} %"
    least = lower_bound(seen.changed, seen.n, seen.tries, limits.level)
    if least > limits.changed:
        return Finding(Level.red, f"{told}that is more than {limit} (at least {100 * least:.2f} %).")
    if seen.n < limits.judged:
        reason = f"{told}fewer than {limits.judged:,} items were judged."
        return Finding(Level.amber, reason, _advice(seen, limits), few=True)
    if upper_bound(seen.changed, seen.n, seen.tries, limits.level) <= limits.changed:
        return Finding(Level.green, f"{told}that is at most {limit}.")
    return Finding(Level.amber, f"{told}that may be more than {limit}.", _advice(seen, limits))


def tolerated(finding: Finding, limits: Limits) -> Finding:
    """Return what a share of changed answers means where labels say what it costs: never red by itself."""
    if finding.level is not Level.red:
        return finding
    look = f"Look at the answers that changed, or state a higher limit than Limits(changed={limits.changed:g})."
    return Finding(Level.amber, finding.reason, look)


def _kept_finding(kept: Changed, limits: Limits) -> Finding:
    """Judge items that the search has seen: known one by one, and no word on others."""
    least = lower_bound(kept.changed, kept.n, kept.tries, limits.level)
    level = Level.red if least > limits.changed else Level.amber if kept.share > limits.changed else Level.green
    told = (
        f"{100 * kept.share:.2f} % of the {kept.what} that the search has seen changed ({kept.changed:,} of {kept.n:,})"
    )
    beyond = "" if level is Level.green else f"; the limit is {100 * limits.changed:g} %"
    return Finding(level, f"{told}{beyond}.", "Take another editor, or state a higher limit." if beyond else "")


def _advice(seen: Changed, limits: Limits) -> str:
    def settled(n: int) -> bool:
        expected = min(seen.share * n, n)
        return (
            upper_bound(expected, n, seen.tries, limits.level) <= limits.changed
            or lower_bound(expected, n, seen.tries, limits.level) > limits.changed
        )

    wanted = more(seen.n, limits.judged, settled)
    if wanted is None:
        return f"The share is too near {100 * limits.changed:g} % for more items to settle it; state another limit."
    return f"Judge about {wanted:,} more items, if they change as often as those that were judged."


def _enough(limits: Limits) -> str:
    """Return in words how many items can make a verdict green, where none of them changes."""
    if not limits.changed:
        return f"{limits.judged:,} items or more"
    fewest = log(1 - limits.level) / log(1 - limits.changed) if limits.changed < 1 else 1
    return f"about {max(limits.judged, ceil(fewest)):,} items or more"


def interval(loss: Estimate, unit: str) -> str:
    """Return a loss with its interval in words."""
    return f"{loss.value:+.2f} {unit} [{loss.low:+.2f}, {loss.high:+.2f}]"


def points(limit: float) -> str:
    """Return the unit of a limit."""
    return "point" if limit == 1 else "points"
