"""The demands of an edit, one by one: what the model answered before, and what it answers after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..._calling import Function, Inputs, leaves, outputs, rows
from ...constraints import Classified, Constraint
from ._pictures import Image, Picture, default_picture, draw
from ._words import Names

__all__ = ["Bar", "Demand", "Mistake", "demands", "find_rows", "mistakes"]

_BARS = 5
_PROBES = 16
_LEAST = 0.005  # a bar that nobody would see says nothing


@final
@dataclass(frozen=True)
class Demand:
    """What one kind of constraint asks, summed up: how many demands it makes, and how many were and are met."""

    kind: str
    asked: int
    met_before: int
    met_after: int
    slack_before: float
    slack_after: float


@final
@dataclass(frozen=True)
class Bar:
    """One class's probability, before and after."""

    name: str
    before: float
    after: float
    wanted: bool


@final
@dataclass(frozen=True)
class Mistake:
    """One input that should be of another class; margins are logits of the wanted class above the best other one."""

    was: str
    now: str
    wanted: str
    asked: float
    margin_before: float
    margin_after: float
    met: bool
    row: int | None
    bars: tuple[Bar, ...]
    picture: Image | None


def demands(constraint: Constraint, bound: Constraint, before: Function, after: Function) -> list[Demand]:
    """Sum up each part of a constraint, as it was asked and as it was bound; `slack` is the least of its demands."""
    found = []
    with torch.no_grad():
        for asked, part in zip(constraint.conjuncts, bound.conjuncts, strict=False):
            a, b = part.violation(before), part.violation(after)
            met = [int((v <= 0).sum()) for v in (a, b)]
            found.append(Demand(asked.kind, len(a), met[0], met[1], -float(a.max()), -float(b.max())))
    return found


def mistakes(
    constraint: Constraint,
    before: Function,
    after: Function,
    classes: Names,
    picture: Picture | None,
    test: Inputs,
    most: int,
) -> tuple[list[Mistake], list[int]]:
    """Return the demands on classes that did not hold before, at most so many, and their rows in the test set."""
    found: list[Mistake] = []
    asked: list[int] = []
    for part in constraint.conjuncts:
        if not isinstance(part, Classified):
            continue
        look = picture or _as_in(test, part.inputs)
        with torch.no_grad():
            logits = [outputs(function, part.inputs).cpu() for function in (before, after)]
            met = [(part.violation(function) <= 0).tolist() for function in (before, after)]
        for i in (i for i, fine in enumerate(met[0]) if not fine):
            same = find_rows(test, rows(part.inputs, slice(i, i + 1)))
            asked += same
            if len(found) < most:
                image, row = draw(look, part.inputs, i), same[0] if same else None
                found.append(_mistake(part, i, logits, met[1][i], classes, image, row))
    return found, asked


def find_rows(test: Inputs, item: Inputs) -> list[int]:
    """Find one item, given as a batch of 1, in a test set, bit for bit."""
    pairs = list(zip(leaves(test), leaves(item), strict=False))
    if not pairs or any(a.shape[1:] != b.shape[1:] or a.dtype != b.dtype or not a.ndim for a, b in pairs):
        return []
    chosen = torch.arange(len(pairs[0][0]), device="cpu")
    for many, one in pairs:
        flat, wanted = many.reshape(len(many), -1), one.to(many.device).reshape(1, -1)
        some = torch.linspace(0, flat.shape[1] - 1, _PROBES, device=flat.device).long()
        # Few rows survive a look at some of their numbers, so that only few are compared whole
        chosen = chosen[(flat[:, some][chosen] == wanted[:, some]).all(1).cpu()]
        chosen = chosen[(flat[chosen] == wanted).all(1).cpu()]
    found: list[int] = chosen.tolist()
    return found


def _as_in(test: Inputs, inputs: Inputs) -> Picture | None:
    """Draw a mistake on the scale of the whole test set, which a single picture does not show."""
    alike = isinstance(test, Tensor) and isinstance(inputs, Tensor) and test.shape[1:] == inputs.shape[1:]
    return default_picture(test if alike else inputs)


def _mistake(
    part: Classified, i: int, logits: list[Tensor], met: bool, classes: Names, image: Image | None, row: int | None
) -> Mistake:
    wanted = int(part.labels[i])
    before, after = (z[i].softmax(0).nan_to_num(0.0) for z in logits)
    margins = [_margin(z[i], wanted) for z in logits]
    # The classes that matter most on either side, and always the wanted one, in the order of today's probabilities
    rank = torch.maximum(before, after)
    rank[[wanted, _answer(logits[0][i]), _answer(logits[1][i])]] = torch.inf
    shown = rank.topk(min(_BARS, len(rank))).indices
    shown = shown[rank[shown] >= _LEAST]
    ordered = shown[before[shown].argsort(descending=True, stable=True)].tolist()
    return Mistake(
        was=classes[_answer(logits[0][i])],
        now=classes[_answer(logits[1][i])],
        wanted=classes[wanted],
        asked=part.margin,
        margin_before=margins[0],
        margin_after=margins[1],
        met=met,
        row=row,
        bars=tuple(Bar(classes[c], float(before[c]), float(after[c]), c == wanted) for c in ordered),
        picture=image,
    )


def _answer(logits: Tensor) -> int:
    return -1 if bool(logits.isnan().any()) else int(logits.argmax())


def _margin(logits: Tensor, wanted: int) -> float:
    others = torch.cat([logits[:wanted], logits[wanted + 1 :]])
    return float(logits[wanted] - others.max())
