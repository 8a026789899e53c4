"""Which recorded outputs a pass really reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .probe import ESCAPES
from .tree import PLAIN, tensors_in

__all__ = ["Flow", "Place"]

Place = tuple[int, int]  # (recorded call, leaf of its output); (-1, i) is the i-th tensor of the pass's inputs


class Flow(TorchFunctionMode):
    """Follow which memory each function of a pass reads and writes, to find the recorded outputs that reach its end."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, set[int]] = {}
        self._ends: set[int] = set()
        self._written: set[int] = set()
        self._alive: list[Any] = []
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not follow what happens inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs), [])
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        made = tensors_in(output, [])
        self._alive.append((given, made))
        read = {_memory(tensor) for tensor in given}
        written = {_memory(t) for t, version in zip(given, versions, strict=True) if t._version != version}
        self._written |= written
        for target in written.union(map(_memory, made)):
            self._sources.setdefault(target, set()).update(read)
        if not made and getattr(func, "__name__", "") in ESCAPES:
            self._ends |= read
        return output

    def live(self, leaves: Sequence[Sequence[Tensor]], handed: Sequence[Sequence[Tensor]], output: Any) -> set[Place]:
        """Name the recorded outputs that the pass's output depends on, that are written to, or irreplaceable.

        Args:
            leaves: the tensors of each recorded call's output.
            handed: what the pass was given for them.
            output: of the pass.
        """
        parts = pytree.tree_leaves(output)
        if not all(isinstance(part, (Tensor, *PLAIN)) for part in parts):  # something unknown may hold any of them
            return {(index, k) for index, recorded in enumerate(leaves) for k in range(len(recorded))}
        waiting = [*self._ends, *(_memory(part) for part in parts if isinstance(part, Tensor))]
        reached = set()
        while waiting:
            place = waiting.pop()
            if place not in reached:
                reached.add(place)
                waiting += self._sources.get(place, ())
        reached |= self._written
        return {
            (index, k)
            for index, recorded in enumerate(leaves)
            for k, leaf in enumerate(recorded)
            if not _replaceable(leaf) or not reached.isdisjoint((_memory(leaf), _memory(handed[index][k])))
        }


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _replaceable(tensor: Tensor) -> bool:
    """Say whether a placeholder may stand for this output: NaN must be able to give a wrongful use away."""
    dense = type(tensor) is Tensor and tensor.layout is torch.strided
    return dense and tensor.is_floating_point() and tensor.numel() > 1
