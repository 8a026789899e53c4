"""Labelled images on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

    from ..tasks.images import LabelledImages

SHIPPED = "fashion-mnist"


def load_data(where: str, mean: tuple[float, ...], std: tuple[float, ...], size: int | None) -> LabelledImages:
    """Load `fashion-mnist` (the shipped test images) or a path: .npz, IDX files, CIFAR-10, a folder a class."""
    from ..tasks import images

    if where == SHIPPED:
        return images.fashion_test()
    path = Path(where)
    if not path.exists():
        raise InvalidInput(f"{where} does not exist; expected {SHIPPED!r}, an .npz file, or a folder of images")
    return images.load(path, size=size, mean=_plain(mean), std=_plain(std))


def class_index(label: str, classes: tuple[str, ...]) -> int:
    """Read a class by its name or its number."""
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    raise InvalidInput(
        f"--label was given {label!r}; expected a number below {len(classes)} or one of {', '.join(classes)}"
    )


def item_index(items: tuple[int, ...], data: LabelledImages) -> Tensor:
    """Check the rows asked for."""
    import torch

    if not items or not all(0 <= item < len(data) for item in items):
        raise InvalidInput(f"--item was given {list(items)}; expected rows from 0 to {len(data) - 1}")
    return torch.tensor(items, device="cpu")


def asked_names(where: str, data: LabelledImages, items: tuple[int, ...]) -> list[str]:
    """Say which rows of which data were asked for, with the files that they are."""
    found = []
    for item in items:
        name = data.names[item]
        found.append(f"row {item} of {Path(where).name}" + (f": {name}" if isinstance(name, str) else ""))
    return found


def hold_back(data: LabelledImages, n: int) -> tuple[LabelledImages, LabelledImages]:
    """Split off n images, at most a quarter, that hold edits back; what changes is measured on the others."""
    import torch

    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0), device="cpu")
    n = min(n, len(data) // 4)
    return data[order[:n]], data[order[n:].sort().values]


def _plain(values: tuple[float, ...]) -> float | tuple[float, ...]:
    return values[0] if len(values) == 1 else values
