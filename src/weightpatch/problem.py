"""All that an editor sees of a model, a constraint and what should stay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from ._calling import Function, Inputs, Params
from .constraints import Constraint
from .effects import Effect
from .errors import InvalidInput
from .locality import Locality

__all__ = ["Problem"]


@final
@dataclass(frozen=True, eq=False)
class Problem:
    """The parameters that may move, and what is asked of them; built by the driver, read by editors.

    Attributes:
        start: the unedited parameters by name, float32 or float64.
        at: the model with other parameters, as a function of inputs; differentiable in them.
        constraint: what must hold, already bound to today's answers.
        keep: what should stay, as far as a search may see it, or None.
        judge: what a search is judged on and does not see; None where there are too few items.
        narrow: the model with some of these parameters, given their names: a faster `at` for fewer; or None.
        given: what a layer with slots is given by the unedited model for a batch, kept from edit to edit; or None.
        deadline: when a search ends with what it has, by `time.perf_counter`.
    """

    start: Params
    at: Callable[[Params], Function]
    constraint: Constraint
    keep: Locality | None = None
    judge: Locality | None = None
    narrow: Callable[[Sequence[str]], Callable[[Params], Function]] | None = None
    given: Callable[[str, Inputs], Tensor] | None = None
    deadline: float = math.inf

    def part(self, names: Sequence[str], start: Params | None = None) -> Problem:
        """Return the problem in which only some parameters may move.

        Args:
            names: those that may move.
            start: where all parameters are; `self.start` when not given.
        """
        whole = self.start if start is None else start
        free = {name: whole[name] for name in names}
        if start is None and self.narrow is not None:
            return replace(self, start=free, at=self.narrow(names))
        return replace(self, start=free, at=lambda params: self.at({**whole, **params}), narrow=None, given=None)

    def violation(self, params: Params) -> Tensor:
        """Return l_e(params), one number per demand, shape (n,)."""
        return self.constraint.violation(self.at(params))

    def worst(self, params: Params) -> float:
        """Return the largest violation; NaN when any demand is NaN."""
        with torch.no_grad():
            return float(self.violation(params).max())

    def solved(self, params: Params) -> bool:
        """Say whether every demand holds."""
        return self.worst(params) <= 0

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return time.perf_counter() >= self.deadline

    def drift(self, params: Params) -> Tensor:
        """Return how far predictions move on `keep`, a scalar in nats, differentiable in params."""
        if self.kept is None:
            raise InvalidInput("keep_weight needs something to keep; pass keep=wp.Locality(inputs)")
        return self.kept.drift(self.at(self.start), self.at(params))

    @cached_property
    def kept(self) -> Locality | None:
        """What is kept, with the answers of the unedited model, which is asked once."""
        return None if self.keep is None else self.keep.bind(self.at(self.start))

    @cached_property
    def judged(self) -> Locality | None:
        """What is judged on, likewise."""
        return None if self.judge is None else self.judge.bind(self.at(self.start))

    def effects(self, params: Params) -> tuple[Effect | None, Effect | None]:
        """Return what params change on `keep`, and on `judge`; None where there is none."""
        after = self.at(params)
        seen = self.keep.between(self.at(self.start), after) if self.keep and self.keep.large else None
        unseen = self.judge.between(self.at(self.start), after) if self.judge and self.judge.large else None
        if seen is None and self.kept is not None:
            seen = self.kept.effect(after)
        if unseen is None and self.judged is not None:
            unseen = self.judged.effect(after)
        return seen, unseen

    def distance(self, params: Params) -> Tensor:
        """Return ½ ||params - start||², a scalar."""
        return 0.5 * torch.stack([(p - self.start[name]).square().sum() for name, p in params.items()]).sum()
