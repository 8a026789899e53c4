"""Judging edits: what a set of them does to a test set, and what one changes item by item."""

from .comparison import Comparison, compare, predict
from .curve import Curve, curve
from .driver import evaluate
from .figures import figures
from .kinds import GroupChange
from .metrics import Estimate, Flips
from .pages import comparison_page, edit_page, sentence_comparison_page, sentence_page
from .protocols import Independent, Protocol, Sequential
from .report import Checkpoint, Impact, Report, Row, Summary
from .scoring import Scoring, translated, verbatim
from .sentences import Answering, SentenceComparison, compare_sentences, patched
from .slices import counted, slices

__all__ = [
    "Answering",
    "Checkpoint",
    "Comparison",
    "Curve",
    "Estimate",
    "Flips",
    "GroupChange",
    "Impact",
    "Independent",
    "Protocol",
    "Report",
    "Row",
    "Scoring",
    "SentenceComparison",
    "Sequential",
    "Summary",
    "compare",
    "compare_sentences",
    "comparison_page",
    "counted",
    "curve",
    "edit_page",
    "evaluate",
    "figures",
    "patched",
    "predict",
    "sentence_comparison_page",
    "sentence_page",
    "slices",
    "translated",
    "verbatim",
]
