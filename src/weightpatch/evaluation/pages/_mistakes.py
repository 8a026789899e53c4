"""The demands of an edit, one by one: what the model answered before, and what it answers after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..._calling import Function, Inputs, Name, check_names, leaves, length, outputs, rows
from ...constraints import Classified, Constraint, Tagged, Within
from ._pictures import Image, Picture, default_picture, draw
from ._words import Names, number

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
    """One class's or tag's probability before and after, or an output's value, where `share` is false."""

    name: str
    before: float
    after: float
    wanted: bool
    share: bool = True
    right: float | None = None


@final
@dataclass(frozen=True)
class Mistake:
    """One input whose answer should be another.

    Attributes:
        was: the answer before.
        now: the answer after.
        wanted: what is asked.
        measure: what the margins are: of logits, or the distance of numbers from their target.
        asked: how large it should be, in words.
        margin_before: by how much the wanted class or tags lead, in logits; or the distance.
        margin_after: the same after.
        met: whether the demand holds.
        row: the input's place in the test set.
        item: what the input is called where it came from.
        bars: what answers are made of.
        picture: of the input.
    """

    was: str
    now: str
    wanted: str
    measure: str
    asked: str
    margin_before: float
    margin_after: float
    met: bool
    row: int | None
    item: Name | None
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
    names: Sequence[Name] | None = None,
) -> tuple[list[Mistake], list[int]]:
    """Return the demands on single answers that did not hold before, at most so many, and their test items.

    `names` are those of the inputs of all such demands, in order.
    """
    found: list[Mistake] = []
    asked: list[int] = []
    about = [part for part in constraint.conjuncts if isinstance(part, (Classified, Tagged, Within))]
    check_names(names, sum(length(part.inputs) for part in about), "inputs of the constraint")
    left = None if names is None else iter(names)
    for part in about:
        called = [None if left is None else next(left) for _ in range(length(part.inputs))]
        look = picture or _as_in(test, part.inputs)
        with torch.no_grad():
            told = [outputs(function, part.inputs, part.output).cpu() for function in (before, after)]
            missed = [_missed(part, part.violation(function).cpu(), len(told[0])) for function in (before, after)]
        if missed[0] is None or missed[1] is None:
            continue
        for i in missed[0].nonzero().squeeze(1).tolist():
            same = find_rows(test, rows(part.inputs, slice(i, i + 1)))
            asked += same
            if len(found) < most:
                image, row = draw(look, part.inputs, i), same[0] if same else None
                seen = (not bool(missed[1][i]), row, called[i], image)
                found.append(_mistake(part, i, [z[i : i + 1] for z in told], classes, *seen))
    return found, asked


def _missed(part: Constraint, violation: Tensor, n: int) -> Tensor | None:
    """Return which items miss a demand, (n,), bool; None where demands are on positions of items."""
    missed = ~(violation <= 0)
    if isinstance(part, Tagged):
        asked = _tags(part)
        if asked.ndim != 2:
            return None
        owners = asked.nonzero()[:, 0]
        return torch.zeros(n, dtype=torch.bool, device="cpu").index_put((owners,), missed, accumulate=True)
    return None if isinstance(part, Classified) and part.labels.ndim > 1 else missed


def _tags(part: Tagged) -> Tensor:
    """Return the tags that a bound constraint asks of each item, (n, tags), on the CPU."""
    assert isinstance(part.on, Tensor) and isinstance(part.off, Tensor)
    return (part.on | part.off).cpu()


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
    part: Classified | Tagged | Within,
    i: int,
    told: list[Tensor],
    names: Names,
    met: bool,
    row: int | None,
    item: Name | None,
    image: Image | None,
) -> Mistake:
    """Say what one item, whose outputs before and after are (1, ...), should answer."""
    if isinstance(part, Within):
        answers, margins, bars = _of_numbers(part, i, told, names)
        measure, asked = "Distance", f"at most {number(math.sqrt(part.tolerance))}"
    else:
        say = _of_tags(part, i, told, names) if isinstance(part, Tagged) else _of_class(part, i, told, names)
        answers, margins, bars = say
        measure, asked = "Margin in logits", f"at least {number(part.margin)}" if part.margin else "more than 0"
    return Mistake(*answers, measure, asked, *margins, met, row, item, bars, image)


Said = tuple[tuple[str, str, str], tuple[float, float], tuple[Bar, ...]]


def _of_class(part: Classified, i: int, told: list[Tensor], names: Names) -> Said:
    wanted = int(part.labels[i])
    logits = [part.likelihood.logits(z)[0] for z in told]
    before, after = (part.likelihood.probabilities(z)[0].nan_to_num(0.0) for z in told)
    was, now = (int(part.likelihood.answer(z)[0]) for z in told)
    # The classes that matter most on either side, and always the wanted one, in the order of today's probabilities
    rank = torch.maximum(before, after)
    rank[[wanted, was, now]] = torch.inf
    shown = rank.topk(min(_BARS, len(rank))).indices
    shown = shown[rank[shown] >= _LEAST]
    ordered = shown[before[shown].argsort(descending=True, stable=True)].tolist()
    bars = tuple(Bar(names[c], float(before[c]), float(after[c]), c == wanted) for c in ordered)
    return (names[was], names[now], names[wanted]), (_lead(logits[0], wanted), _lead(logits[1], wanted)), bars


def _of_tags(part: Tagged, i: int, told: list[Tensor], names: Names) -> Said:
    names, asked = Names(names.classes, "tag"), _tags(part)[i]
    assert isinstance(part.on, Tensor)
    on = part.on[i].cpu()
    before, after = (part.likelihood.probabilities(z)[0].nan_to_num(0.0) for z in told)
    chosen = asked.nonzero().squeeze(1).tolist()

    def say(states: Tensor) -> str:
        return ", ".join(names[k] if bool(states[k]) else f"no {names[k]}" for k in chosen)

    was, now = (say(part.likelihood.answer(z)[0] == 1) for z in told)
    leads = [z.where(on, -z)[asked].min() for z in (part.likelihood.logits(z)[0] for z in told)]
    bars = tuple(Bar(names[k], float(before[k]), float(after[k]), bool(on[k])) for k in chosen[:_BARS])
    return (was, now, say(on)), (float(leads[0]), float(leads[1])), bars


def _of_numbers(part: Within, i: int, told: list[Tensor], names: Names) -> Said:
    names, right = Names(names.classes, "output"), part.targets[i].cpu().double().reshape(-1)
    before, after = (z.double().reshape(-1) for z in told)
    order = (before - right).abs().argsort(descending=True)[:_BARS].tolist()
    bars = tuple(
        Bar(names[k], float(before[k]), float(after[k]), k == order[0], share=False, right=float(right[k]))
        for k in order
    )

    def say(values: Tensor) -> str:
        shown = ", ".join(number(value) for value in values[:_BARS].tolist())
        return shown if len(values) <= _BARS else f"{shown} …"

    far = (float((z - right).norm()) for z in (before, after))
    return (say(before), say(after), say(right)), (next(far), next(far)), bars


def _lead(logits: Tensor, wanted: int) -> float:
    others = torch.cat([logits[:wanted], logits[wanted + 1 :]])
    return float(logits[wanted] - others.max())
