"""Walk an edit back to the smallest step that still holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from .._calling import Params
from ..errors import InvalidInput
from ..problem import Problem
from .base import Editor, Solution


@final
@dataclass(frozen=True)
class Shrink(Editor):
    """Bisect ``θ(t) = θ_start + t (θ̂ - θ_start)`` for the smallest t in (0, 1] at which the constraint still holds.

    The upper end of the interval holds at every moment, so a solved edit stays solved; where the constraint holds on
    several intervals of t, one of their lower ends is found. An edit that is not solved, or that made no step, is
    returned as it is.

    Args:
        editor: the editor whose answer is shrunk.
        halvings: how often the interval is halved: t is found to 2^-halvings, at one forward pass each.
    """

    editor: Editor
    halvings: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.halvings, int) or self.halvings < 0:
            raise InvalidInput(f"Shrink was given halvings={self.halvings!r}; expected an integer, at least 0")

    def run(self, problem: Problem) -> Solution:
        """Return the shrunk solution of the wrapped editor."""
        found = self.editor.run(problem)
        if found.steps == 0 or not problem.solved(found.params):
            return found
        best, low, high = found.params, 0.0, 1.0
        for _ in range(self.halvings):
            if problem.expired:
                break
            middle = (low + high) / 2
            candidate = between(problem.start, found.params, middle)
            if problem.solved(candidate):
                best, high = candidate, middle
            else:
                low = middle
        return Solution(best, found.steps)


def between(start: Params, end: Params, t: float) -> Params:
    """Return the parameters a share t of the way from start to end."""
    return {name: torch.lerp(p, end[name], t) for name, p in start.items()}
