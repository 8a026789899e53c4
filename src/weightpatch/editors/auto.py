"""Automatic selection: the first editor whose edit holds within a budget, a gate where none does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, final

import torch

from ..constraints import All, altered
from ..effects import Effect
from ..errors import InvalidInput, NotEditable
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
    """What an edit may cost, measured on kept items that no part of the search has seen.

    Args:
        changed: the share of these items whose answer may become another one; a loss of accuracy is never larger.
        drift: the mean KL(before || after) on them, nats.
        generality: of the altered copies, the share for which the demands have to hold; needs `altered`.
        seconds: once they are spent a search ends with what it has, and of the rungs only gates are left.
        certain: hold the 95 % upper bound of the share to `changed`, not the share that was seen: with few kept items
            then no edit is within the budget (0 of 200 is at most 1.5 %).
    """

    changed: float = 0.005
    drift: float = math.inf
    generality: float = 1.0
    seconds: float = 30.0
    certain: bool = False

    def __post_init__(self) -> None:
        for name in ("changed", "drift", "generality", "seconds"):
            value = getattr(self, name)
            if not value >= 0 or (name in ("changed", "generality") and value > 1):
                raise InvalidInput(f"Budget was given {name}={value}; expected at least 0, and shares at most 1")

    def allows(self, effect: Effect) -> bool:
        """Say whether an effect is within the budget."""
        share = effect.upper if self.certain else effect.share
        return share <= self.changed and effect.drift <= self.drift


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
    with statistics of one half of what is kept. A rung that holds is judged on the other half, which it has not seen:
    how many items answer otherwise, and how far predictions drift. Where no rung is within the budget, the one that
    holds and changes least is taken, and the outcome says so.

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
        gradient descent on these, walked back; a gate; and, where that does not do, the slowest: RMSProp with KL on
        everything that may move, walked back.

        Args:
            metric: of late layers, in the order in which the model calls them; None for a ladder without them.
            gate: the layer of a gate; without it there is none.
            budget: what an edit may cost.
            altered: makes altered copies of inputs.
            count: how many keys the gate has room for.
        """
        rungs = [] if metric is None else _late(metric)
        rungs += [] if gate is None else [Rung(f"gate at {gate}", Gate(gate, count))]
        rungs.append(Rung("RMSProp with KL", ladder(100.0), kept=_KEPT))
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
        deadline = time.perf_counter() + self.budget.seconds
        tried, steps, spent = list[Attempt](), 0, self._spent(problem)
        best, least = Solution(problem.start, 0), (True, math.inf, math.inf)
        for rung in self.rungs:
            sure = isinstance(rung.editor, Gate)
            if not sure and (spent or time.perf_counter() >= deadline):
                continue
            climbed = self._climbed(rung, replace(asked, deadline=math.inf if sure else deadline), len(tried) + 1)
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

    def settled(self, problem: Problem, solution: Solution) -> Solution:
        """Return the solution as the rungs ship it."""
        for rung in self.rungs:
            solution = rung.editor.settled(problem, solution)
        return solution

    @torch.no_grad()
    def _spent(self, problem: Problem) -> bool:
        """Say whether earlier edits have used up what all of them together may change."""
        if problem.keep is None or problem.keep.answers is None:
            return False
        figure = problem.judged or problem.kept
        assert figure is not None
        changed = figure.effect(problem.at(problem.start)).share
        return changed > 0 and changed >= _SPENT * self.budget.changed

    def _climbed(self, rung: Rung, problem: Problem, tries: int) -> tuple[Attempt, Rank, Solution] | None:
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
        attempt, rank = self._judged(rung.name, part, found, time.perf_counter() - began, tries)
        return attempt, rank, replace(found, params={**problem.start, **found.params})

    @torch.no_grad()
    def _judged(self, name: str, problem: Problem, found: Solution, seconds: float, tries: int) -> tuple[Attempt, Rank]:
        function, budget = problem.at(found.params), self.budget
        violation, generality = problem.violation(found.params), None
        if self.altered is not None:  # all demands, and then their copies
            assert isinstance(problem.constraint, All)
            own, copies = problem.constraint.parts
            violation, generality = own.violation(function), float(copies.met(function).double().mean())
        worst = float(violation.max())
        held = worst <= 0
        kept, held_out = (None if effect is None else effect.after(tries) for effect in problem.effects(found.params))
        figure = held_out or kept
        within = held and (figure is None or budget.allows(figure))
        within = within and (generality is None or generality >= budget.generality)
        attempt = Attempt(name, held, within, kept, held_out, generality, found.steps, seconds)
        share, drift = (0.0, 0.0) if figure is None else (figure.share, figure.drift)
        return attempt, (not held, share if held else worst, drift)


def _fewer(problem: Problem, kept: int | None) -> Problem:
    return problem if kept is None or problem.keep is None else replace(problem, keep=problem.keep.take(kept))


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
