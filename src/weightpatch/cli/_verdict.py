"""The verdict on a terminal: a line each for what is kept and what was held out, the level with what decides it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..editing import Edit
    from ..effects import Effect
    from ..verdict import Limits, Verdict


def limits(drawdown: float | None, changed: float | None = None) -> Limits:
    """Return the limits that a verdict goes by: those of the gates, points and percent, where these are given."""
    from ..verdict import Limits

    usual = Limits()
    loss = usual.loss if drawdown is None else max(0.0, drawdown)
    share = usual.changed if changed is None else min(max(0.0, changed / 100), 1.0)
    return Limits(loss=loss, changed=share)


def tell_effects(out: Console, found: Edit, before: str = "") -> None:
    """Print what an edit changed of what is kept, and of what was held out."""
    kept = "which the search has partly seen"
    out.print(f"{before}kept     {_told(found.kept, kept)}", markup=False)
    upper = "" if found.held_out is None else f"at most {100 * found.held_out.upper:.2f} % of others (95 %)"
    out.print(f"{before}held out {_told(found.held_out, upper)}", markup=False)


def tell_verdict(out: Console, verdict: Verdict, before: str = "") -> None:
    """Print the level with the first reason, and how many more there are."""
    more = len(verdict.reasons) - 1
    behind = f" ({more} more with --report or --json)" if more else ""
    out.print(f"{before}verdict  {verdict.headline}{behind}", markup=False)


def ships(verdict: Verdict, strict: bool) -> bool:
    """Whether the exit code is 0: green, and amber where it is not strict."""
    from ..verdict import Level

    return verdict.level is Level.green or (verdict.level is Level.amber and not strict)


def _told(effect: Effect | None, what: str) -> str:
    if effect is None:
        return "not measured"
    return f"{100 * effect.share:.2f} % of {effect.items:,} answers changed, {what}"
