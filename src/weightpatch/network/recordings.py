"""Which batches were recorded: by the identity of their tensors, which are held weakly."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .passes import Recording

__all__ = ["Recordings"]


class Recordings:
    """The last recordings by the identity of their inputs, which are held weakly."""

    def __init__(self, capacity: int = 8) -> None:
        self._capacity, self._misses = capacity, 0
        self._kept: OrderedDict[Any, tuple[list[tuple[weakref.ref[Tensor], int]], Recording | None]] = OrderedDict()

    def key(self, tensors: Sequence[Tensor], rest: list[Any], device: torch.device) -> Any:
        """Identify a batch: which tensors, in what structure, under which autocast."""
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return (*map(id, tensors), *rest, cast)

    def find(self, key: Any, tensors: Sequence[Tensor]) -> Recording | None:
        """Return the recording of these very tensors, unless one of them was changed since."""
        refs, recording = self._kept.get(key, ((), None))
        if recording is None or not self._same(refs, tensors):
            return None
        self._kept.move_to_end(key)
        self._misses = 0
        return recording

    def worthwhile(self, key: Any, tensors: Sequence[Tensor]) -> bool:
        """Say whether to record a new batch: not while ever new ones arrive, until one is seen again."""
        self._misses += 1
        if self._misses <= self._capacity:
            return True
        again = key in self._kept and self._same(self._kept[key][0], tensors)
        if not again:
            self._put(key, tensors, None)
        return again

    def add(self, key: Any, tensors: Sequence[Tensor], recording: Recording) -> None:
        """Keep a recording, and drop the oldest."""
        self._put(key, tensors, recording)

    def _put(self, key: Any, tensors: Sequence[Tensor], recording: Recording | None) -> None:
        self._kept[key] = ([(weakref.ref(tensor), tensor._version) for tensor in tensors], recording)
        self._kept.move_to_end(key)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    @staticmethod
    def _same(refs: Sequence[tuple[weakref.ref[Tensor], int]], tensors: Sequence[Tensor]) -> bool:
        return len(refs) == len(tensors) and all(
            ref() is tensor and tensor._version == version for (ref, version), tensor in zip(refs, tensors, strict=True)
        )
