"""Two models on one test set: what else changed, item by item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from .._calling import Function, Inputs, Name, Output, check_names, length, outputs, rows
from ..bounds import mcnemar, paired_difference
from ..errors import InvalidInput, ShapeMismatch
from ..likelihoods import Categorical, Likelihood
from ..network import structural_clone
from ..verdict import Limits, Verdict
from ._plain import finite
from .judging import Judged, TestSet, check_targets, chosen
from .kinds import GroupChange, Kind, kind_of, spread
from .metrics import Estimate, Flips, flips, paired_bootstrap
from .slices import Column
from .slices import slices as sliced
from .verdicts import judge_outputs

__all__ = ["Comparison", "compare", "predict"]

_LIMITS = Limits()


@final
@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """The answers of two models to one test set, and every way in which they differ.

    What an answer is, when it changed and how wrong it is, the likelihood says; the figures are in its units: % of
    classes or tags wrong, the root mean squared error of numbers. An item changed where any of its positions did
    (tokens, pixels). An answer that is NaN is wrong. What the targets leave out (-100, or NaN for numbers) counts
    nowhere.

    Attributes:
        before: the first model's outputs, (n, ..., k), on the CPU.
        after: the second model's, the same shape.
        targets: what is right, on the CPU: classes (n, ...), or tags or numbers of the shape of the outputs.
        likelihood: what the outputs mean; what it lacks is read off those before.
        slices: columns of one's own by name, n values each, see `weightpatch.evaluation.slices`.
        items: what each item is called where it came from, n of them: its row there, or its file. What is told of an
            item names it so; by its place in the test set when not given.
    """

    before: Tensor
    after: Tensor
    targets: Tensor
    likelihood: Likelihood = field(default_factory=Categorical)
    slices: Mapping[str, Column] = field(default_factory=dict)
    items: Sequence[Name] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.before.shape)
        if not shape or not shape[0] or self.after.shape != self.before.shape:
            raise ShapeMismatch(
                f"a comparison was given outputs of shapes {shape} and {tuple(self.after.shape)}; expected two equal "
                "shapes (n, ...) with at least 1 item"
            )
        check_targets(self.targets, shape[0])
        check_names(self.items, shape[0], "items of the test set")
        object.__setattr__(self, "likelihood", self.likelihood.fitted(self.before))
        self.judged.counts, self._masks  # noqa: B018 - refuse what cannot be used

    @cached_property
    def judged(self) -> Judged:
        """The two models, position by position."""
        return Judged(self.before, self.after, self.targets, self.likelihood)

    @cached_property
    def counts(self) -> Tensor:
        """Which items count, (items,), bool: those with a target."""
        return self.judged.items[2] > 0

    @property
    def n(self) -> int:
        """Count the items that count."""
        return int(self.counts.sum())

    @property
    def positions(self) -> int:
        """Count the positions that count: as many as items where each is one answer."""
        return int(self.judged.counts.sum())

    @cached_property
    def answers_before(self) -> Tensor:
        """The first model's answers: classes (n, ...), tags or numbers (n, ..., k)."""
        return self.judged.answers_before

    @cached_property
    def answers_after(self) -> Tensor:
        """The second model's answers."""
        return self.judged.answers_after

    @property
    def error_before(self) -> float:
        """The first model's error, a mean over positions in the figure of the likelihood: %, or units of outputs."""
        return self.judged.errors()[0]

    @property
    def error_after(self) -> float:
        """The second model's error."""
        return self.judged.errors()[1]

    @cached_property
    def changed(self) -> Tensor:
        """Which items changed at any position that counts, (items,), bool."""
        return self.judged.moved

    @property
    def positions_changed(self) -> int:
        """Count the positions that changed."""
        return int(self.judged.changed.sum())

    @cached_property
    def flips(self) -> Flips:
        """How many items changed, for worse and for better."""
        return self.judged.flips

    @cached_property
    def drawdown(self) -> Estimate:
        """The error after minus the error before, with a paired 95 % interval.

        In percentage points, or units of the outputs. Tango's score interval (Tango 1998) where each item is one
        answer, right or wrong, and where no tag changed; else the paired bootstrap of whole items.
        """
        before, after, n = (part[self.counts] for part in self.judged.items)
        likelihood = self.likelihood
        if self.single or (likelihood.discrete and torch.equal(before, after)):
            step = likelihood.figure(1.0) - likelihood.figure(0.0)
            broken, repaired = int((after > before).sum()), int((before > after).sum())
            return paired_difference(broken, repaired, self.n).scaled(step)
        if not bool(before.isfinite().all() and after.isfinite().all()):
            return Estimate(self.error_after - self.error_before, math.nan, math.nan)
        old, new = (torch.stack([loss, n.double()], 1).numpy() for loss in (before, after))
        return paired_bootstrap(old, new, lambda sums: likelihood.figure(sums[0] / sums[1]))

    @cached_property
    def p_value(self) -> float:
        """The exact p-value of the hypothesis that changes are as often for the worse as for the better.

        With classes it is McNemar's test, else the sign test.
        """
        return mcnemar(self.flips.broken, self.flips.repaired)

    @cached_property
    def items_wrong(self) -> tuple[float, float] | None:
        """The shares of items with anything wrong, before and after, in percent; None for numbers."""
        if not self.likelihood.discrete:
            return None
        before, after = (100 * float((part[self.counts] > 0).double().mean()) for part in self.judged.items[:2])
        return before, after

    @cached_property
    def broken(self) -> Tensor:
        """Which items changed for the worse, worst first (see `harm`), (m,): classes from right to wrong."""
        before, after, _ = self.judged.items
        return self._by_harm(self.changed & (after > before))

    @cached_property
    def repaired(self) -> Tensor:
        """Which items changed for the better, worst first, (m,): classes from wrong to right."""
        before, after, _ = self.judged.items
        return self._by_harm(self.changed & (after < before))

    @cached_property
    def other(self) -> Tensor:
        """Which items changed otherwise, worst first, (m,): classes from wrong to another wrong one."""
        before, after, _ = self.judged.items
        return self._by_harm(self.changed & ~(after > before) & ~(after < before))

    @property
    def flipped(self) -> Tensor:
        """Which items changed their answer: broken, then other, then repaired, each worst first, (m,)."""
        return torch.cat([self.broken, self.other, self.repaired])

    @property
    def kind(self) -> Kind:
        """How answers are told: classes, tags, numbers or any others."""
        return kind_of(self.likelihood)

    @cached_property
    def harm(self) -> Tensor:
        """By how much each item got worse, (items,), negative where better.

        The probability that the right class or the right tags lost, or the growth of the squared error or of the loss;
        means over the positions of an item.
        """
        return self.kind.harm(self.judged)

    @cached_property
    def shift(self) -> Tensor:
        """How far each item moved, (items,), signed.

        The change of the probability of the first model's answer, of the distance from the target, or of the loss.
        """
        return self.kind.shift(self.judged)

    @cached_property
    def kl(self) -> float:
        """The mean KL(before || after) of a position, in nats; NaN where a model has no answer."""
        found = self.likelihood.divergence(self.before.double(), self.after.double())
        return float(found[self.judged.counts].mean())

    @cached_property
    def groups(self) -> tuple[GroupChange, ...]:
        """What changed for each right class, each tag or each output, in their order; see `Kind.group`."""
        return self.kind.groups(self.judged)

    @cached_property
    def by_slice(self) -> tuple[GroupChange, ...]:
        """What changed for the items of each value of each column, labelled as "column = value"."""
        return tuple(self._of_items(name, mask & self.counts) for name, mask in self._masks.items())

    def name(self, item: int) -> Name:
        """Return what an item is called, of its place in the test set."""
        return item if self.items is None else self.items[item]

    def judge(self, limits: Limits = _LIMITS, names: Sequence[str] = ()) -> Verdict:
        """Judge the second model by the worst of all items, each class, tag, output and slice, and what changed.

        Args:
            limits: what it may cost.
            names: of the classes, tags or outputs, for the reasons; numbers where there are none.
        """
        return judge_outputs(
            self.judged, {name: mask & self.counts for name, mask in self._masks.items()}, limits, names
        )

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the second model may take the first one's place: green, amber or red by the usual limits."""
        return self.judge()

    def to_json(self, limits: Limits = _LIMITS) -> dict[str, Any]:
        """Return every number, and the verdict, as plain values; what is not finite becomes None."""
        facts = {
            "likelihood": self.likelihood.name,
            "error_name": self.likelihood.error_name,
            "unit": self.likelihood.unit,
            "n": self.n,
            "positions": self.positions,
            "error_before": self.error_before,
            "error_after": self.error_after,
            "drawdown": asdict(self.drawdown),
            "p_value": self.p_value,
            "items_wrong": self.items_wrong and list(self.items_wrong),
            "positions_changed": self.positions_changed,
            "flips": asdict(self.flips),
            "broken": [self.name(i) for i in self.broken.tolist()],
            "repaired": [self.name(i) for i in self.repaired.tolist()],
            "other": [self.name(i) for i in self.other.tolist()],
            "kl": self.kl,
            "shift": {"of": self.kind.moved, **spread(self.shift[self.counts])},
            "slices": _rows("slice", self.by_slice),
            "verdict": self.judge(limits).to_json(),
            **self.kind.facts(self.judged),
        }
        if self.groups:
            facts[f"per_{self.kind.group}"] = _rows(self.kind.group, self.groups)
        told: dict[str, Any] = finite(facts)
        return told

    def __repr__(self) -> str:
        d, f, unit = self.drawdown, self.flips, self.likelihood.unit
        show, sign = ("{:.2f}".format, "{:+.3f}".format) if unit == "%" else ("{:.4g}".format, "{:+.4g}".format)
        points = "points" if unit == "%" else unit
        parts = [
            f"n={self.n}",
            f"{self.likelihood.error_name} {show(self.error_before)} -> {show(self.error_after)} {unit}".rstrip(),
            f"drawdown {sign(d.value)} {points}".rstrip() + f" [{sign(d.low)}, {sign(d.high)}]",
        ]
        if self.items_wrong is not None and not self.single:
            parts.append("items wrong {:.2f} -> {:.2f} %".format(*self.items_wrong))
        if self.positions > self.n:
            parts.append(f"{100 * self.positions_changed / self.positions:.2f} % of {self.positions} positions changed")
        words = ("broken", "repaired") if self.single else ("worse", "better")
        parts.append(f"{f.broken} {words[0]}, {f.repaired} {words[1]}, {f.other} other, p={self.p_value:.2g}")
        if not self.likelihood.discrete:
            parts.append(self.likelihood.name)
        return f"Comparison({', '.join(parts)}, verdict {self.verdict.level.name})"

    @property
    def single(self) -> bool:
        """Whether each item has one answer that is right or wrong: one class, or one tag."""
        return self.likelihood.discrete and self.answers_before.numel() == len(self.before)

    def _by_harm(self, chosen: Tensor) -> Tensor:
        index = chosen.nonzero().squeeze(1)
        return index[self.harm[index].argsort(descending=True, stable=True)]

    @cached_property
    def _masks(self) -> dict[str, Tensor]:
        return sliced(self.slices, len(self.before))

    def _of_items(self, name: str, mine: Tensor) -> GroupChange:
        before, after, _ = (part[mine] for part in self.judged.items)
        return GroupChange(name, int(mine.sum()), *self.judged.errors(mine), flips(self.changed[mine], before, after))


