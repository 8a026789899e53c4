"""What modules remember from one pass to the next: their buffers and attributes, watched and put back."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["State", "held", "sites"]

_CONTAINERS = (dict, OrderedDict, list, set, deque)
_IGNORED = {
    "forward",
    "training",
    "_flat_weights",
    "_flat_weight_refs",
}  # our wrappers; caches that RNNs check themselves
Place = tuple[nn.Module, str]


class State:
    """The attributes and buffers of a model's modules at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(module, dict(vars(module))) for module in model.modules()]
        self._marks = {(module, name): _mark(value) for module, known in self._saved for name, value in known.items()}
        tensors = {id(t): t for mark in self._marks.values() for t in mark if _is_state(t)}
        self._tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors.values()]

    def changed(self) -> list[Place]:
        """List the attributes that are not as they were."""
        places = []
        for module, known in self._saved:
            now = vars(module)
            for name in {**known, **now}:
                mark = self._marks.get((module, name))
                if name not in _IGNORED and (name not in now or mark is None or not _same(mark, _mark(now[name]))):
                    places.append((module, name))
        return places

    def restore(self) -> None:
        """Put all attributes and buffers back."""
        for module, known in self._saved:
            now = vars(module)
            for name in [name for name in now if name not in known and name not in _IGNORED]:
                del now[name]
            for name, value in known.items():
                if name in _IGNORED:
                    continue
                now[name] = value
                if isinstance(value, _CONTAINERS):
                    _refill(value, self._marks[module, name][2])
        for tensor, version, values in self._tensors:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.detach_().copy_(values)
        self._tensors = [(tensor, tensor._version, values) for tensor, _, values in self._tensors]
        self._marks = {place: _mark(vars(place[0])[place[1]]) for place in self._marks if place[1] not in _IGNORED}


def watch(places: list[Place]) -> list[Any]:
    """Return what these attributes hold now, to be compared with `unchanged`."""
    return [_mark(vars(module).get(name)) for module, name in places]


def unchanged(before: list[Any], after: list[Any]) -> bool:
    """Say whether two results of `watch` are the same."""
    return all(_same(a, b) for a, b in zip(before, after, strict=True))


def held(places: list[Place]) -> list[Tensor]:
    """List the tensors that these attributes hold."""
    return [part for module, name in places for part in _mark(vars(module).get(name)) if isinstance(part, Tensor)]


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _mark(value: Any) -> list[Any]:
    """Return [value, version, contents, *tensors and their versions]: enough to see any change."""
    if isinstance(value, Tensor):
        return [value, value._version, None]
    if not isinstance(value, _CONTAINERS):
        return [value, 0, None]
    contents = list(value.items()) if isinstance(value, dict) else list(value)
    parts = [part for item in contents for part in (item if isinstance(item, tuple) else (item,))]
    return [value, len(contents), contents, *(m for part in parts for m in (part, getattr(part, "_version", 0)))]


def _same(one: list[Any], two: list[Any]) -> bool:
    if len(one) != len(two):
        return False
    pairs = [*zip(one[:2], two[:2], strict=True), *zip(one[3:], two[3:], strict=True)]
    return all(a is b or (isinstance(a, (int, float, str)) and type(a) is type(b) and a == b) for a, b in pairs)


def _refill(container: Any, contents: list[Any]) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(contents)
    else:
        container.update(contents)


def sites(model: nn.Module, names: dict[int, str]) -> Iterator[tuple[Any, Any, str]]:
    """Find every place that holds one of these parameters: ties, and the lists that RNNs and others keep."""
    seen: set[int] = set()

    def visit(container: Any, depth: int) -> Iterator[tuple[Any, Any, str]]:
        if id(container) in seen:
            return
        seen.add(id(container))
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if id(value) in names:
                yield container, key, names[id(value)]
            elif depth and isinstance(value, (dict, list)):
                yield from visit(value, depth - 1)

    for module in model.modules():
        yield from visit(vars(module), 3)
