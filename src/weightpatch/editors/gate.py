"""A correction for the neighbourhood of the demands alone: reliable always, general nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from .._calling import Params
from ..errors import InvalidInput
from ..locality import Locality
from ..network import GATE, given, noted
from ..problem import Problem
from .base import Editor, Solution
from .minimum_norm import MinimumNorm

_ROUNDING = 1e-4  # how far a key may be from itself, computed in a batch of another size, relative to its norm


@final
@dataclass(frozen=True)
class Gate(Editor):
    """Give every violated demand a key, a ball around it and a value that the layer's output gains inside of the ball.

    The key is what the layer is given for the demand's input. The radius is a share of the distance to the nearest of
    all inputs that are to stay: those of `keep`, and of the demands that hold already. Nothing that is kept changes,
    bit for bit: where the layer is given the same for a kept input as for a demand's, as at a position that two texts
    share, or no ball around the key can leave it out, the edit is over its budget.
    A demand near an earlier key whose value meets it makes that ball larger instead; near one whose value does not,
    its ball ends half way between them. The values come from another editor, which moves nothing else. Source: GRACE
    (Hartvigsen et al., NeurIPS 2023), with radii from reference data and a solver in place of gradient descent.

    Args:
        layer: the module's name.
        count: how many keys there is room for.
        share: of the distance to the nearest input that stays; larger is more general, and less local.
        editor: looks for the values.

    >>> wp.edit(model, fix, Gate("fc"), keep=keep)
    Edit(satisfied, ..., drift=0, ...)
    """

    layer: str
    count: int = 64
    share: float = 0.5
    editor: Editor = field(default_factory=MinimumNorm)

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or self.count < 1:
            raise InvalidInput(f"Gate was given count={self.count!r}; expected an integer, at least 1")
        if not 0 <= self.share < 1:
            raise InvalidInput(f"Gate was given share={self.share}; expected a number of at least 0 and below 1")

    @property
    def slots(self) -> Mapping[str, int]:
        """Room for `count` keys at the layer."""
        return {self.layer: self.count}

    def run(self, problem: Problem) -> Solution:
        """Set keys and radii, then solve for the values."""
        keys, radii, values = (f"{self.layer}.{GATE}.{part}" for part in ("keys", "radii", "values"))
        start = problem.start
        if keys not in start:
            raise InvalidInput(f"the model has no slots for {self!r}: pass the gate itself, or Auto, as the editor")
        with torch.no_grad():
            own, violation, places = _given(problem, start, self.layer)
            bad = violation > 0
            stays = own.new_ones(len(own), dtype=torch.bool)
            stays[list(places.values())] = False
            kept = own[:0] if problem.keep is None else _kept(problem, problem.keep, self.layer)
            book = _Book(start[keys].clone(), start[radii].clone(), own[stays], kept, self.share)
            for demand, place in places.items():
                enlarged = book.enlarged(own[place])
                if enlarged is not None:
                    tried = problem.violation({**start, keys: book.keys, radii: enlarged})
                    if float(tried[demand]) <= 0 and not bool(((tried > 0) & ~bad).any()):
                        book.radii = enlarged
                        continue
                if not book.holds(own[place]) and not book.add(own[place]):
                    return Solution(start, 0)
            moved = {**start, keys: book.keys, radii: book.radii}
        found = self.editor.run(problem.part([values], moved))
        return Solution({**moved, **found.params}, found.steps + 1, found.certificate)

    @torch.no_grad()
    def settled(self, problem: Problem, solution: Solution) -> Solution:
        """Draw the balls in until no kept input lies in one; where that cannot be, the edit is over its budget."""
        keys, radii = (f"{self.layer}.{GATE}.{part}" for part in ("keys", "radii"))
        if problem.keep is None or keys not in solution.params or not bool((solution.params[radii] >= 0).any()):
            return solution
        seen = [keep for keep in (problem.keep, problem.judge) if keep is not None]
        around = torch.cat([_kept(problem, keep, self.layer) for keep in seen])
        kept, drawn = True, solution.params[radii].clone()
        for place in (drawn >= 0).nonzero().squeeze(1).tolist():
            key = solution.params[keys][place]
            nearest = float(_distances(around.to(key), key).min())
            if nearest <= float(drawn[place]):
                drawn[place] = max(self.share * nearest, _tolerance(key) * float(key.norm()))
                kept = kept and nearest > float(drawn[place])
        if kept and torch.equal(drawn, solution.params[radii]):
            return solution
        return replace(solution, params={**solution.params, radii: drawn}, within=solution.within and kept)


class _Book:
    """Keys and radii as they grow."""

    def __init__(self, keys: Tensor, radii: Tensor, own: Tensor, kept: Tensor, share: float) -> None:
        self.keys, self.radii = keys, radii
        self._own, self._kept, self._share = own.to(keys), kept.to(keys), share

    def enlarged(self, key: Tensor) -> Tensor | None:
        """Return the radii with the nearest ball grown to hold this key; None where it may not."""
        near = self._near(key)
        if near is None:
            return None
        place, wanted = near[0], near[1] * (1 + _tolerance(key))
        if wanted > self._reach(self.keys[place]):
            return None
        radii = self.radii.clone()
        radii[place] = max(float(radii[place]), wanted)
        return radii

    def add(self, key: Tensor) -> bool:
        """Use a free slot; say whether there was one."""
        free = (self.radii < 0).nonzero().squeeze(1)
        if not len(free):
            return False
        near, reach = self._near(key), self._reach(key)
        self.radii[free[0]] = max(
            reach if near is None else min(reach, near[1] / 2), _tolerance(key) * float(key.norm())
        )
        self.keys[free[0]] = key
        return True

    def holds(self, key: Tensor) -> bool:
        """Say whether this is a key already, of another demand at the same place."""
        near = self._near(key)
        return near is not None and near[1] == 0

    def _near(self, key: Tensor) -> tuple[int, float] | None:
        """Return the nearest used key and its distance."""
        used = (self.radii >= 0).nonzero().squeeze(1)
        if not len(used):
            return None
        least, place = _distances(self.keys[used], key).min(0)
        return int(used[place]), float(least)

    def _reach(self, key: Tensor) -> float:
        """Return how large a ball may be: a share of the distance to the nearest other input that stays."""
        own = _distances(self._own, key)
        others = torch.cat([own[own > _tolerance(key) * float(key.norm())], _distances(self._kept, key)])
        return self._share * float(others.min()) if len(others) else 0.0


def _given(problem: Problem, params: Params, layer: str) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Return what the layer is given for the demands' inputs, (m, width), the violation, and where it comes from.

    The last is, for each violated demand, the row of what is given whose answer the demand depends on most: in a batch
    of items the item, in a sequence mostly the place where the token is written.
    """
    problem.constraint.pieces(problem.at(params))  # a first pass may be run several times, to be recorded
    answers: list[Tensor] = []
    with noted(layer, answers) as seen, torch.enable_grad():
        tracked = {name: value.detach().requires_grad_() for name, value in params.items()}
        pieces = problem.constraint.pieces(problem.at(tracked))
        violation = torch.cat([piece.violation for piece in pieces])
    if not seen:
        raise InvalidInput(f"Gate({layer!r}): the layer is not called for the constraint's inputs; choose another one")
    places = {}
    for demand in (violation > 0).nonzero().squeeze(1).tolist():
        one = torch.zeros_like(violation)
        one[demand] = 1
        grads = torch.autograd.grad(violation, answers, one, retain_graph=True, allow_unused=True)
        norms = [
            answer.new_zeros(answer.shape[:-1].numel()) if grad is None else grad.flatten(0, -2).norm(dim=1)
            for grad, answer in zip(grads, answers, strict=True)
        ]
        places[demand] = int(torch.cat(norms).argmax())
    return torch.cat([part.flatten(0, -2) for part in seen]), violation.detach(), places


def _kept(problem: Problem, keep: Locality, layer: str) -> Tensor:
    """Return what the layer is given for all inputs that are kept, (n, width)."""
    look = problem.given or partial(given, problem.at(problem.start))
    return torch.cat([look(layer, inputs) for inputs in keep.batches])


def _distances(points: Tensor, key: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"  # products would round small distances away
    dtype = torch.promote_types(key.dtype, torch.float32)
    return torch.cdist(points.to(dtype), key[None].to(dtype), compute_mode=exact).squeeze(1)


def _tolerance(key: Tensor) -> float:
    return max(_ROUNDING, 4 * torch.finfo(key.dtype).eps)
