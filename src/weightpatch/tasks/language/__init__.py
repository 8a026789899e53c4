"""Language: facts to edit, read from and written to the record files of the field, and edits of them judged.

Importing this package does not import torch; what judges edits is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightpatch.tasks.language._facts import Fact, Question
from weightpatch.tasks.language._formats import CounterFact, Format, KiltZsRE, KnowEdit, ZsRE
from weightpatch.tasks.language._records import read, write
from weightpatch.tasks.language._shipped import shipped_facts

if TYPE_CHECKING:
    from weightpatch.tasks.language._evaluation import FactsReport, FactsRow, evaluate_facts
    from weightpatch.tasks.language._judging import Share, Unedited, unedited
    from weightpatch.tasks.language._measures import demand, ngram_entropy, perplexity, subject_position

__all__ = [
    "CounterFact",
    "Fact",
    "FactsReport",
    "FactsRow",
    "Format",
    "KiltZsRE",
    "KnowEdit",
    "Question",
    "Share",
    "Unedited",
    "ZsRE",
    "demand",
    "evaluate_facts",
    "ngram_entropy",
    "perplexity",
    "read",
    "shipped_facts",
    "subject_position",
    "unedited",
    "write",
]

_HOMES = {
    "_evaluation": ("FactsReport", "FactsRow", "evaluate_facts"),
    "_judging": ("Share", "Unedited", "unedited"),
    "_measures": ("demand", "ngram_entropy", "perplexity", "subject_position"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
