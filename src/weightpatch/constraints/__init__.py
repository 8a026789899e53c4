"""What must hold: constraints l_e with one number per demand, met where it is at most 0.

A constraint knows any callable from inputs to outputs, never parameters or editors. To make one, subclass `Constraint`
and write `violation`, differentiable in what the function returns; `register` has patches remember it.
"""

from __future__ import annotations

from ._base import All, Ask, Constraint, Piece, altered, check_consistent
from ._demands import IGNORED, Classified, Kept, Tagged, Within
from ._recording import packed, register, restored, unpacked
from ._sequences import CausalFrame, Frame, Preferred, Says, Seq2SeqFrame, token_scores

__all__ = [  # noqa: RUF022 - as `sorted` does it
    "All",
    "Ask",
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
    "Tagged",
    "Within",
    "altered",
    "check_consistent",
    "packed",
    "register",
    "restored",
    "token_scores",
    "unpacked",
]

register("weightpatch/classified", 1, Classified)
register("weightpatch/tagged", 1, Tagged)
register("weightpatch/within", 1, Within)
register("weightpatch/says", 1, Says)
register("weightpatch/preferred", 1, Preferred)
