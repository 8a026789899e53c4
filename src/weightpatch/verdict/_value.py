"""The verdict, and the limits that it goes by."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from math import inf
from typing import Any, final

from ..errors import InvalidInput

__all__ = ["Level", "Limits", "Verdict"]


@final
class Level(Enum):
    """How an edit is judged; the value is advice. Levels are ordered: green < amber < red."""

    green = "every figure is within its limit; ship it"
    amber = "not known to be within the limits; read the reasons before you ship it"
    red = "a figure is beyond its limit, and that is no accident of the sample; do not ship it unless you accept that"

    def __lt__(self, other: Level) -> bool:
        order = list(Level)
        return order.index(self) < order.index(other)

    def __repr__(self) -> str:
        return f"Level.{self.name}"


@final
@dataclass(frozen=True)
class Limits:
    """What an edit may cost.

    Args:
        loss: how many percentage points the error of all items may rise, and how many points a score such as BLEU may
            fall. Lower limits need more items: without any flip, 1 point takes 381 items and 0.1 points 3,838.
        worst: how many percentage points the error of one class or slice may rise.
        growth: by what share of itself an error in numbers, such as the RMSE of all items, may grow; 0.05 is 5 %.
        worst_growth: the same for one slice.
        changed: the share of answers that may change. Without any change, 0.02 takes 149 items and 0.005 takes 598.
        level: the confidence of every interval, bound and test; more makes both green and red rarer.
        judged: with fewer items than this the verdict is never green.

    Raises:
        InvalidInput: a limit is negative or not finite, or a share is above 1.

    >>> Limits(loss=0.5, changed=0.01).worst
    5.0
    """

    loss: float = 1.0
    worst: float = 5.0
    growth: float = 0.05
    worst_growth: float = 0.25
    changed: float = 0.02
    level: float = 0.95
    judged: int = 200

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < inf or (field.name == "changed" and value > 1):
                raise InvalidInput(
                    f"Limits was given {field.name}={value}; expected a finite number of at least 0"
                    + (", a share of at most 1" if field.name == "changed" else "")
                )
        if not 0 < self.level < 1:
            raise InvalidInput(f"Limits was given level={self.level}; expected a share between 0 and 1, such as 0.95")


@final
@dataclass(frozen=True)
class Verdict:
    """Whether an edit may be shipped, and why.

    Verdicts on one edit are joined by ``&``: the worse level holds, and every reason is told. One exception: an amber
    verdict for want of items (see `few`) gives way to a green one, which had enough.

    Attributes:
        level: green, amber or red; its value is advice.
        reasons: full sentences, the worst first, each with value, unit, interval and number of items.
        untested: which tests could not be made, and why.
        settle: what would turn an amber verdict into a green or red one.
        few: whether it is amber for want of items alone: nothing or too little was judged, and nothing speaks against
            the edit.

    >>> few, enough = Verdict(Level.amber, ("3 of 3 hold.",), few=True), Verdict(Level.green, ("500 of 500 hold.",))
    >>> (few & enough).level, (few & enough).reasons
    (Level.green, ('500 of 500 hold.', '3 of 3 hold.'))
    """

    level: Level
    reasons: tuple[str, ...]
    untested: tuple[str, ...] = ()
    settle: tuple[str, ...] = ()
    few: bool = False

    def __and__(self, other: Verdict) -> Verdict:
        first, second = (other, self) if self._weight < other._weight else (self, other)
        return Verdict(
            first.level,
            _unique(first.reasons + second.reasons),
            _unique(first.untested + second.untested),
            _unique(first.settle + second.settle) if first.level is Level.amber else (),
            first.few,
        )

    @property
    def headline(self) -> str:
        """The level and the first reason, in one line."""
        return f"{self.level.name}: {self.reasons[0]}"

    @property
    def _weight(self) -> int:
        """Which of two verdicts decides: too few items say the least, red the most."""
        return -1 if self.few else list(Level).index(self.level)

    def __str__(self) -> str:
        return "\n".join((f"{self.level.name}: {self.level.value}", *self.reasons, *self.untested, *self.settle))

    def to_json(self) -> dict[str, Any]:
        """Return the level's name, its advice and all sentences as plain values."""
        return {
            "level": self.level.name,
            "advice": self.level.value,
            "reasons": list(self.reasons),
            "untested": list(self.untested),
            "settle": list(self.settle),
        }


def _unique(sentences: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sentences))
