"""Parts of a test set by what its user knows of the items: a camera, a language, a month."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InvalidInput, ShapeMismatch
from ..verdict import Paired
from .metrics import flips

__all__ = ["Column", "counted", "slices"]

Column = Tensor | Sequence[Hashable]

_MANY = 20  # different values that any column may have; above these, half of its items


def slices(columns: Mapping[str, Column], n: int) -> dict[str, Tensor]:
    """Return which items have each value of each column, as masks (n,), bool, on the CPU.

    A slice is named "column = value"; values that are equal, such as 1 and 1.0, are one. NaNs are one value.

    Args:
        columns: by its name, one value an item: a tensor (n,) or any sequence of n hashable values.
        n: how many items there are.

    Raises:
        ShapeMismatch: a column has not one value an item.
        InvalidInput: a value cannot be hashed, or nearly every item has one of its own, so that slices say nothing.

    >>> {name: mask.tolist() for name, mask in slices({"camera": ["left", "right", "left"]}, 3).items()}
    {'camera = left': [True, False, True], 'camera = right': [False, True, False]}
    """
    found: dict[str, Tensor] = {}
    for column, given in columns.items():
        for value, rows in _grouped(column, _values(column, given, n)).items():
            mask = torch.zeros(n, dtype=torch.bool, device="cpu")
            mask[rows] = True
            found[_free(f"{column} = {value}", found)] = mask
    return found


def counted(name: str, before: Tensor, after: Tensor, labels: Tensor, mask: Tensor | None = None) -> Paired:
    """Count what became of the answers of two models to all items, or to those of a slice or class.

    Args:
        name: of these items.
        before: the first model's classes, (n,).
        after: the second model's, (n,).
        labels: the right classes, (n,).
        mask: which items belong, bool, (n,); all when not given.
    """
    if mask is not None:
        before, after, labels = before[mask], after[mask], labels[mask]
    wrong, still = before != labels, after != labels
    found = flips(before != after, wrong.double(), still.double())
    return Paired(name, len(labels), found.broken, found.repaired, int(wrong.sum()), found.other)


def _values(column: str, given: Column, n: int) -> list[Hashable]:
    shape = tuple(given.shape) if isinstance(given, Tensor) else (len(given),)
    if shape != (n,):
        raise ShapeMismatch(
            f"the column {column!r} has shape {shape}; expected one value for each of the {n} items, shape ({n},)"
        )
    return given.tolist() if isinstance(given, Tensor) else list(given)


def _grouped(column: str, values: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = {}
    count = 0
    for count, value in enumerate(values, 1):
        try:
            found.setdefault("nan" if value != value else value, []).append(count - 1)
        except TypeError as error:
            raise InvalidInput(
                f"the column {column!r} has {value!r:.80} at item {count - 1}, which cannot be hashed; expected "
                "numbers, strings, tuples or the like"
            ) from error
    if len(found) > max(_MANY, count // 2):
        raise InvalidInput(
            f"the column {column!r} has {len(found)} different values for {count} items; expected few, with many items "
            "each. Put numbers into bins first"
        )
    return found


def _free(name: str, taken: Mapping[str, Tensor]) -> str:
    """Return a name that no slice has yet: values of different types may look alike."""
    return name if name not in taken else _free(f"{name}'", taken)
