"""Which batches were recorded: by the identity of their tensors, which are held weakly."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .passes import Recording

__all__ = ["Mark", "Recordings", "marked", "unchanged"]

Mark = tuple[weakref.ref[Tensor], int]  # a tensor, held weakly, and its version


class _Kept(NamedTuple):
    """A batch that was seen, and what was recorded of it."""

    marks: list[Mark]
    recording: Recording | None = None
    nbytes: int = 0


class Recordings:
    """The last recordings by the identity of their inputs, which are held weakly.

    Args:
        capacity: how many are kept whatever their size.
        most: how many are kept while all together take no more than `nbytes`, as small ones do of many demands.
        nbytes: of memory.
    """

    def __init__(self, capacity: int = 8, most: int = 512, nbytes: int = 2**27) -> None:
        self._capacity, self._most, self._nbytes, self._misses = capacity, most, nbytes, 0
        self._kept: OrderedDict[Any, _Kept] = OrderedDict()

    def key(self, tensors: Sequence[Tensor], rest: list[Any], device: torch.device) -> Any:
        """Identify a batch: which tensors, in what structure, under which autocast."""
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return (*map(id, tensors), *rest, cast)

    def find(self, key: Any, tensors: Sequence[Tensor]) -> Recording | None:
        """Return the recording of these very tensors, unless one of them was changed since."""
        kept = self._kept.get(key)
        if kept is None or kept.recording is None or not unchanged(kept.marks, tensors):
            return None
        self._kept.move_to_end(key)
        self._misses = 0
        return kept.recording

    def worthwhile(self, key: Any, tensors: Sequence[Tensor]) -> bool:
        """Say whether to record a batch.

        A new one, but not while ever new ones arrive; one that is seen again where there is room, or where a recording
        has not been used since: so that more batches in turn than there is room for do not drive each other out.
        """
        kept = self._kept.get(key)
        if kept is not None and unchanged(kept.marks, tensors):
            if self._room() or next(name for name, one in self._kept.items() if one.recording or name == key) != key:
                return True
            self._kept.move_to_end(key)
            return False
        self._misses += 1
        if self._misses > self._capacity:
            self._put(key, _Kept(marked(tensors)))
        return self._misses <= self._capacity

    def add(self, key: Any, tensors: Sequence[Tensor], recording: Recording) -> None:
        """Keep a recording, and drop those of tensors that are gone, and the oldest where there is no room."""
        self._kept = OrderedDict(kept for kept in self._kept.items() if _alive(kept[1].marks))
        self._kept.pop(key, None)
        made = _Kept(marked(tensors), recording, recording.nbytes)
        while not self._room(made.nbytes):
            del self._kept[next(name for name, one in self._kept.items() if one.recording)]
        self._put(key, made)

    def _room(self, nbytes: int | None = None) -> bool:
        """Say whether a recording of this size fits, or one like the largest."""
        sizes = [one.nbytes for one in self._kept.values() if one.recording]
        if len(sizes) < self._capacity:
            return True
        return sum(sizes) + (max(sizes) if nbytes is None else nbytes) <= self._nbytes

    def _put(self, key: Any, kept: _Kept) -> None:
        self._kept[key] = kept
        self._kept.move_to_end(key)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)


def _alive(marks: list[Mark]) -> bool:
    return all(ref() is not None for ref, _ in marks)


def marked(tensors: Sequence[Tensor]) -> list[Mark]:
    """Return what `unchanged` knows tensors by."""
    return [(weakref.ref(tensor), tensor._version) for tensor in tensors]


def unchanged(marks: Sequence[Mark], tensors: Sequence[Tensor]) -> bool:
    """Say whether these are the very tensors that were marked, and as they were."""
    return len(marks) == len(tensors) and all(
        ref() is tensor and tensor._version == version for (ref, version), tensor in zip(marks, tensors, strict=True)
    )
