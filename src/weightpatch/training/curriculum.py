"""How many steps an edit may take, as training goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from ..errors import InvalidInput
from .objective import EditableObjective

__all__ = ["Ramp"]


@final
@dataclass(frozen=True)
class Ramp:
    """k grows linearly: ``k(t) = start + (end - start) min(1, t / steps)``, rounded.

    Args:
        start: k at step 0; at least 1.
        end: k from step `steps` on; at least 1.
        steps: how many training steps that takes; at least 1.

    >>> [Ramp(1, 5, 100)(step) for step in (0, 50, 100, 1000)]
    [1, 3, 5, 5]
    """

    start: int
    end: int
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(f"Ramp was given {name}={value!r}; expected an integer, at least 1")

    def __call__(self, step: int) -> int:
        """Return k at one training step."""
        return round(self.start + (self.end - self.start) * min(1.0, step / self.steps))


def set_steps(objective: EditableObjective, k: int) -> None:
    """Let edits take at most k steps from now on.

    Raises:
        InvalidInput: k is not an integer of at least 1.
    """
    if not isinstance(k, int) or k < 1:
        raise InvalidInput(f"the curriculum returned k={k!r}; expected an integer, at least 1")
    if objective.editor.max_steps != k:
        objective.editor = replace(objective.editor, max_steps=k)
