"""What an edit did to answers on some inputs: one figure, with its number of items and an upper bound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from .bounds import upper_bound

__all__ = ["Effect"]


@final
@dataclass(frozen=True)
class Effect:
    """How many answers an edit changed on some items, and how far predictions moved.

    Attributes:
        items: how many items were asked.
        changed: how many of them answer otherwise at one position or more.
        positions: how many positions, such as tokens or pixels, counted; as many as items where each has one answer.
        moved: at how many of them the answer is another one.
        drift: the mean over positions of KL(before || after), nats; of several outputs their sum.
        likelihood: what the outputs were taken for, with its units.
        tries: how many candidates were compared on these items before one was taken.
    """

    items: int
    changed: int
    positions: int
    moved: int
    drift: float
    likelihood: str
    tries: int = 1

    @property
    def share(self) -> float:
        """The share of the items that answer otherwise."""
        return self.changed / self.items

    @property
    def upper(self) -> float:
        """The one-sided 95 % upper bound of that share among all such items, corrected for the tries.

        It holds for items like these that no part of the search has seen; see `weightpatch.bounds.upper_bound`.
        """
        return upper_bound(self.changed, self.items, self.tries)

    def __add__(self, other: Effect) -> Effect:
        items = self.items + other.items
        drift = (self.drift * self.positions + other.drift * other.positions) / (self.positions + other.positions)
        counts = (items, self.changed + other.changed, self.positions + other.positions, self.moved + other.moved)
        return Effect(*counts, drift, self.likelihood, max(self.tries, other.tries))

    def after(self, tries: int) -> Effect:
        """Return the same figure, chosen from so many."""
        return replace(self, tries=max(1, tries))

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return own | {"share": self.share, "upper": self.upper}

    def __str__(self) -> str:
        told = f"{100 * self.share:.2f} % of {self.items} (at most {100 * self.upper:.2g} %)"
        return (
            told if self.positions == self.items else f"{told}, {100 * self.moved / self.positions:.2f} % of positions"
        )
