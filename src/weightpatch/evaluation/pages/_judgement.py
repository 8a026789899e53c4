"""The verdict as a page shows it: a colour, what decides, and the rest folded away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ...editing import Edit, Result
from ...verdict import Level, Verdict

__all__ = ["Judgement", "judgement", "of_edit"]

_SHOWN = 3
_TONES = {Level.green: "good", Level.amber: "wary", Level.red: "bad"}
_PATCHED = {
    Level.green: "Patched",
    Level.amber: "Patched, with open questions",
    Level.red: "Patched, at a price",
}


@final
@dataclass(frozen=True)
class Judgement:
    """What stands on top of a page.

    Attributes:
        tone: the style of the box: good, wary or bad.
        title: the heading.
        verdict: what is told below it; None where there is nothing to ship.
    """

    tone: str
    title: str
    verdict: Verdict | None

    @property
    def shown(self) -> tuple[str, ...]:
        """The reasons that are seen at once."""
        return () if self.verdict is None else self.verdict.reasons[:_SHOWN]

    @property
    def folded(self) -> tuple[str, ...]:
        """The other reasons."""
        return () if self.verdict is None else self.verdict.reasons[_SHOWN:]


def judgement(title: str, verdict: Verdict) -> Judgement:
    """Return what a page of two models shows."""
    return Judgement(_TONES[verdict.level], title, verdict)


def of_edit(edit: Edit, verdict: Verdict) -> Judgement:
    """Return what a page of an edit shows."""
    if edit.result is Result.already_satisfied:
        return Judgement("good", "Nothing to patch", None)
    if not edit.result.held:
        return Judgement("bad", "Not patched", None)
    return Judgement(_TONES[verdict.level], _PATCHED[verdict.level], verdict)
