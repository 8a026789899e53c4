"""One answer that changed, line by line: classes and tags with probabilities, numbers with what was right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from torch import Tensor

from ..comparison import Comparison
from ..judging import item_means
from ..kinds import Numbers, Tags, residuals, shares, tags_asked
from ._words import Names

__all__ = ["Line", "lines", "note"]

_LINES = 3


@final
@dataclass(frozen=True)
class Line:
    """What stands in one line of a card.

    Attributes:
        name: a class, a tag or an output.
        before: its probability, or its value; None where there is none.
        after: the same of the second model.
        right: the value that was right, of numbers.
        share: whether these are shares of 1.
        strong: the line that counts.
    """

    name: str
    before: float | None
    after: float
    right: float | None = None
    share: bool = True
    strong: bool = False


def lines(comparison: Comparison, row: int, names: Names) -> tuple[tuple[Line, ...], int]:
    """Return what a card shows of one item, and how many more lines there would be."""
    found = tuple(_of(comparison, row, names))
    return found[:_LINES], max(0, len(found) - _LINES)


def note(comparison: Comparison, row: int, names: Names) -> str:
    """Return what was right where the lines do not say it: of one class that is still wrong."""
    if not comparison.single or isinstance(comparison.kind, Tags):
        return ""
    right, now, was = (
        int(part[row]) for part in (comparison.targets, comparison.answers_after, comparison.answers_before)
    )
    return "" if right in (was, now) else f"right: {names[right]}"


def _of(comparison: Comparison, row: int, names: Names) -> Iterator[Line]:
    kind = comparison.kind
    if comparison.positions > comparison.n or not kind.group:
        yield from _summed(comparison, row)
    elif isinstance(kind, Tags):
        yield from _tags(comparison, row, names)
    elif isinstance(kind, Numbers):
        yield from _numbers(comparison, row, names)
    else:
        yield from _classes(comparison, row, names)


def _classes(comparison: Comparison, row: int, names: Names) -> Iterator[Line]:
    was, now = int(comparison.answers_before[row]), int(comparison.answers_after[row])
    before, after = (shares(comparison.likelihood, z[row : row + 1])[0] for z in (comparison.before, comparison.after))
    yield Line(names[was], _chance(before, was), _chance(after, was))
    yield Line(f"→ {names[now]}", _chance(before, now), _chance(after, now), strong=True)


def _chance(row: Tensor, answer: int) -> float:
    return float(row[answer]) if answer >= 0 else 0.0


def _tags(comparison: Comparison, row: int, names: Names) -> Iterator[Line]:
    """Tags that changed, those that are wrong now first."""
    wanted, asked = (part[row] for part in tags_asked(comparison.judged))
    before, after = (shares(comparison.likelihood, z[row : row + 1])[0] for z in (comparison.before, comparison.after))
    now = comparison.answers_after[row]
    moved = ((comparison.answers_before[row] != now) & asked).nonzero().squeeze(1).tolist()
    for k in sorted(moved, key=lambda k: (int(now[k]) == int(wanted[k]), k)):
        wrong = int(now[k]) != int(wanted[k])
        yield Line(f"{'✕' if wrong else '✓'} {names[k]}", float(before[k]), float(after[k]), strong=wrong)


def _numbers(comparison: Comparison, row: int, names: Names) -> Iterator[Line]:
    """Outputs that moved most, with what was right."""
    old, new = comparison.answers_before[row], comparison.answers_after[row]
    off, _ = residuals(comparison.judged)
    for place, k in enumerate((new - old).abs().nan_to_num(float("inf")).argsort(descending=True).tolist()):
        right = float(old[k] - off[row, k])
        yield Line(names[k], float(old[k]), float(new[k]), right, share=False, strong=place == 0)


def _summed(comparison: Comparison, row: int) -> Iterator[Line]:
    """The figures of an item of many positions, or of answers that are told by their loss alone."""
    before, after, n = (float(part[row]) for part in comparison.judged.items)
    figure, likelihood = comparison.likelihood.figure, comparison.likelihood
    percent = likelihood.unit == "%"
    told = [figure(total / n) / (100 if percent else 1) for total in (before, after)]
    yield Line(likelihood.error_name, told[0], told[1], share=percent, strong=True)
    if n > 1:
        changed = item_means(comparison.judged.changed[row : row + 1], comparison.judged.counts[row : row + 1])
        yield Line("changed", None, float(changed))
