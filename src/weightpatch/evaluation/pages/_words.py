"""Numbers as a reader wants them: filters of the page's templates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from ..metrics import Estimate

__all__ = ["FILTERS", "Names", "Scale", "plural", "points"]

_MINUS, _THIN, _NOTHING = "\u2212", "\u2009", "\u2013"


@final
@dataclass(frozen=True)
class Names:
    """The names of the classes, tags or outputs; one without a name is called by its number."""

    classes: Sequence[str]
    group: str = "class"

    def __getitem__(self, answer: int) -> str:
        if answer < 0:
            return "no answer"
        return str(self.classes[answer]) if answer < len(self.classes) else f"{self.group} {answer}"


@final
@dataclass(frozen=True)
class Scale:
    """How figures are written: percent with two digits, others with three significant ones and their unit."""

    unit: str

    def value(self, value: float | None) -> str:
        """Return `7.12 %`, or `0.127 kg`."""
        return f"{self.bare(value)} {self.unit}".rstrip()

    def bare(self, value: float | None) -> str:
        """Return the same without its unit."""
        return decimal(value) if self.unit == "%" else number(value)

    def change(self, value: float | None) -> str:
        """Return a signed difference without its unit."""
        if self.unit == "%":
            return points(value)
        return ("+" if value is not None and math.isfinite(value) and value > 0 else "") + number(value)

    def interval(self, estimate: Estimate) -> str:
        """Return `−0.03 to +0.07`."""
        return f"{self.change(estimate.low)} to {self.change(estimate.high)}"

    @property
    def points(self) -> str:
        """The unit of a difference."""
        return "points" if self.unit == "%" else self.unit


def plural(number: int, one: str, many: str = "") -> str:
    """Return `1 step`, `2 steps`, `1,200 steps`."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def count(number: int) -> str:
    """Return a whole number with separators."""
    return f"{number:,}".replace("-", _MINUS)


def decimal(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Return a number with a typographic minus; a dash for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return _NOTHING
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")
    return text.replace("-", _MINUS)


def number(value: float | None) -> str:
    """Return a number of any size with three significant digits."""
    if value is None or not math.isfinite(value):
        return _NOTHING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("-", _MINUS)


def points(value: float | None, digits: int = 2) -> str:
    """Return a signed number of percentage points."""
    return decimal(value, digits, sign=True)


def interval(estimate: Estimate, digits: int = 2) -> str:
    """Return `−0.03 to +0.07`."""
    return f"{points(estimate.low, digits)} to {points(estimate.high, digits)}"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share of 1 in percent; what would round to 0 or 100 without being it says so."""
    if share is None or not math.isfinite(share):
        return _NOTHING
    least = 10.0**-digits
    if 0 < 100 * share < least:
        return f"<{_THIN}{least:g}{_THIN}%"
    if 0 < 100 * (1 - share) < least:
        return f">{_THIN}{100 - least:g}{_THIN}%"
    return f"{100 * share:.{digits}f}{_THIN}%"


def chance(share: float) -> str:
    """Return a share of 1 in whole percent, without the sign; `<1` and `>99` for what is not quite 0 or 1."""
    return percent(share, 0).removesuffix(f"{_THIN}%").replace(_THIN, "")


def size(nbytes: int | None) -> str:
    """Return a number of bytes in B, kB, MB or GB."""
    if nbytes is None:
        return "not measured"
    amount, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f}{_THIN}{unit}" if unit == "B" or amount >= 100 else f"{amount:.1f}{_THIN}{unit}"


def seconds(amount: float) -> str:
    """Return a duration in ms, s or min."""
    if amount < 1:
        return f"{1000 * amount:.0f}{_THIN}ms"
    return f"{amount:.1f}{_THIN}s" if amount < 120 else f"{amount / 60:.1f}{_THIN}min"


def cell(value: Any) -> str:
    """Return whatever a table holds: text, a whole number, a number, or an estimate with its interval."""
    if isinstance(value, Estimate):
        return f"{number(value.value)} ({number(value.low)} to {number(value.high)})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: _NOTHING}[value]
    return count(value) if isinstance(value, int) else number(value) if isinstance(value, float) else str(value)


FILTERS: dict[str, Callable[..., str]] = {
    f.__name__: f for f in (chance, count, decimal, number, points, interval, percent, size, seconds, cell, plural)
}
