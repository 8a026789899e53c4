"""Sentences as a page shows them: the demands of an edit, and the answers that changed, word by word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from ..._calling import Function, Name
from ...constraints import Classified, Constraint, Preferred, Says
from ...errors import InvalidInput
from ..differences import Span, differences
from ..sentences import Answering, SentenceComparison

__all__ = ["Line", "Saying", "Sentences", "sayings", "sentences"]

_LINES = 40
_EQUAL = 0.05  # points of a score that are no gain and no loss


@final
@dataclass(frozen=True)
class Saying:
    """One text that should be answered otherwise."""

    text: str
    wanted: str
    before: str
    after: str
    spans: tuple[Span, ...]
    slack_before: float
    slack_after: float
    met: bool


@final
@dataclass(frozen=True)
class Line:
    """One answer that changed; `asked` marks a text that the edit was about."""

    kind: str
    item: Name
    text: str
    spans: tuple[Span, ...]
    reference: str | None
    scores: tuple[float, float] | None
    kl: float
    asked: bool


@final
@dataclass(frozen=True, eq=False)
class Sentences:
    """The whole section: the comparison, the worst lines, how many more, and how many of each kind."""

    comparison: SentenceComparison
    lines: tuple[Line, ...]
    more: int
    worse: int
    better: int
    equal: int
    asked: int


def sentences(comparison: SentenceComparison, asked: Sequence[str] = ()) -> Sentences:
    """Collect what the section shows; `asked` are the texts that the edit itself was about."""
    lines = [_line(comparison, row, comparison.texts[row] in asked) for row in comparison.changed]
    kinds = [line.kind for line in lines]
    return Sentences(
        comparison,
        tuple(lines[:_LINES]),
        max(0, len(lines) - _LINES),
        kinds.count("broken"),
        kinds.count("repaired"),
        kinds.count("other"),
        sum(line.asked for line in lines),
    )


def sayings(
    kind: Answering, constraint: Constraint, after: nn.Module, before: nn.Module, texts: Sequence[str]
) -> list[Saying]:
    """Return every text that is asked for an answer, with those before and after.

    Args:
        kind: the model.
        constraint: what was asked.
        after: the model with the patch.
        before: the model without.
        texts: those that the demands are about, in order; read from their tokens where there are none.
    """
    asked = list(_asked(kind, constraint, before, after))
    if texts and len(texts) != len(asked):
        raise InvalidInput(
            f"given were {len(texts)} sources, and {constraint.kind} is about {len(asked)} texts; expected as many"
        )
    found = []
    for place, (tokens, wanted, old, new) in enumerate(asked):
        if not texts and tokens is None:
            raise InvalidInput(f"the texts of {constraint.kind} cannot be read from it; pass sources=")
        text = texts[place] if texts or tokens is None else kind.text(tokens)
        was, now = (kind.text(kind.generate([text], model)[0]) for model in (before, after))
        found.append(Saying(text, kind.text(wanted), was, now, differences(was, now), old, new, new >= 0))
    return found


def _asked(
    kind: Answering, constraint: Constraint, before: Function, after: Function
) -> Iterator[tuple[Tensor | None, Tensor, float, float]]:
    """Yield the source's tokens, the wanted ones, and the slack before and after, of each demand on a text."""
    for part in constraint.conjuncts:
        if not isinstance(part, (Says, Preferred, Classified)):
            continue
        slack = [-part.violation(function).detach().float().cpu() for function in (before, after)]
        if isinstance(part, Classified):
            for label, *pair in zip(part.labels, *(values.tolist() for values in slack), strict=True):
                yield None, label[None], *pair
        else:
            wanted = part.answer if isinstance(part, Says) else part.target
            ids = part.source.get("input_ids")
            tokens = ids[0] if isinstance(ids, torch.Tensor) else None
            yield tokens, wanted, float(slack[0].min()), float(slack[1].min())


def _line(comparison: SentenceComparison, row: int, asked: bool) -> Line:
    pair = comparison.scored(row)
    loss = 0.0 if pair is None else pair[0] - pair[1]
    return Line(
        kind="broken" if loss > _EQUAL else "repaired" if loss < -_EQUAL else "other",
        item=comparison.name(row),
        text=comparison.texts[row],
        spans=differences(comparison.before[row], comparison.after[row]),
        reference=None if comparison.references is None else comparison.references[row],
        scores=pair,
        kl=comparison.kl[row],
        asked=asked,
    )
