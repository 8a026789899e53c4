"""What must stay as it was: one measure, used as a penalty, as a training term and as a metric."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from ._calling import Function, Inputs, Name, Output, call, check_batch, leaves, rows, selected
from .constraints import Constraint
from .effects import Effect
from .errors import InvalidInput, NonFinite, ShapeMismatch
from .likelihoods import Likelihood

__all__ = ["Locality"]

_JUDGED = 0.5  # the share of the kept items that no part of the search sees
_BYTES = 6  # of a digest, which decide
_AT_ONCE = 256  # sequences whose outputs are in memory at once
_SEEN = 512  # items whose answers say what outputs are


@final
@dataclass(frozen=True, eq=False)
class Locality:
    """How far the predictions on these inputs move: the mean over positions of KL(before || after), in nats.

    Both sides must be functions in the same mode (the driver and `evaluate` give two evaluation-mode functions), so
    that an edit that changes nothing drifts by exactly 0. ``a & b`` keeps several outputs, or several kinds of inputs:
    their drifts add up.

    A search uses one half of the items, and is judged on the other half, which it does not see. An item belongs to the
    same half in every edit: its digest decides.

    Args:
        inputs: a batch of n items.
        mask: which positions count, bool, (n,) or (n, ...). Positions where it is False (padding) count neither in the
            sum nor in the mean.
        answers: the outputs to stay with, as `bind` fixes them; those of the model that is edited when not given.
        likelihood: what the outputs mean, such as ``likelihoods.Gaussian()`` for numbers; that of the constraint when
            not given.
        output: which tensor of a structured answer is kept: key, attribute, place or function; that of the constraint
            when not given.
        groups: (n,) numbers or names: items of one group, as sentences of one document, are in the same half.
        judge: items to judge on, in place of half of these.
        others: what is kept beside, as `&` joins it.

    >>> seen, judged = Locality(images, likelihood=wp.likelihoods.Categorical()).split
    >>> seen.items + judged.items == len(images)
    True
    """

    inputs: Inputs
    mask: Tensor | None = None
    answers: Tensor | None = None
    likelihood: Likelihood | None = None
    output: Output = None
    groups: Tensor | Sequence[Name] | None = None
    judge: Locality | None = None
    others: tuple[Locality, ...] = ()

    def __post_init__(self) -> None:
        n = check_batch(self.inputs, "Locality")
        if self.mask is not None and not bool(self.mask.any()):
            raise ShapeMismatch(
                "Locality was given a mask that is False everywhere; expected at least one position to count"
            )
        if self.groups is not None and len(self.groups) != n:
            raise ShapeMismatch(f"Locality was given {n} inputs and {len(self.groups)} groups; expected one an input")
        if self.groups is not None and not isinstance(self.groups, Tensor):
            places = {name: place for place, name in enumerate(dict.fromkeys(self.groups))}
            numbers = torch.tensor([places[name] for name in self.groups], device="cpu")
            object.__setattr__(self, "groups", numbers)

    def __and__(self, other: Locality) -> Locality:
        judges = [judge for judge in (self.judge, other.judge) if judge is not None]
        judge = judges[0] & judges[1] if len(judges) > 1 else next(iter(judges), None)
        return replace(self, others=(*self.others, *(replace(part, judge=None) for part in other.parts)), judge=judge)

    @cached_property
    def parts(self) -> tuple[Locality, ...]:
        """What is kept, one output of one batch each."""
        return (replace(self, others=()), *self.others) if self.others else (self,)

    @property
    def batches(self) -> tuple[Inputs, ...]:
        """The batches of the parts, each once."""
        return tuple(part.inputs for part in _apart(self.parts))

    @property
    def items(self) -> int:
        """Count the items."""
        return sum(check_batch(part.inputs, "Locality") for part in _apart(self.parts))

    def of(self, constraint: Constraint) -> Locality:
        """Return the same, with the constraint's likelihood and output where none is given.

        Raises:
            InvalidInput: the parts of the constraint do not agree, or do not say.
        """
        found = {(repr(part.likelihood), str(part.output)): part for part in constraint.conjuncts}
        first, alike = next(iter(found.values())), len({output for _, output in found}) == 1
        parts, made = self.parts, []
        for part in parts:
            if part.likelihood is None:
                if len({type(one.likelihood) for one in found.values()}) > 1 or not alike:
                    kinds = ", ".join(sorted({f"{one.kind} ({one.likelihood!r:.40})" for one in found.values()}))
                    raise InvalidInput(
                        f"the demands are about outputs of different kinds: {kinds}; say what is kept: "
                        "wp.Locality(inputs, likelihood=..., output=...), several of them joined by &"
                    )
                part = replace(part, likelihood=first.likelihood)
            if part.output is None and alike and first.output is not None:
                part = replace(part, output=first.output)
            made.append(part)
        judge = None if self.judge is None else self.judge.of(constraint)
        if judge is self.judge and all(new is old for new, old in zip(made, parts, strict=True)):
            return self
        return replace(made[0], others=tuple(made[1:]), judge=judge)

    @torch.no_grad()
    def fitted(self, function: Function) -> Locality:
        """Return the same, what likelihoods leave open being read off what `function` answers now to all items.

        Raises:
            InvalidInput: nothing says what the outputs mean.
        """
        if all(part.meaning.complete for part in self.parts) and self.judge is None:
            return self
        asked, made = _Asked(function), []
        for part in self.parts:
            answers = part.answers if part.answers is not None or part.meaning.complete else asked(_spread(part))
            made.append(part if answers is None else replace(part, likelihood=part.meaning.fitted(answers)))
        judge = self.judge
        if judge is not None and len(judge.parts) == len(made):  # of one unit with what is kept
            pairs = zip(judge.parts, made, strict=True)
            judged = [replace(own, likelihood=own.likelihood or part.likelihood) for own, part in pairs]
            judge = replace(judged[0], others=tuple(judged[1:])).fitted(function)
        return replace(made[0], others=tuple(made[1:]), judge=judge)

    @torch.no_grad()
    def bind(self, function: Function) -> Locality:
        """Return what should stay as `function` answers now: what many edits change is then measured together.

        Raises:
            InvalidInput: nothing says what the outputs mean.
        """
        if all(part.answers is not None and part.meaning.complete for part in self.parts) and self.judge is None:
            return self
        asked, made = _Asked(function), []
        for part in self.parts:
            answers = asked(part).detach() if part.answers is None else part.answers
            made.append(replace(part, answers=answers, likelihood=part.meaning.fitted(answers)))
        judge = None if self.judge is None else self.judge.bind(function)
        return replace(made[0], others=tuple(made[1:]), judge=judge)

    @property
    def meaning(self) -> Likelihood:
        """What the outputs mean.

        Raises:
            InvalidInput: neither this nor a constraint said.
        """
        if self.likelihood is None:
            raise InvalidInput(
                "Locality does not know what the model's outputs mean, and the constraint does not say; write "
                "wp.Locality(inputs, likelihood=wp.likelihoods.Categorical()) for classes, Bernoulli() for tags, "
                "Gaussian() for numbers"
            )
        return self.likelihood

    def drift(self, before: Function, after: Function) -> Tensor:
        """Return the mean KL divergence over the positions that count, of several outputs their sum: a scalar in nats.

        The reference, `before` unless `answers` are bound, is detached: gradient flows through `after` alone.
        """
        asked, parts = _Asked(after), self.parts
        with torch.no_grad():
            known = _Asked(before)
            references = [known(part).detach() if part.answers is None else part.answers for part in parts]
        each = [part._divergences(reference, asked(part)) for part, reference in zip(parts, references, strict=True)]
        return torch.stack([values.mean() for values in each]).sum() if len(each) > 1 else each[0].mean()

    @torch.no_grad()
    def effect(self, after: Function) -> Effect:
        """Return what changed from the answers that are bound.

        An item changed where any of its positions did, of any output. Divergences that are not finite count as changed.
        """
        asked, found = _Asked(after), list[tuple[Locality, Tensor, Tensor]]()
        for part in self.parts:
            if part.answers is None:
                raise InvalidInput("Locality does not know the answers to stay with; call keep.bind(model) first")
            found.append((part, *part._compared(part.answers, asked(part))))
        counts = [part._mask_of(drift) for part, drift, _ in found]
        moved = [(other & mask) for (_, _, other), mask in zip(found, counts, strict=True)]
        items = changed = 0
        for first in _apart(self.parts):
            same = [place for place, (part, _, _) in enumerate(found) if part.inputs is first.inputs]
            items += int(torch.stack([_whole(counts[place]) for place in same]).any(0).sum())
            changed += int(torch.stack([_whole(moved[place]) for place in same]).any(0).sum())
        drifts = [float(drift[mask].double().mean()) for (_, drift, _), mask in zip(found, counts, strict=True)]
        names = dict.fromkeys(part.meaning.name for part in self.parts)
        positions = sum(int(mask.sum()) for mask in counts)
        return Effect(
            items, changed, positions, sum(int(other.sum()) for other in moved), sum(drifts), ", ".join(names)
        )

    @torch.no_grad()
    def check_finite(self, function: Function) -> None:
        """Refuse items that `function` answers with NaN, or infinity where that is no probability of 0."""
        asked = _Asked(function)
        for part in (*self.parts, *(self.judge.parts if self.judge else ())):
            answers = asked(part)
            lost = ~part.meaning.divergence(answers, answers).isfinite()
            items = _whole(lost & part._mask_of(lost)).nonzero().squeeze(1).tolist()
            if items:
                raise NonFinite(
                    f"the unedited model answers {len(items)} of {len(answers)} kept items with NaN or infinity, the "
                    f"first of them in rows {str(items[:8])[1:-1]}; how far such answers move cannot be told: keep "
                    "other items, or leave these positions out with mask="
                )

    @property
    def large(self) -> bool:
        """Whether these are so many sequences that the outputs of all of them at once might not fit into memory."""
        return self.mask is not None and self.answers is None and not self.others and self.items > _AT_ONCE

    def between(self, before: Function, after: Function) -> Effect:
        """Return what changed from the answers of `before`, a part of the items at a time where they are many."""
        if not self.large:
            return self.bind(before).effect(after)
        first, *more = (part.bind(before).effect(after) for part in self._chunks)
        return sum(more, first)

    @cached_property
    def _chunks(self) -> list[Locality]:
        """The items in parts, which are the same tensors every time, so that passes are replayed."""
        assert self.mask is not None
        parts = torch.split(torch.arange(self.items, device="cpu"), _AT_ONCE)
        counted = [part for part in parts if bool(self.mask[part.to(self.mask.device)].any())]
        return [self._taken(part, _rows(self.inputs, part)) for part in counted]

    def unchanged(self) -> Effect:
        """Return the effect of an edit that changes nothing."""
        counts = [part.items if part.mask is None else int(part.mask.sum()) for part in self.parts]
        items = [part.items if part.mask is None else int(_whole(part.mask).sum()) for part in _apart(self.parts)]
        names = dict.fromkeys(part.meaning.name for part in self.parts)
        return Effect(sum(items), 0, sum(counts), 0, 0.0, ", ".join(names))

    def take(self, count: int) -> Locality:
        """Return the first items that count of every part, without those that judge."""
        return _joined(self.parts, lambda part: self._counts(part).nonzero().squeeze(1)[:count]) or self

    @cached_property
    def split(self) -> tuple[Locality, Locality | None]:
        """What a search may see, and what it is judged on; None for a single item, which can be no more than seen.

        An item's half follows from the SHA-256 of its values, or from its group's.
        """
        if self.judge is not None:
            return replace(self, judge=None), self.judge
        judged = {id(part.inputs): part._judged(self._counts(part)) for part in _apart(self.parts)}
        unseen = _joined(self.parts, lambda part: judged[id(part.inputs)].nonzero().squeeze(1))
        if unseen is None:
            return self, None
        seen = _joined(self.parts, lambda part: (~judged[id(part.inputs)]).nonzero().squeeze(1))
        assert seen is not None
        return seen, unseen

    def without(self, constraint: Constraint) -> Locality | None:
        """Return what is left without the items that the constraint asks about; None where nothing is left.

        Those that judge lose them too.
        """
        asked = {key for batch in constraint.batches for key in digests(batch)}
        stays = {
            id(part.inputs): torch.tensor([key not in asked for key in part._digests], device="cpu")
            for part in _apart(self.parts)
        }
        judge = None if self.judge is None else self.judge.without(constraint)
        if judge is self.judge and all(bool(which.all()) for which in stays.values()):
            return self
        left = _joined(self.parts, lambda part: stays[id(part.inputs)].nonzero().squeeze(1))
        return None if left is None else replace(left, judge=judge)

    def _counts(self, part: Locality) -> Tensor:
        """Return which items of a part's batch count, in any of the parts that share it, (n,)."""
        masks = [other.mask for other in self.parts if other.inputs is part.inputs]
        counted = [_whole(mask).cpu() for mask in masks if mask is not None]
        if len(counted) < len(masks):
            return torch.ones(check_batch(part.inputs, "Locality"), dtype=torch.bool, device="cpu")
        return torch.stack(counted).any(0)

    def _taken(self, index: Tensor, inputs: Inputs) -> Locality:
        mask, answers = (part if part is None else part[index.to(part.device)] for part in (self.mask, self.answers))
        groups = None if self.groups is None else torch.as_tensor(self.groups, device="cpu")[index]
        return replace(self, inputs=inputs, mask=mask, answers=answers, groups=groups, judge=None, others=())

    @cached_property
    def _digests(self) -> list[bytes]:
        return digests(self.inputs)

    def _judged(self, counts: Tensor) -> Tensor:
        """Return which items judge a search, (n,): none where those that count cannot be told apart."""
        keys = self._digests
        if self.groups is not None:
            names = torch.as_tensor(self.groups, device="cpu").tolist()
            least: dict[Any, bytes] = {}
            for name, key in zip(names, keys, strict=True):
                least[name] = min(key, least.get(name, key))
            keys = [least[name] for name in names]
        shares = torch.tensor([int.from_bytes(key[:_BYTES], "little") for key in keys], device="cpu")
        low, high = shares[counts].aminmax()  # at least one that counts on either side
        judged: Tensor = (low < high) & ((shares == low) | ((shares < _JUDGED * 256**_BYTES) & (shares != high)))
        return judged

    def _mask_of(self, positions: Tensor) -> Tensor:
        """Return which positions count, of the positions' shape."""
        if self.mask is None:
            return torch.ones_like(positions, dtype=torch.bool)
        if self.mask.shape != positions.shape:
            raise ShapeMismatch(
                f"Locality was given a mask of shape {tuple(self.mask.shape)}; expected {tuple(positions.shape)}"
            )
        return self.mask.to(positions.device)

    def _divergences(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the divergence at each position that counts, (positions,) or (n, ...)."""
        rows = self._row_mask(before)
        if rows is not None:
            return self.meaning.divergence(before[rows], after[rows])
        positions = self.meaning.divergence(before, after)
        return positions if self.mask is None else positions[self._mask_of(positions)]

    def _compared(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence of each position, and where the answer is another one, (n, ...); nothing of padding."""
        rows = self._row_mask(before)
        if rows is None or before.shape != after.shape:
            drift = self.meaning.divergence(before, after)
            return drift, self.meaning.changed(before, after) | ~drift.isfinite()
        some = before[rows], after[rows]
        drift, changed = before.new_zeros(rows.shape), torch.zeros_like(rows)
        drift[rows], changed[rows] = self.meaning.divergence(*some), self.meaning.changed(*some)
        return drift, changed | ~drift.isfinite()

    def _row_mask(self, outputs: Tensor) -> Tensor | None:
        """Return the mask where positions can be taken as rows of numbers, so that padding is not even looked at."""
        last = getattr(self.likelihood, "dim", -1) in (None, -1)
        if self.mask is None or not last or self.mask.shape != outputs.shape[:-1] or self.mask.ndim > 2:
            return None
        return self.mask.to(outputs.device)


class _Asked:
    """Answers of one function, which is called once on a batch that several parts share."""

    def __init__(self, function: Function) -> None:
        self._function, self._known = function, list[tuple[Any, Any]]()

    def __call__(self, part: Locality) -> Tensor:
        for inputs, answer in self._known:
            if inputs is part.inputs:
                return selected(answer, part.output)
        self._known.append((part.inputs, call(self._function, part.inputs)))
        return selected(self._known[-1][1], part.output)


def digests(inputs: Inputs) -> list[bytes]:
    """Return the SHA-256 of each item of a batch."""
    parts = [leaf.detach().cpu() for leaf in leaves(inputs) if leaf.ndim]
    n = len(parts[0]) if parts else 0
    whole = [part.reshape(n, -1).clone(memory_format=torch.contiguous_format) for part in parts if len(part) == n]
    own = [part.view(torch.uint8).numpy() for part in whole]
    return [hashlib.sha256(b"".join(part[row].tobytes() for part in own)).digest() for row in range(n)]


def _joined(parts: Sequence[Locality], index: Callable[[Locality], Tensor]) -> Locality | None:
    """Return some items of all parts; those that share a batch share it still.

    Parts of which nothing is left that counts are left out; None where that is all of them.
    """
    taken: dict[int, Inputs] = {}
    made = []
    for part in parts:
        which = index(part)
        if len(which) and (part.mask is None or bool(part.mask[which.to(part.mask.device)].any())):
            if id(part.inputs) not in taken:
                taken[id(part.inputs)] = _rows(part.inputs, which)
            made.append(part._taken(which, taken[id(part.inputs)]))
    return replace(made[0], others=tuple(made[1:])) if made else None


def _spread(part: Locality) -> Locality:
    """Return some items, from all over the batch: enough to see what outputs are and how they spread."""
    step = -(-part.items // _SEEN)
    inputs = part.inputs if step < 2 else _rows(part.inputs, torch.arange(0, part.items, step, device="cpu"))
    return replace(part, inputs=inputs)


def _apart(parts: Sequence[Locality]) -> list[Locality]:
    """Return the first part of each batch."""
    found: list[Locality] = []
    for part in parts:
        if not any(part.inputs is other.inputs for other in found):
            found.append(part)
    return found


def _whole(positions: Tensor) -> Tensor:
    """Return for each item whether anything is True, (n,)."""
    return positions.reshape(len(positions), -1).any(1)


def _rows(inputs: Inputs, index: Tensor) -> Inputs:
    device = next((leaf.device for leaf in leaves(inputs)), index.device)
    found: Inputs = rows(inputs, index.to(device))
    return found
