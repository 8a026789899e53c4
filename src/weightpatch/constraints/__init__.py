"""What must hold: constraints l_e with one number per demand, met where it is at most 0.

A constraint knows any callable from inputs to outputs, never parameters or editors. To make one, subclass `Constraint`
and write `violation`, differentiable in what the function returns.
"""

from __future__ import annotations

from ._demands import All, Classified, Constraint, Kept, Piece, Within, altered, check_consistent
from ._sequences import IGNORED, CausalFrame, Frame, Preferred, Says, Seq2SeqFrame, token_scores

__all__ = [  # noqa: RUF022 - as `sorted` does it
    "All",
    "CausalFrame",
    "Classified",
    "Constraint",
    "Frame",
    "IGNORED",
    "Kept",
    "Piece",
    "Preferred",
    "Says",
    "Seq2SeqFrame",
    "Within",
    "altered",
    "check_consistent",
    "token_scores",
]
