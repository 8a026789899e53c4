"""Which batches were recorded: by the identity of their tensors, which are held weakly."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .passes import Recording

__all__ = ["Mark", "Recordings", "marked", "unchanged"]

Mark = tuple[weakref.ref[Tensor], int]  # a tensor, held weakly, and its version


class Recordings:
    """The last recordings by the identity of their inputs, which are held weakly."""

    def __init__(self, capacity: int = 8) -> None:
        self._capacity, self._misses = capacity, 0
        self._kept: OrderedDict[Any, tuple[list[Mark], Recording | None]] = OrderedDict()

    def key(self, tensors: Sequence[Tensor], rest: list[Any], device: torch.device) -> Any:
        """Identify a batch: which tensors, in what structure, under which autocast."""
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return (*map(id, tensors), *rest, cast)

    def find(self, key: Any, tensors: Sequence[Tensor]) -> Recording | None:
        """Return the recording of these very tensors, unless one of them was changed since."""
        marks, recording = self._kept.get(key, ((), None))
        if recording is None or not unchanged(marks, tensors):
            return None
        self._kept.move_to_end(key)
        self._misses = 0
        return recording

    def worthwhile(self, key: Any, tensors: Sequence[Tensor]) -> bool:
        """Say whether to record a new batch: not while ever new ones arrive, until one is seen again."""
        self._misses += 1
        if self._misses <= self._capacity:
            return True
        again = key in self._kept and unchanged(self._kept[key][0], tensors)
        if not again:
            self._put(key, tensors, None)
        return again

    def add(self, key: Any, tensors: Sequence[Tensor], recording: Recording) -> None:
        """Keep a recording, and drop the oldest."""
        self._put(key, tensors, recording)

    def _put(self, key: Any, tensors: Sequence[Tensor], recording: Recording | None) -> None:
        self._kept[key] = (marked(tensors), recording)
        self._kept.move_to_end(key)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)


def marked(tensors: Sequence[Tensor]) -> list[Mark]:
    """Return what `unchanged` knows tensors by."""
    return [(weakref.ref(tensor), tensor._version) for tensor in tensors]


def unchanged(marks: Sequence[Mark], tensors: Sequence[Tensor]) -> bool:
    """Say whether these are the very tensors that were marked, and as they were."""
    return len(marks) == len(tensors) and all(
        ref() is tensor and tensor._version == version for (ref, version), tensor in zip(marks, tensors, strict=True)
    )
