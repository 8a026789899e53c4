"""The facts that come with weightpatch."""

from __future__ import annotations

from importlib.resources import as_file, files

from weightpatch.tasks.language._facts import Fact
from weightpatch.tasks.language._formats import CounterFact
from weightpatch.tasks.language._records import read

__all__ = ["shipped_facts"]


def shipped_facts() -> tuple[Fact, ...]:
    """Return the 124 facts of the demonstrations: general knowledge, with targets that are false on purpose.

    Ten relations, as the country of a city or the maker of a product; every subject is edited once, and none is the
    subject of a neighbour. Two paraphrases, three neighbours and one prompt to continue a fact. Written by
    ``scripts/facts.py``; the file is CounterFact's JSON.
    """
    with as_file(files("weightpatch.tasks.language") / "shipped" / "facts.json") as path:
        return read(path, CounterFact())
