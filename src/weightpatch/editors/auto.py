"""A ladder that ends well: the first way that holds within a budget, and a gate where none does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from .._calling import outputs, rows
from ..constraints import All, altered
from ..errors import InvalidInput, NotEditable
from ..locality import Locality
from ..network import GATE
from ..problem import Problem
from .base import Attempt, Editor, Solution
from .gate import Gate
from .ladder import ladder
from .metric import Metric
from .minimum_norm import MinimumNorm
from .preconditioned import Preconditioned
from .shrink import Shrink

Rank: TypeAlias = tuple[bool, float, float]  # the lower the better: fails, how much changes, how far it drifts

_KEPT = 64  # kept inputs in each step of an iterative rung; all of them judge what it finds
_ROUNDS = 10  # of least-norm repair: what holds at all, holds after two to five
_SPENT = 0.9  # of a budget for many edits: from here on there is but the last rung
_LATE = 3  # layers before the readout that are tried


@final
@dataclass(frozen=True)
class Budget:
    """What an edit may cost, measured on what is kept.

    Args:
        changed: the share of kept answers that may become others; a loss of accuracy is never larger than this.
        drift: the mean KL(before || after), nats.
        generality: of the altered copies, the share for which the demands have to hold; needs `altered`.
        seconds: once they are spent, what is left of the ladder is its last rung.
    """

    changed: float = 0.005
    drift: float = math.inf
    generality: float = 1.0
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("changed", "drift", "generality", "seconds"):
            value = getattr(self, name)
            if not value >= 0 or (name in ("changed", "generality") and value > 1):
                raise InvalidInput(f"Budget was given {name}={value}; expected at least 0, and shares at most 1")


@final
@dataclass(frozen=True)
class Rung:
    """One way to edit.

    Args:
        name: what it is called in the account of what was tried.
        editor: how.
        parameters: what it may move, as globs, of what the user allows.
        kept: how many of the kept inputs the editor is given, where each costs time at every step; None for all.
    """

    name: str
    editor: Editor
    parameters: tuple[str, ...] = ("*",)
    kept: int | None = None


@final
@dataclass(frozen=True)
class Auto(Editor):
    """Climb rungs until one holds within the budget; each starts from the unedited parameters.

    ``Auto()`` is what `wp.edit` uses where something is kept and no editor is given: the rungs are those of `late`,
    with statistics of what is kept. A rung that holds is judged on what is kept: how many answers became others, and
    how far they drift. Where no rung is within the budget, the one that holds and changes least is taken, and the
    outcome says so.

    Args:
        rungs: in order; when not given, `wp.edit` and `evaluate` make the usual ones, which needs `keep`.
        budget: what an edit may cost.
        altered: makes altered copies of inputs, for which the demands should hold too: they are solved for jointly.

    >>> from weightpatch.tasks.images import altered
    >>> wp.edit(model, fix, Auto(budget=Budget(changed=0.001), altered=altered), keep=keep)
    Edit(satisfied, ...)
    """

    rungs: tuple[Rung, ...] = ()
    budget: Budget = Budget()
    altered: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(rung, Rung) for rung in self.rungs):
            raise InvalidInput(f"Auto was given rungs={self.rungs!r:.80}; expected Rung objects, gentlest first")

    @classmethod
    def late(
        cls,
        metric: Metric | None,
        *,
        gate: str | None = None,
        budget: Budget | None = None,
        altered: Callable[[Any], Any] | None = None,
        count: int = 64,
    ) -> Auto:
        """Return the usual ladder over the last layers of a metric.

        Exact at the last layer; least-norm repair of the three before it, one by one and then together; preconditioned
        gradient descent on these, walked back; RMSProp with KL on everything that may move, walked back; a gate.

        Args:
            metric: of late layers, in the order in which the model calls them; None for a ladder without them.
            gate: the layer of the last rung; without it there is none.
            budget: what an edit may cost.
            altered: makes altered copies of inputs.
            count: how many keys the gate has room for.
        """
        rungs = [] if metric is None else _late(metric)
        rungs.append(Rung("RMSProp with KL", ladder(100.0), kept=_KEPT))
        rungs += [] if gate is None else [Rung(f"gate at {gate}", Gate(gate, count))]
        return cls(tuple(rungs), budget or Budget(), altered)

    def __repr__(self) -> str:
        shown = [repr(self.budget), *(rung.name for rung in self.rungs)]
        return f"Auto({'; '.join(shown)})"

    @property
    def slots(self) -> Mapping[str, int]:
        """What its rungs need."""
        return {layer: count for rung in self.rungs for layer, count in rung.editor.slots.items()}

    def run(self, problem: Problem) -> Solution:
        """Return the first solution within the budget, with an account of all that was tried."""
        if not self.rungs:
            raise InvalidInput("Auto() is completed by wp.edit and evaluate alone; elsewhere use Auto.late(metric)")
        asked = problem
        if self.altered is not None:
            asked = replace(problem, constraint=All((problem.constraint, altered(problem.constraint, self.altered))))
        began, tried, steps, spent = time.perf_counter(), list[Attempt](), 0, self._spent(problem)
        best, least = Solution(problem.start, 0), (True, math.inf, math.inf)
        for place, rung in enumerate(self.rungs):
            skipped = (spent or time.perf_counter() - began >= self.budget.seconds) and place < len(self.rungs) - 1
            climbed = None if skipped else self._climbed(rung, asked)
            if climbed is None:
                continue
            attempt, rank, found = climbed
            tried.append(attempt)
            steps += attempt.steps
            if attempt.within or rank < least:
                best, least = found, rank
            if attempt.within:
                break
        return replace(best, steps=steps, attempts=tuple(tried), within=bool(tried) and tried[-1].within)

    @torch.no_grad()
    def _spent(self, problem: Problem) -> bool:
        """Say whether earlier edits have used up what all of them together may change."""
        if problem.keep is None or problem.keep.answers is None:
            return False
        changed = _changed(problem.keep, outputs(problem.at(problem.start), problem.keep.inputs))
        return changed > 0 and changed >= _SPENT * self.budget.changed

    def _climbed(self, rung: Rung, problem: Problem) -> tuple[Attempt, Rank, Solution] | None:
        """Return what one rung comes to; None where it has nothing to move."""
        gates = tuple(f"{layer}.{GATE}.*" for layer in rung.editor.slots)
        names = [n for n in problem.start if any(fnmatchcase(n, pattern) for pattern in gates or rung.parameters)]
        names = [name for name in names if gates or f".{GATE}." not in name]
        if not names:
            return None
        part, began = problem.part(names), time.perf_counter()
        try:
            found = rung.editor.run(_fewer(part, rung.kept))
        except NotEditable:  # the answers that are asked about do not depend on this layer
            return None
        attempt, rank = self._judged(rung.name, part, found, time.perf_counter() - began)
        return attempt, rank, replace(found, params={**problem.start, **found.params})

    @torch.no_grad()
    def _judged(self, name: str, problem: Problem, found: Solution, seconds: float) -> tuple[Attempt, Rank]:
        keep, function, budget = problem.keep, problem.at(found.params), self.budget
        violation = problem.violation(found.params)
        changed, drift, generality = None, None, None
        if self.altered is not None:  # all demands, and then their copies
            assert isinstance(problem.constraint, All)
            own, copies = problem.constraint.parts
            violation, generality = own.violation(function), float(copies.met(function).double().mean())
        worst = float(violation.max())
        held = worst <= 0
        if keep is not None:
            before = outputs(problem.at(problem.start), keep.inputs) if keep.answers is None else keep.answers
            after = outputs(function, keep.inputs)
            changed = _changed(keep, after, before)
            drift = float(keep.drift(lambda *_, **__: before, lambda *_, **__: after))
        limits = ((changed, budget.changed), (drift, budget.drift))
        within = held and all(value is None or value <= limit for value, limit in limits)
        within = within and (generality is None or generality >= budget.generality)
        attempt = Attempt(name, held, within, changed, drift, generality, found.steps, seconds)
        return attempt, (not held, (changed or 0.0) if held else worst, drift or 0.0)


def _changed(keep: Locality, after: Tensor, before: Tensor | None = None) -> float:
    before = keep.answers if before is None else before
    assert before is not None
    other = before.argmax(-1) != after.argmax(-1)
    return float((other if keep.mask is None else other[keep.mask]).double().mean())


def _fewer(problem: Problem, kept: int | None) -> Problem:
    keep = problem.keep
    if kept is None or keep is None:
        return problem
    mask, answers = (None if part is None else part[:kept] for part in (keep.mask, keep.answers))
    some = Locality(rows(keep.inputs, slice(kept)), mask, answers)
    return replace(problem, keep=some)


def _late(metric: Metric) -> list[Rung]:
    *before, last = list(metric.layers)
    before, exact = before[-_LATE:][::-1], MinimumNorm(metric=metric, max_steps=_ROUNDS)
    readout = tuple(name for name in (last, metric.layers[last].bias) if name)
    rungs = [Rung(f"{last}, exact", exact, readout)]
    rungs += [Rung(f"{name}, least norm", exact, (name,)) for name in before]
    if before:
        shown = f"{len(before)} layers up to {before[0]}"
        rungs += [Rung(f"{shown}, least norm", exact, tuple(before))] if len(before) > 1 else []
        descent = Shrink(Preconditioned(metric=metric, max_steps=40))
        rungs.append(Rung(f"{shown}, preconditioned", descent, tuple(before)))
    return rungs
