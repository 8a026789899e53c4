"""Try editors in turn until one succeeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from ..errors import InvalidInput
from ..problem import Problem
from .base import Editor, Solution


@final
@dataclass(frozen=True)
class Retry(Editor):
    """Run the editors in turn, each from the start, until one meets the constraint; else the least violated answer.

    The steps of all attempts are counted.

    Args:
        editors: the editors, gentlest first.
    """

    editors: tuple[Editor, ...]

    def __post_init__(self) -> None:
        if not self.editors:
            raise InvalidInput("Retry was given no editors; expected at least one, gentlest first")

    def run(self, problem: Problem) -> Solution:
        """Return the first solution that holds."""
        best, least, steps = problem.start, math.inf, 0
        for editor in self.editors:
            if problem.expired and steps:
                break
            found = editor.run(problem)
            steps += found.steps
            worst = problem.worst(found.params)
            if worst <= 0:
                return Solution(found.params, steps)
            if worst < least:  # never true for NaN
                best, least = found.params, worst
        return Solution(best, steps)
