"""What a comparison counts of all items, of each class, tag, output and slice, for a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..likelihoods import Bernoulli, Categorical, Gaussian
from ..verdict import Changed, Limits, Paired, Several, Verdict, judge_answers, judge_losses
from .judging import Judged
from .kinds import residuals, tags_asked

__all__ = ["judge_outputs"]


def judge_outputs(judged: Judged, masks: Mapping[str, Tensor], limits: Limits, names: Sequence[str] = ()) -> Verdict:
    """Judge two models by their outputs on labelled items.

    Args:
        judged: the outputs.
        masks: which items belong to each slice, by its name, bool, (n,).
        limits: what the second model may cost.
        names: of the classes, tags or outputs, for the reasons.
    """
    if not judged.likelihood.discrete:
        return _judge_numbers(judged, masks, limits, names)
    whole = _whole(judged)
    slices = [found for name, mask in masks.items() for found in whole.of(name, mask)]
    (overall,) = whole.of("all items")
    return judge_answers(overall, list(_classes(judged, names)), slices, limits)


@final
@dataclass(frozen=True, eq=False)
class _Counts:
    """Wrong answers of each item, before and after, how many it has, and whether one changed, four times (n,)."""

    before: Tensor
    after: Tensor
    answers: Tensor
    changed: Tensor

    def of(self, name: str, mask: Tensor | None = None) -> Iterator[Paired | Several]:
        """Yield the counts of those items that have an answer, if there are any."""
        chosen = self.answers > 0 if mask is None else mask & (self.answers > 0)
        before, after, answers, changed = (
            part[chosen] for part in (self.before, self.after, self.answers, self.changed)
        )
        if not len(before):
            return
        if bool(answers.max() > 1) or bool(((before % 1 != 0) | (after % 1 != 0)).any()):
            yield Several(name, before.numpy(), after.numpy(), answers.numpy(), int(changed.sum()))
            return
        broken, repaired = int((after > before).sum()), int((before > after).sum())
        other = int(changed.sum()) - broken - repaired
        yield Paired(name, len(before), broken, repaired, int(before.sum()), other)


def _whole(judged: Judged) -> _Counts:
    return _Counts(*(part.cpu() for part in (*judged.items, judged.moved)))


def _classes(judged: Judged, names: Sequence[str]) -> Iterator[Paired | Several]:
    """Yield counts of each class or tag that has an answer."""
    if isinstance(judged.likelihood, Categorical):
        yield from _by_target(judged, [f"class {name}" for name in names], "class {}")
    elif isinstance(judged.likelihood, Bernoulli):
        yield from _by_tag(judged, names)


def _by_target(judged: Judged, names: Sequence[str], unnamed: str) -> Iterator[Paired | Several]:
    """Yield counts of the positions of each right class."""
    counts = judged.counts.cpu()
    rows = torch.arange(len(counts), device="cpu").reshape(-1, *[1] * (counts.ndim - 1)).expand_as(counts)[counts]
    parts = [part.cpu()[counts].double() for part in (*judged.losses, judged.counts, judged.changed)]
    labels, order = judged.targets.cpu()[counts].long().sort(stable=True)
    ends = torch.bincount(labels).cumsum(0).tolist()
    for label, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        some = order[begin:end]
        before, after, n, changed = (
            torch.bincount(rows[some], part, len(counts)) for part in (whole[some] for whole in parts)
        )
        name = names[label] if label < len(names) else unnamed.format(label)
        yield from _Counts(before, after, n, changed > 0).of(name)


def _by_tag(judged: Judged, names: Sequence[str]) -> Iterator[Paired | Several]:
    """Yield counts of each tag; of a single one, of its two states."""
    wanted, asked = tags_asked(judged)
    answers = [judged.likelihood.answer(z) for z in (judged.before, judged.after)]
    parts = [asked & (answer != wanted) for answer in answers] + [asked, asked & (answers[0] != answers[1])]
    sums = [part.reshape(len(asked), -1, asked.shape[-1]).double().sum(1).cpu() for part in parts]
    for k in range(asked.shape[-1]):
        before, after, n, changed = (part[:, k] for part in sums)
        name = f"tag {names[k] if k < len(names) else k}"
        found = _Counts(before, after, n, changed > 0)
        if asked[0].numel() > 1:
            yield from found.of(name)
        else:
            on = wanted.reshape(-1).cpu() == 1
            yield from found.of(f"{name} on", on)
            yield from found.of(f"{name} off", ~on)


def _judge_numbers(judged: Judged, masks: Mapping[str, Tensor], limits: Limits, names: Sequence[str]) -> Verdict:
    before, after, n = (part.cpu() for part in judged.items)
    scale = n.double().mean()  # so that the mean over items is that over positions
    counts = n > 0
    old, new = ((part / scale).where(counts, torch.nan).numpy() for part in (before, after))
    likelihood = judged.likelihood
    return judge_losses(
        old,
        new,
        {name: mask.numpy() for name, mask in masks.items()},
        outputs=dict(_outputs(judged, names)) if isinstance(likelihood, Gaussian) else None,
        changed=Changed(int(judged.moved.cpu()[counts].sum()), int(counts.sum()), likelihood=likelihood.name),
        figure=likelihood.figure,
        name=likelihood.error_name,
        unit=likelihood.unit,
        limits=limits,
    )


def _outputs(judged: Judged, names: Sequence[str]) -> Iterator[tuple[str, tuple[ArrayLike, ArrayLike]]]:
    """Yield the squared errors of each of several outputs, before and after, twice (n,); NaN where none is asked."""
    sides = [part.reshape(len(part), -1, part.shape[-1]).square().cpu() for part in residuals(judged)]
    asked = ~sides[0].isnan()
    before, after = ((part.where(asked, 0.0).sum(1) / asked.sum(1)).numpy() for part in sides)
    several = before.shape[1] if before.shape[1] > 1 else 0
    for k in range(several):
        yield f"output {names[k] if k < len(names) else k}", (before[:, k], after[:, k])
