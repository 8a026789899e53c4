"""What one edit of Editable Training is asked, and how a constraint's inputs are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from ..constraints import Constraint
from ..errors import InvalidInput

__all__ = ["Episode"]


@final
@dataclass(frozen=True, eq=False)
class Episode:
    """One edit l_e ~ p(l_e) that Editable Training tries out.

    Args:
        constraint: what the editor is asked; its demands are solved jointly.
        also: what the edited network is asked in addition, of which the editor knows nothing: altered copies of the
            constraint's inputs, as a rule. It is the generality term's.
    """

    constraint: Constraint
    also: Constraint | None = None

    def __post_init__(self) -> None:
        for name in ("constraint", "also"):
            value = getattr(self, name)
            if not isinstance(value, Constraint) and not (name == "also" and value is None):
                raise InvalidInput(
                    f"Episode was given {name}={type(value).__name__}; expected a constraint such as "
                    "weightpatch.constraints.Classified(inputs, labels)"
                )

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """All that is asked."""
        return (self.constraint,) if self.also is None else (self.constraint, self.also)


def episodes_of(given: Constraint | Episode | Sequence[Constraint | Episode]) -> tuple[Episode, ...]:
    """Read one constraint or several.

    Raises:
        InvalidInput: there is none, or something is not a constraint.
    """
    several: Sequence[Any] = (given,) if isinstance(given, (Constraint, Episode)) else given
    if not isinstance(several, Sequence) or not several:
        raise InvalidInput(
            f"EditableObjective was given {given!r:.80} as constraints; expected at least one; "
            "does the sampler yield any?"
        )
    return tuple(item if isinstance(item, Episode) else Episode(item) for item in several)
