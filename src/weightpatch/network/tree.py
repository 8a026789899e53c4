"""What a call is given and returns, as flat lists of tensors; quick, since every replayed call needs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["PLAIN", "copied", "equal", "flatten", "flatten_call", "leaves_of", "tensors_in"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

PLAIN = (
    type(None), bool, int, float, complex, str, bytes,
    torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Any], bool]:
    """Return the tensors of a call's arguments, constants and structure, and whether nothing else was among them."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return [args[0]], [1], True
    tensors: list[Tensor] = []
    rest: list[Any] = [len(args), *kwargs]
    known = all(flatten(value, tensors, rest) for value in (*args, *kwargs.values()))
    return tensors, rest, known


def flatten(value: Any, tensors: list[Tensor], rest: list[Any]) -> bool:
    """Append the tensors of nested tuples, lists and dicts to `tensors`, constants and structure to `rest`.

    Returns False where anything else is met: its contents, and what a call does to it, are not known.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return True
    if isinstance(value, PLAIN) and not isinstance(value, torch.Size):
        rest.append(value)
        return True
    if isinstance(value, (tuple, list)):
        rest.append((type(value), len(value)))
        for item in value:  # noqa: SIM110 - a generator would double the time of a replay
            if not flatten(item, tensors, rest):
                return False
        return True
    if isinstance(value, dict):
        rest.append((type(value), *value))
        return all(flatten(item, tensors, rest) for item in value.values())
    return isinstance(value, PLAIN)


def leaves_of(value: Any) -> tuple[list[Tensor], bool]:
    """Return the tensors of any registered pytree, and whether all other leaves are plain constants."""
    leaves = pytree.tree_leaves(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves)


def tensors_in(value: Any, found: list[Tensor]) -> list[Tensor]:
    """Append the tensors of what a torch function is given or returns to `found`, and return it."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            tensors_in(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            tensors_in(item, found)
    return found


def _opened(answer: Any) -> list[Tensor]:
    """Return the tensors of an answer, also those that are attributes of an object, as of a dataclass."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(answer):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif not isinstance(leaf, (type, nn.Module, *PLAIN)):
            found += [leaf for leaf in pytree.tree_leaves(getattr(leaf, "__dict__", {})) if isinstance(leaf, Tensor)]
    return found


def copied(inputs: Any) -> Any:
    """Copy every tensor of a structure, without its graph."""
    made = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)
    return made


def equal(one: Any, two: Any, *, exactly: bool = False) -> bool:
    """Compare all tensors of two answers, up to rounding unless `exactly`."""
    first, second = ([leaf.detach() for leaf in _opened(answer)] for answer in (one, two))
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.layout is not torch.strided or not a.numel():
            continue
        if exactly or not a.is_floating_point():
            if not torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)) or not torch.equal(a.isnan(), b.isnan()):
                return False
        else:
            size = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
            tolerance = _TOLERANCE.get(a.dtype, 1e-2)
            if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True):
                return False
    return True
