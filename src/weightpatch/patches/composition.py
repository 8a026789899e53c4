"""Several patches on one base: the same weights whatever the order they came in.

Effective weights are always computed from the base, in float64, patch after patch in one canonical order, and rounded
once. Subtracting a patch is never needed, so nothing is lost by taking one away.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import PatchConflict
from ..gates import Gate
from .manifest import Manifest
from .operations import Operation
from .rounding import rounded


class Layer(Protocol):
    """What composition needs to know of a patch."""

    @property
    def id(self) -> str:
        """The patch's SHA-256."""

    @property
    def manifest(self) -> Manifest:
        """What the patch says about itself."""

    @property
    def operations(self) -> Mapping[str, Operation]:
        """What it does, tensor by tensor."""

    @property
    def gates(self) -> Mapping[str, Gate]:
        """What it adds to the outputs of modules, by their names."""


L = TypeVar("L", bound=Layer)


@dataclass(frozen=True)
class Step:
    """One patch's operation on one tensor, and which other operations on this tensor it was made after."""

    id: str
    operation: Operation
    after: frozenset[str]


def canonical(layers: Iterable[L]) -> tuple[L, ...]:
    """Each patch after those it requires, otherwise in rising order of ids; raises `PatchConflict` for gaps."""
    by_id = {layer.id: layer for layer in layers}
    waiting = {key: set(layer.manifest.requires) for key, layer in by_id.items()}
    for key, needs in waiting.items():
        if missing := needs - by_id.keys():
            raise PatchConflict(f"patch {key[:12]} requires {_short(missing)}; apply what it requires first")
    followers: dict[str, list[str]] = {}
    for key, needs in waiting.items():
        for need in needs:
            followers.setdefault(need, []).append(key)
    ready = sorted(key for key, needs in waiting.items() if not needs)
    order = []
    while ready:
        order.append(key := heapq.heappop(ready))
        for follower in followers.get(key, ()):
            waiting[follower].remove(key)
            if not waiting[follower]:
                heapq.heappush(ready, follower)
    return tuple(by_id[key] for key in order)


def steps(layers: Sequence[Layer], names: Mapping[str, str]) -> dict[str, list[Step]]:
    """The steps for each tensor, in the order of the layers; `names` maps every name to its tensor's first one."""
    before: dict[str, frozenset[str]] = {}
    found: dict[str, list[Step]] = {}
    for layer in layers:
        needs = layer.manifest.requires
        before[layer.id] = frozenset(needs).union(*(before[need] for need in needs))
        for entry in layer.manifest.tensors:
            for name in dict.fromkeys(names[name] for name in entry.names):
                earlier = found.setdefault(name, [])
                if earlier and earlier[-1].id == layer.id:
                    raise PatchConflict(f"patch {layer.id[:12]} changes {name!r} twice, under two names of one tensor")
                after = before[layer.id] & {step.id for step in earlier}
                earlier.append(Step(layer.id, layer.operations[entry.name], after))
    return found


class Composer:
    """Composes one tensor, of any subset of its steps that holds with each step those that it was made after."""

    def __init__(self, name: str, base: Tensor, steps: Sequence[Step]) -> None:
        self._name, self._steps = name, steps
        self._known = {frozenset[str](): base.detach().cpu()}

    def of(self, wanted: frozenset[str]) -> Tensor:
        """The tensor, in its own type on the CPU, with these steps; raises `PatchConflict` where it overflows."""
        if wanted not in self._known:
            last = [step for step in self._steps if step.id in wanted][-1]
            alone = last.after == wanted - {last.id}  # then its own weights, without the detour
            result = last.operation.on(self.of(last.after)) if alone else self._sum(wanted)
            if not result.isfinite().all():
                raise PatchConflict(f"patches {_short(wanted)} together drive {self._name!r} out of its type's range")
            self._known[wanted] = result
        return self._known[wanted]

    def _sum(self, wanted: frozenset[str]) -> Tensor:
        total, done = self.of(frozenset()).to(torch.float64, copy=True), frozenset[str]()
        for step in self._steps:
            if step.id in wanted:
                own = self.of(step.after)
                # With nothing but what the patch was made after, start from those very weights: no rounding is left
                total = own.to(torch.float64, copy=True) if done == step.after else total
                total = step.operation.add(total, own)
                done |= {step.id}
        return rounded(total, self.of(frozenset()).dtype)


def _short(ids: Iterable[str]) -> str:
    return ", ".join(sorted(key[:12] for key in ids))
