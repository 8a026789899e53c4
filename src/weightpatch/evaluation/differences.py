"""How two answers in words differ: what was lost, what is new, and what share of the words that is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal, final

__all__ = ["Span", "differences", "distance"]

# Scripts without spaces between words are compared character by character
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORDS = re.compile(rf"\s+|[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")


@final
@dataclass(frozen=True)
class Span:
    """A stretch of text: in both answers, in the one before alone, or in the one after alone."""

    kind: Literal["same", "lost", "new"]
    text: str


def differences(before: str, after: str) -> tuple[Span, ...]:
    """Return the least change of words that makes `after` of `before`, in order; the lost before the new.

    The spans that are not new join to `before`, and those that are not lost to `after`, character for character.
    """
    a, b = _WORDS.findall(before), _WORDS.findall(after)
    found: list[tuple[str, str, str]] = []  # same, lost, new: the first, or one or both of the others
    for tag, i, j, k, end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = "".join(a[i:j]), "".join(b[k:end])
        if tag != "equal":
            found.append(("", old, new))
        elif found and old.isspace() and j < len(a) and end < len(b):  # a space between two changes joins them
            found.append(("", old, old))
        else:
            found.append((old, "", ""))
    return tuple(_joined(found))


def distance(before: str, after: str) -> float:
    """Return how far two answers are apart, from 0 (equal) to 1 (no word in common), spaces aside."""
    a, b = ([word for word in _WORDS.findall(text) if not word.isspace()] for text in (before, after))
    return 0.0 if a == b else 1.0 - SequenceMatcher(None, a, b, autojunk=False).ratio()


def _joined(found: Sequence[tuple[str, str, str]]) -> list[Span]:
    spans: list[Span] = []
    lost = new = ""
    for same, old, fresh in (*found, ("", "", "")):
        if not same and (old or fresh):
            lost, new = lost + old, new + fresh
            continue
        spans += [Span("lost", lost)] if lost else []
        spans += [Span("new", new)] if new else []
        lost = new = ""
        spans += [Span("same", same)] if same else []
    return spans