def compare(
    before: nn.Module | Function,
    after: nn.Module | Function,
    test: TestSet,
    *,
    likelihood: Likelihood | None = None,
    output: Output = None,
    batch_size: int = 128,
    slices: Mapping[str, Column] | None = None,
    items: Sequence[Name] | None = None,
) -> Comparison:
    """Run two models, or functions, on one test set and say everything that differs.

    A module runs in evaluation mode as a structural clone: its own mode, hooks and buffers are left as they are. A
    function is called as it is.

    Args:
        before: the first model.
        after: the second one; of any architecture whose outputs have the same shape.
        test: the inputs, as the models take them, and what is right: classes (n, ...), integers; or tags, 0 or 1, or
            numbers, of the shape of the outputs. Negative ones, or NaN for numbers, count nowhere.
        likelihood: what the outputs mean; `Categorical()` when not given, where the targets are integers, one for each
            position.
        output: which tensor of a structured answer is meant: its key, attribute, place, or a function that finds it.
        batch_size: how many items each call gets.
        slices: columns of one's own by name, n values each: the items of every value are summed up too.
        items: what each item is called where it came from, n of them: its row there, or its file.

    Raises:
        ShapeMismatch: the targets are not those of the outputs; the error says what to write.

    >>> from weightpatch.likelihoods import Gaussian
    >>> inputs = torch.tensor([[0.0], [1.0], [2.0]])
    >>> found = compare(lambda x: x, lambda x: 2 * x, (inputs, inputs), likelihood=Gaussian(1.0, tolerance=0.5))
    >>> round(found.error_after, 3), found.flips.broken
    (1.291, 2)
    """
    inputs, targets = test
    check_targets(targets, length(inputs))
    found = [predict(_runnable(model), inputs, batch_size, output) for model in (before, after)]
    targets = targets.detach().cpu()
    return Comparison(found[0], found[1], targets, chosen(likelihood, found[0], targets), slices or {}, items)


def predict(function: Function, inputs: Inputs, batch_size: int = 128, output: Output = None) -> Tensor:
    """Return the outputs for all inputs, in batches and without gradients, (n, ...), on the CPU."""
    if batch_size < 1:
        raise InvalidInput(f"batch_size was {batch_size}; expected at least 1")
    n = length(inputs)
    if not n:
        raise InvalidInput("the test set is empty; expected at least one item on dimension 0 of its inputs")
    with torch.no_grad():
        parts = [
            outputs(function, rows(inputs, slice(i, i + batch_size)), output).cpu() for i in range(0, n, batch_size)
        ]
    return torch.cat(parts)


def _runnable(model: nn.Module | Function) -> Function:
    return structural_clone(model).eval() if isinstance(model, nn.Module) else model


def _rows(heading: str, groups: Sequence[GroupChange]) -> list[dict[str, Any]]:
    return [
        {
            heading: row.label,
            "n": row.n,
            "error_before": row.error_before,
            "error_after": row.error_after,
            **asdict(row.flips),
        }
        for row in groups
    ]
