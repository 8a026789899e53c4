"""The geometry of the page's figures, in percent of their width and height; templates draw them with CSS and SVG.

Lines stretch with the page and words do not, so a figure reads as well on a telephone as on a desk, in light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from torch import Tensor

from ..curve import Curve
from ._words import count, decimal, points

__all__ = ["Column", "Histogram", "Line", "Tick", "drawdown_line", "histogram", "slack_line", "ticks"]

_COLUMNS = 21  # odd, so that one column holds the items that did not move
_STEPS = (1, 2, 2.5, 5, 10)


@final
@dataclass(frozen=True)
class Tick:
    """A place on an axis, in percent, and the words there."""

    at: float
    text: str


@final
@dataclass(frozen=True)
class Line:
    """A line over the strength of a patch; `band` is the outline of its interval, `zero` where 0 lies."""

    dots: tuple[Tick, ...]
    heights: tuple[float, ...]
    band: tuple[tuple[float, float], ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    zero: float


@final
@dataclass(frozen=True)
class Column:
    """One column of a histogram: its height in percent, and what it holds."""

    height: float
    text: str
    middle: bool


@final
@dataclass(frozen=True)
class Histogram:
    """Columns over a symmetric range; heights are logarithms of counts."""

    columns: tuple[Column, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers that cover low to high in about `wanted` steps, the ends included."""
    span = high - low if high > low else max(abs(low), 1.0)
    raw = span / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(s * unit for s in _STEPS if s * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def slack_line(curve: Curve) -> Line:
    """Draw the slack of the constraint over the strength."""
    values = [p.slack for p in curve.points]
    return _line(curve, values, [(v, v) for v in values], "slack")


def drawdown_line(curve: Curve) -> Line:
    """Draw the drawdown, with its interval, over the strength."""
    values = [p.drawdown.value for p in curve.points]
    return _line(curve, values, [(p.drawdown.low, p.drawdown.high) for p in curve.points], "drawdown")


def histogram(shift: Tensor) -> Histogram:
    """Count how far the probability of the earlier answer moved; the range is the largest move, rounded up."""
    values = shift.double().numpy()
    reach = ticks(0.0, max(float(np.abs(values).max()), 1e-6), 1)[-1]
    counts, edges = np.histogram(values, bins=_COLUMNS, range=(-reach, reach))
    decades = max(1, math.ceil(math.log10(max(int(counts.max()), 2))))
    digits = max(2, 2 - math.floor(math.log10(reach)))
    found = zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    columns = tuple(
        Column(_height(n, decades), f"{points(a, digits)} to {points(b, digits)}: {count(n)}", i == _COLUMNS // 2)
        for i, (n, a, b) in enumerate(found)
    )
    across = tuple(Tick(25.0 * i, points(reach * (i - 2) / 2, _digits(reach / 2))) for i in range(5))
    up = tuple(Tick(round(_height(10**k, decades), 2), count(10**k)) for k in range(decades + 1))
    return Histogram(columns, across, up)


def _height(n: int, decades: int) -> float:
    # One item has to be seen too, so a tenth of the height lies below 1
    return 0.0 if n < 1 else round(10 + 90 * math.log10(n) / decades, 2)


def _line(curve: Curve, values: Sequence[float], ranges: Sequence[tuple[float, float]], what: str) -> Line:
    finite = [v for pair in ranges for v in pair if math.isfinite(v)] or [0.0]
    marks = ticks(min(*finite, 0.0), max(*finite, 0.0))
    low, high = marks[0], marks[-1]
    digits = _digits(marks[1] - marks[0])

    def up(value: float) -> float:
        return round(100 * (min(max(value, low), high) - low) / (high - low), 2) if math.isfinite(value) else 0.0

    strengths = [round(100 * p.strength, 2) for p in curve.points]
    words = (f"strength {x:g} %: {what} {points(v, digits + 1)}" for x, v in zip(strengths, values, strict=True))
    return Line(
        dots=tuple(Tick(x, text) for x, text in zip(strengths, words, strict=True)),
        heights=tuple(up(v) for v in values),
        band=tuple(_outline(strengths, [(up(a), up(b)) for a, b in ranges])),
        x=tuple(Tick(float(x), f"{x}\u2009%") for x in range(0, 101, 25)),
        y=tuple(Tick(up(v), decimal(v, digits, sign=what == "drawdown")) for v in marks),
        zero=up(0.0),
    )


def _outline(across: Sequence[float], ranges: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Go along the upper edge, and back along the lower one."""
    for x, (_, high) in zip(across, ranges, strict=True):
        yield x, high
    for x, (low, _) in reversed(list(zip(across, ranges, strict=True))):
        yield x, low


def _digits(step: float) -> int:
    """Return how many decimals tell multiples of `step` apart."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return digits if math.isclose(step * 10**digits, round(step * 10**digits)) else digits + 1
