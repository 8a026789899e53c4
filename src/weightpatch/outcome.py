"""How an edit ended: values, and the advice in their text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, final

from ._calling import Params
from ._cost import Cost
from .constraints import Constraint
from .editors import Attempt, Certificate, Editor
from .effects import Effect
from .errors import EditFailed
from .patches import Patch
from .verdict import Changed, Limits, Verdict, judge_edit

__all__ = ["Edit", "Reality", "Result", "Solved"]

_LIMITS = Limits()


class Result(Enum):
    """How an edit ended; the value is advice."""

    satisfied = "every demand is met on the final weights"
    already_satisfied = "every demand was met before the edit; nothing was changed"
    unsatisfied = (
        "some demand is not met; allow more steps, a larger learning rate, more parameters, or a smaller margin"
    )
    stalled = (
        "some demand is not met and the editor changed no weight: its gradient is 0, or its step is smaller than the "
        "model's dtype resolves; try a larger learning rate, other parameters, or allow at least one step"
    )
    infeasible = (
        "the demands contradict each other: no values of these parameters meet them all; certificate.infeasible says "
        "which, drop one of them or allow more parameters"
    )
    over_budget = (
        "every demand is met, but more changes on what is kept than max_drift or the editor's budget allow; ask for "
        "less, allow other parameters, or use an editor that is more local"
    )
    unreliable = (
        "every demand is met in one pass, and not in every pass: the model draws random numbers in evaluation mode, or "
        "the items of a batch depend on each other; found.reality says which. Ask for a larger margin, for one item at "
        "a time, or make the model deterministic"
    )
    nonfinite = "the edited weights or outputs are NaN or infinite; try a smaller learning rate"

    @property
    def held(self) -> bool:
        """Whether every demand is met, and no budget broken."""
        return self in (Result.satisfied, Result.already_satisfied)


@final
@dataclass(frozen=True)
class Reality:
    """Whether demands that hold in one pass hold in all.

    Attributes:
        draws: how many passes were made; 1 where the model draws no random numbers.
        held: in how many of them every demand held.
        apart: how many items were asked alone, where those of a batch depend on each other; 0 where they do not.
        alone: how many of these held.
    """

    draws: int = 1
    held: int = 1
    apart: int = 0
    alone: int = 0

    @property
    def true(self) -> bool:
        """Whether every demand held in all passes, and alone."""
        return self.held == self.draws and self.alone == self.apart

    def __str__(self) -> str:
        told = []
        if self.draws > 1:
            told.append(f"the model draws random numbers: all demands hold in {self.held} of {self.draws} passes")
        if self.apart:
            told.append(f"items of a batch depend on each other: {self.alone} of {self.apart} hold asked alone")
        return "; ".join(told) or "one pass says what all say"


@final
@dataclass(frozen=True, eq=False)
class Solved:
    """One editor's answer to one constraint, checked by a full pass on weights rounded to the model's own dtype.

    Attributes:
        result: how it ended.
        params: the edited parameters, rounded to the model's dtypes.
        steps: how many updates were made.
        before: the largest violation before the edit.
        after: the largest violation on `params`.
        kept: what changed on all kept items; None without them.
        held_out: what changed on those of them that no part of the search has seen; None where there are none.
        constraint: the constraint with today's answers bound.
        certificate: what an exact editor can say about its answer.
        attempts: what a ladder tried, in turn.
        within: whether the editor's own budget is kept.
        reality: whether one pass says what all say.
        refined: a stricter constraint, where the demands hold and yet the model as deployed does otherwise.
    """

    result: Result
    params: Params
    steps: int
    before: float
    after: float
    kept: Effect | None
    held_out: Effect | None
    constraint: Constraint
    certificate: Certificate | None = None
    attempts: tuple[Attempt, ...] = ()
    within: bool = True
    reality: Reality = Reality()
    refined: Constraint | None = None

    @property
    def drift(self) -> float | None:
        """KL(before || after) on the kept items, nats; None without them."""
        return None if self.kept is None else self.kept.drift


@final
@dataclass(frozen=True, eq=False)
class Edit:
    """One attempt's outcome; the model itself is as it was.

    Attributes:
        result: how it ended; `result.value` is advice.
        steps: how many updates the editor made.
        violation: the largest violation on the final weights; met where at most 0.
        kept: what changed on all kept items, which the search has partly seen; None where nothing is kept.
        held_out: what changed on the kept items that no part of the search has seen: what to expect of others.
        cost: seconds and peak memory.
        patch: what changed, or None where the outcome is not finite.
        constraint: what was asked, with today's answers bound.
        editor: what looked for it.
        certificate: what an exact editor can say about its answer.
        attempts: what a ladder, as `Auto`, tried, in turn; ``print(*found.attempts, sep="\\n")`` explains its choice.
        reality: whether one pass of the model says what all passes say.
        unchecked: demands of earlier patches that could not be asked: the kind of each, and why.
    """

    result: Result
    steps: int
    violation: float
    kept: Effect | None
    held_out: Effect | None
    cost: Cost
    patch: Patch | None
    constraint: Constraint
    editor: Editor
    certificate: Certificate | None = None
    attempts: tuple[Attempt, ...] = ()
    reality: Reality = Reality()
    unchecked: tuple[str, ...] = ()

    @property
    def drift(self) -> float | None:
        """KL(before || after) on the kept items, nats; None without them."""
        return None if self.kept is None else self.kept.drift

    @property
    def verdict(self) -> Verdict:
        """Whether the side effects are known to be small: green, amber or red, by the usual limits."""
        return self.judge()

    def judge(self, limits: Limits = _LIMITS) -> Verdict:
        """Judge the edit by what changed of what is kept; ``& comparison.judge(limits)`` adds what labels say."""
        kept, held_out = (
            None if effect is None else Changed(effect.changed, effect.items, what, effect.tries, effect.likelihood)
            for effect, what in ((self.kept, "kept answers"), (self.held_out, "held-out answers"))
        )
        return judge_edit(kept, held_out, limits)

    def raise_for_result(self) -> Edit:
        """Return self when the constraint holds, else raise `EditFailed` with the advice."""
        if self.result.held:
            return self
        told = f" {self.reality}." if not self.reality.true else ""
        raise EditFailed(
            f"the edit is {self.result.name} after {self.steps} steps (violation {self.violation:.4g}, "
            f"expected at most 0):{told} {self.result.value}"
        )

    def effects(self) -> dict[str, Any]:
        """Return what is known of side effects as plain values."""
        own = {"kept": self.kept, "held_out": self.held_out}
        return {name: effect and effect.to_json() for name, effect in own.items()}

    def __repr__(self) -> str:
        parts = [self.result.name, f"steps={self.steps}", f"violation={self.violation:.3g}"]
        if self.kept is None:
            parts.append("side effects were not measured")
        else:
            parts.append(f"drift={self.kept.drift:.2g}, changes {self.kept.changed} of {self.kept.items} kept")
        if self.held_out is not None:
            parts.append(f"{self.held_out} held out")
        if not self.reality.true:
            parts.append(str(self.reality))
        if self.patch is not None:
            parts.append(f"{len(self.patch.operations)} tensors, {_size(self.patch.nbytes)}")
        return f"Edit({', '.join(parts)})"


def _size(nbytes: int) -> str:
    return (
        f"{nbytes} B"
        if nbytes < 1000
        else f"{nbytes / 1000:.1f} kB"
        if nbytes < 1_000_000
        else f"{nbytes / 1e6:.1f} MB"
    )
