"""Nested values on a device, and as named tensors for a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["named_tensors", "placed"]


def placed(value: Any, device: torch.device) -> Any:
    """Return batches, constraints or episodes with every tensor on a device; what is there already stays itself."""
    if isinstance(value, Tensor):
        return value if _there(value, device) else value.to(device)
    if isinstance(value, Mapping):
        return {key: placed(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(placed(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {name: placed(item, device) for name, item in old.items()}
        moved = not all(_there(tensor, device) for _, tensor in named_tensors(value))
        return dataclasses.replace(value, **new) if moved else value
    return value


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a nested value with the path to it, as in `1.0.constraint.labels`."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from named_tensors(item, f"{name}.{number}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from named_tensors(getattr(value, field.name), f"{name}.{field.name}")


def _there(tensor: Tensor, device: torch.device) -> bool:
    """Say whether a tensor is on a device, which may be named without its number; a number of the CPU means nothing."""
    same = device.index is None or device.type == "cpu" or tensor.device.index == device.index
    return tensor.device.type == device.type and same
