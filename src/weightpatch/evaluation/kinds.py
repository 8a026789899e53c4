"""What a comparison tells of classes, of tags and of numbers, beyond what every likelihood says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, aligned
from .judging import NAN, Judged, item_means
from .metrics import Flips

__all__ = ["Classes", "GroupChange", "Kind", "Numbers", "Tags", "kind_of"]


_LEVELS = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@final
@dataclass(frozen=True)
class GroupChange:
    """What changed for one right class, one tag, one output, or one slice of the items.

    Attributes:
        label: the number of the class, tag or output, or the name of the slice.
        n: how many answers are of it.
        error_before: the first model's, in the figure of the likelihood; NaN where n is 0.
        error_after: the second model's.
        flips: its answers that changed.
    """

    label: Any
    n: int
    error_before: float
    error_after: float
    flips: Flips


class Kind:
    """Any likelihood: items are told by their losses.

    Attributes:
        group: what `groups` has a row of; empty for none.
        moved: what `shift` is the change of.
        axis: the same in one word.
    """

    group = ""
    moved = "loss"
    axis = "loss"

    def harm(self, judged: Judged) -> Tensor:
        """Return by how much each item got worse, (n,), float64; 0 where nothing counts."""
        before, after = (item_means(loss, judged.counts) for loss in judged.losses)
        return (after - before).nan_to_num(0.0, torch.inf, -torch.inf)

    def shift(self, judged: Judged) -> Tensor:
        """Return how far each item moved, (n,), float64, signed."""
        return self.harm(judged)

    def groups(self, judged: Judged) -> tuple[GroupChange, ...]:
        """Return a row for each class, tag or output, in order."""
        return ()

    def facts(self, judged: Judged) -> dict[str, Any]:
        """Return what else a file of numbers holds."""
        return {}


@final
class Classes(Kind):
    """`Categorical`: harm and shift are of probabilities."""

    group, moved, axis = "class", "probability of the answer before", "probability"

    def harm(self, judged: Judged) -> Tensor:
        """Return the probability that the right class lost, a mean over positions."""
        return -_gained(judged, judged.targets.clamp_min(0))

    def shift(self, judged: Judged) -> Tensor:
        """Return how the probability of the first model's answer changed; 0 where it had none."""
        answer = judged.likelihood.answer(judged.before)
        return _gained(judged, answer.clamp_min(0), answer >= 0)

    def groups(self, judged: Judged) -> tuple[GroupChange, ...]:
        """Return a row for each right class."""
        classes = shares(judged.likelihood, judged.before[:1]).shape[-1]
        labels = judged.targets[judged.counts]
        was, now = (loss[judged.counts] for loss in judged.losses)
        changed = judged.changed[judged.counts]
        n, *sums = (
            torch.bincount(labels[some], minlength=classes).tolist()
            for some in (slice(None), was > 0, now > 0, changed & (now > was), changed & (now < was), changed)
        )
        return tuple(
            _row(label, of, judged.likelihood, (old, new), _flips(worse, better, total))
            for label, (of, old, new, worse, better, total) in enumerate(zip(n, *sums, strict=True))
        )


@final
class Tags(Kind):
    """`Bernoulli`: harm and shift are of the probabilities of tags."""

    group, moved, axis = "tag", "probability of the answers before", "probability"

    def harm(self, judged: Judged) -> Tensor:
        """Return the probability that the right states lost, a mean over the tags that are asked."""
        wanted, asked = tags_asked(judged)
        before, after = (_states(judged.likelihood, z, wanted) for z in (judged.before, judged.after))
        return item_means(before - after, asked).nan_to_num(0.0)

    def shift(self, judged: Judged) -> Tensor:
        """Return how the probability of the first model's states changed; 0 where it had none."""
        answer, (_, asked) = judged.likelihood.answer(judged.before), tags_asked(judged)
        before, after = (_states(judged.likelihood, z, answer) for z in (judged.before, judged.after))
        return item_means((after - before).where(answer >= 0, 0.0), asked).nan_to_num(0.0)

    def groups(self, judged: Judged) -> tuple[GroupChange, ...]:
        """Return a row for each tag."""
        wanted, asked = tags_asked(judged)
        answers = [judged.likelihood.answer(z) for z in (judged.before, judged.after)]
        was, now = ((answer != wanted) & asked for answer in answers)
        changed = (answers[0] != answers[1]) & asked
        n, old, new, worse, better, total = (
            part.reshape(-1, part.shape[-1]).sum(0).tolist()
            for part in (asked, was, now, changed & now & ~was, changed & was & ~now, changed)
        )
        return tuple(
            _row(
                k,
                n[k],
                judged.likelihood,
                (old[k], new[k]),
                Flips(worse[k], better[k], total[k] - worse[k] - better[k]),
            )
            for k in range(len(n))
        )


