"""What else changed, as a page shows it: flips as cards, classes as rows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, final

from ..._calling import Inputs
from ..comparison import ClassChange, Comparison
from ..metrics import Estimate, wilson
from ._pictures import Image, Picture, default_picture, draw
from ._plots import histogram
from ._words import Names

__all__ = ["Card", "Changes", "Row", "changes"]

_CARDS = 24
_ROWS = 30


@final
@dataclass(frozen=True)
class Card:
    """One answer that changed; probabilities are shares of 1, `asked` marks an input that the edit was about."""

    kind: str
    row: int
    was: str
    now: str
    right: str
    was_before: float
    was_after: float
    now_before: float
    now_after: float
    right_before: float
    right_after: float
    asked: bool
    picture: Image | None


@final
@dataclass(frozen=True)
class Row:
    """What changed for one class; the widths of its bars are in percent of the longest."""

    name: str
    change: ClassChange
    broken: float
    other: float
    repaired: float


@final
@dataclass(frozen=True, eq=False)
class Changes:
    """The whole section: shares of the test set with Wilson's 95 % intervals, the cards, the classes, the shifts."""

    comparison: Comparison
    shares: dict[str, Estimate]
    cards: tuple[Card, ...]
    more: int
    rows: tuple[Row, ...]
    unlisted: int
    shifts: str
    asked: int


def changes(
    comparison: Comparison, inputs: Inputs, classes: Names, picture: Picture | None, asked: Collection[int] = ()
) -> Changes:
    """Collect what the section shows; `asked` are the rows of the test set that the edit itself was about."""
    picture = picture or default_picture(inputs)
    flipped = comparison.flipped.tolist()
    listed = _listed(comparison.per_class)
    longest = max((r.flips.broken + r.flips.other for r in listed), default=0)
    longest = max(longest, *(r.flips.repaired for r in listed), 1) if listed else 1
    counts = {kind: getattr(comparison.flips, kind) for kind in ("broken", "repaired", "other")}
    return Changes(
        comparison,
        {kind: wilson(k, comparison.n) for kind, k in counts.items()},
        tuple(
            _card(comparison, row, classes, lambda i: draw(picture, inputs, i), row in asked)
            for row in flipped[:_CARDS]
        ),
        max(0, len(flipped) - _CARDS),
        tuple(_row(change, classes, longest) for change in listed),
        len(comparison.per_class) - len(listed),
        histogram(comparison.shift),
        sum(row in asked for row in flipped),
    )


def _card(comparison: Comparison, row: int, classes: Names, image: Callable[[int], Image | None], asked: bool) -> Card:
    was, now, right = (int(x[row]) for x in (comparison.answers_before, comparison.answers_after, comparison.labels))
    before, after = comparison.probabilities_before[row].tolist(), comparison.probabilities_after[row].tolist()

    def chance(shares: list[float], answer: int) -> float:
        return shares[answer] if answer >= 0 else 0.0

    return Card(
        kind="broken" if was == right else "repaired" if now == right else "other",
        row=row,
        was=classes[was],
        now=classes[now],
        right=classes[right],
        was_before=chance(before, was),
        was_after=chance(after, was),
        now_before=chance(before, now),
        now_after=chance(after, now),
        right_before=before[right],
        right_after=after[right],
        asked=asked,
        picture=image(row),
    )


def _listed(per_class: tuple[ClassChange, ...]) -> list[ClassChange]:
    """All classes where a page has room for them, else those with the most flips."""
    if len(per_class) <= _ROWS:
        return list(per_class)
    changed = sorted((c for c in per_class if c.flips.total), key=lambda c: (-c.flips.total, c.label))
    return changed[:_ROWS]


def _row(change: ClassChange, classes: Names, longest: int) -> Row:
    width: dict[str, Any] = {
        k: round(100 * getattr(change.flips, k) / longest, 2) for k in ("broken", "other", "repaired")
    }
    return Row(classes[change.label], change, **width)
