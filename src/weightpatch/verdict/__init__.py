"""Whether an edit may be shipped: one value, its reasons, what could not be tested, and what would settle it."""

from ._answers import Changed, Paired, judge_answers, judge_edit, judge_score
from ._numbers import judge_losses
from ._several import Several
from ._value import Level, Limits, Verdict

__all__ = [
    "Changed",
    "Level",
    "Limits",
    "Paired",
    "Several",
    "Verdict",
    "judge_answers",
    "judge_edit",
    "judge_losses",
    "judge_score",
]