@final
class Numbers(Kind):
    """`Gaussian`: harm is how much the mean squared error grew, shift how far the outputs are off."""

    group, moved, axis = "output", "distance from the target", "distance"

    def shift(self, judged: Judged) -> Tensor:
        """Return how the mean absolute residual changed, in units of the outputs."""
        before, after = residuals(judged)
        asked = ~before.isnan()
        return item_means(after.abs() - before.abs(), asked).nan_to_num(0.0, torch.inf, -torch.inf)

    def groups(self, judged: Judged) -> tuple[GroupChange, ...]:
        """Return a row for each output."""
        before, after = (part.reshape(-1, part.shape[-1]) for part in residuals(judged))
        asked = ~before.isnan()
        moved = self._moved(judged).reshape(asked.shape) & asked
        worse, better = moved & (after.abs() > before.abs()), moved & (after.abs() < before.abs())
        old, new = (part.square().where(asked, 0.0).sum(0).tolist() for part in (before, after))
        n, up, down, total = (part.sum(0).tolist() for part in (asked, worse, better, moved))
        return tuple(
            _row(k, n[k], judged.likelihood, (old[k], new[k]), _flips(up[k], down[k], total[k])) for k in range(len(n))
        )

    def facts(self, judged: Judged) -> dict[str, Any]:
        """Return how outputs minus targets are spread, before and after."""
        before, after = residuals(judged)
        return {"residuals": {"before": spread(before), "after": spread(after)}}

    def _moved(self, judged: Judged) -> Tensor:
        """Return which single outputs moved by more than their tolerance, as `Gaussian.changed` has it."""
        far = judged.likelihood.answer(judged.after - judged.before).abs()
        tolerance = getattr(judged.likelihood, "tolerance")  # noqa: B009 - of a Gaussian that is fitted
        same = far <= torch.as_tensor(tolerance, dtype=far.dtype, device=far.device)
        return ~(same | (judged.likelihood.answer(judged.before).isnan() & far.isnan()))


def kind_of(likelihood: Likelihood) -> Kind:
    """Return how answers of a likelihood are told."""
    for family, kind in ((Categorical, Classes()), (Bernoulli, Tags()), (Gaussian, Numbers())):
        if isinstance(likelihood, family):
            return kind
    return Kind()


def shares(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    """Return the probabilities of classes or tags, on the last dimension; 0 where there is none."""
    assert isinstance(likelihood, (Categorical, Bernoulli))
    return likelihood.probabilities(outputs).nan_to_num(0.0)


def spread(values: Tensor) -> dict[str, Any]:
    """Return the mean and quantiles of those values that are finite."""
    known = values[values.isfinite()].double().cpu().numpy()
    if not len(known):
        return {"mean": NAN, "quantiles": {}}
    quantiles = np.quantile(known, _LEVELS).tolist()
    return {"mean": float(known.mean()), "quantiles": dict(zip(map(str, _LEVELS), quantiles, strict=True))}


def tags_asked(judged: Judged) -> tuple[Tensor, Tensor]:
    """Return the right states of tags, 0 or 1, and which tags are asked, both (n, ..., tags)."""
    given = _aligned(judged)
    return given.nan_to_num(-1.0).long() if given.is_floating_point() else given.long(), given >= 0


def residuals(judged: Judged) -> tuple[Tensor, Tensor]:
    """Return outputs minus targets, before and after, (n, ..., k), float64; NaN where nothing is asked, else not."""
    targets = _aligned(judged).double()

    def off(outputs: Tensor) -> Tensor:
        values = judged.likelihood.answer(outputs).double()
        return values.nan_to_num(torch.inf, torch.inf, -torch.inf) - targets

    return off(judged.before), off(judged.after)


def _aligned(judged: Judged) -> Tensor:
    assert isinstance(judged.likelihood, (Bernoulli, Gaussian))
    return aligned(judged.targets, judged.before, judged.likelihood.dim)


def _states(likelihood: Likelihood, outputs: Tensor, wanted: Tensor) -> Tensor:
    assert isinstance(likelihood, Bernoulli)
    p = likelihood.probabilities(outputs).double()
    return p.where(wanted > 0, 1 - p).nan_to_num(0.0)


def _gained(judged: Judged, label: Tensor, some: Tensor | None = None) -> Tensor:
    before, after = (
        shares(judged.likelihood, z).gather(-1, label[..., None]).squeeze(-1) for z in (judged.before, judged.after)
    )
    change = (after - before).double()
    return item_means(change if some is None else change.where(some, 0.0), judged.counts).nan_to_num(0.0)


def _row(label: int, n: int, likelihood: Likelihood, totals: tuple[float, float], flips: Flips) -> GroupChange:
    before, after = (likelihood.figure(total / n) if n else NAN for total in totals)
    return GroupChange(label, n, before, after, flips)


def _flips(worse: int, better: int, total: int) -> Flips:
    return Flips(worse, better, total - worse - better)
