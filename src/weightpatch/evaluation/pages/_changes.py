"""What else changed, as a page shows it: flips as cards, classes as rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from ..._calling import Inputs, Name
from ..comparison import Comparison
from ..kinds import GroupChange
from ..metrics import Estimate, wilson
from ._items import Line, lines, note
from ._pictures import Image, Picture, default_picture, draw
from ._plots import histogram
from ._words import Names, Scale

__all__ = ["Card", "Changes", "Row", "Table", "changes"]

_CARDS = 24
_ROWS = 30


@final
@dataclass(frozen=True)
class Card:
    """One answer that changed: for the worse (broken), the better (repaired) or neither; `asked` was in the edit."""

    kind: str
    item: Name
    lines: tuple[Line, ...]
    more: int
    note: str
    asked: bool
    picture: Image | None


@final
@dataclass(frozen=True)
class Row:
    """What changed for one class, tag, output or value; the widths of its bars are in percent of the longest."""

    name: str
    change: GroupChange
    broken: float
    other: float
    repaired: float


@final
@dataclass(frozen=True)
class Table:
    """Rows for the classes, tags or outputs, or for the values of a column, the most changed where there are many."""

    title: str
    heading: str
    rows: tuple[Row, ...]
    unlisted: int


@final
@dataclass(frozen=True, eq=False)
class Changes:
    """The whole section: shares of the test set with Wilson's 95 % intervals, the cards, the tables, the shifts."""

    comparison: Comparison
    scale: Scale
    words: dict[str, tuple[str, str]]
    shares: dict[str, Estimate]
    positions: Estimate | None
    cards: tuple[Card, ...]
    more: int
    tables: tuple[Table, ...]
    shifts: str
    asked: int


_PLAIN = {
    "broken": ("broken", "right, now wrong"),
    "repaired": ("repaired", "wrong, now right"),
    "other": ("other", "wrong, differently"),
}
_GRADED = {
    "broken": ("worse", "changed, and further off"),
    "repaired": ("better", "changed, and less far off"),
    "other": ("other", "changed, as far off as before"),
}


def changes(
    comparison: Comparison, inputs: Inputs, classes: Names, picture: Picture | None, asked: Collection[int] = ()
) -> Changes:
    """Collect what the section shows; `asked` are the rows of the test set that the edit itself was about."""
    picture = picture or default_picture(inputs)
    flipped = comparison.flipped.tolist()
    kinds = {row: kind for kind in _PLAIN for row in getattr(comparison, kind).tolist()}
    names = Names(classes.classes, comparison.kind.group or "output")
    return Changes(
        comparison,
        Scale(comparison.likelihood.unit),
        _PLAIN if comparison.single else _GRADED,
        {kind: wilson(getattr(comparison.flips, kind), comparison.n) for kind in _PLAIN},
        wilson(comparison.positions_changed, comparison.positions) if comparison.positions > comparison.n else None,
        tuple(
            Card(
                kinds[row],
                comparison.name(row),
                *lines(comparison, row, names),
                note(comparison, row, names),
                row in asked,
                draw(picture, inputs, row),
            )
            for row in flipped[:_CARDS]
        ),
        max(0, len(flipped) - _CARDS),
        tuple(_tables(comparison, names)),
        histogram(comparison.shift[comparison.counts], f"change of {comparison.kind.axis}"),
        sum(row in asked for row in flipped),
    )


def _tables(comparison: Comparison, names: Names) -> Iterator[Table]:
    if group := comparison.kind.group:
        heading = "Right class" if group == "class" else group.capitalize()
        yield _table(
            f"By {group}", heading, comparison.groups, {row.label: names[row.label] for row in comparison.groups}
        )
    if comparison.by_slice:
        yield _table("By slice", "Slice", comparison.by_slice, {row.label: row.label for row in comparison.by_slice})


def _table(title: str, heading: str, found: tuple[GroupChange, ...], names: Mapping[Any, str]) -> Table:
    listed = _listed(found)
    longest = max(1, *(max(r.flips.broken + r.flips.other, r.flips.repaired) for r in listed), 1)
    rows = tuple(_row(change, names[change.label], longest) for change in listed)
    return Table(title, heading, rows, len(found) - len(listed))


def _listed(found: tuple[GroupChange, ...]) -> list[GroupChange]:
    """All rows where a page has room for them, else those with the most flips."""
    if len(found) <= _ROWS:
        return list(found)
    changed = sorted((c for c in found if c.flips.total), key=lambda c: -c.flips.total)
    return changed[:_ROWS]


def _row(change: GroupChange, name: str, longest: int) -> Row:
    width: dict[str, Any] = {
        k: round(100 * getattr(change.flips, k) / longest, 2) for k in ("broken", "other", "repaired")
    }
    return Row(name, change, **width)
