"""A network traced once, split where the edit begins, and run behind the split on recorded values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from .._calling import Inputs, Params, length, outputs, rows
from .steps import Step, Whole, fused_steps, plain_steps

__all__ = ["Recorded", "Suffix", "Trace"]

_WORKING_SET = 8 << 20  # bytes of the largest activation of one pass: what caches hold


@final
class Trace:
    """The operations of a model's forward pass on tensors, and which of them an edit can change.

    Args:
        model: a private clone in eval mode.
        names: the edited parameters, by the model's own names.
        whole: treat everything behind the inputs as changed, so that nothing but the inputs has to be recorded.

    Raises:
        Exception: of any kind, where the forward pass cannot be traced: it branches on values, or computes with shapes.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], *, whole: bool = False) -> None:
        graph = fx.Tracer().trace(model)
        own = dict(model.named_parameters(remove_duplicate=False))
        edited = {id(own[name]): name for name in names}
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        (self.result,) = (node.args[0] for node in graph.nodes if node.op == "output")
        steps = plain_steps([n for n in graph.nodes if n.op not in ("placeholder", "output")], model, edited)
        changed: set[fx.Node] = set()
        for step in steps:
            if whole or step.edited or changed.intersection(_nodes(step)):
                changed.add(step.node)
        if self.result not in changed:
            raise TypeError("the model's answer is not one tensor that depends on the edit")
        self.plain = _with_constants([step for step in steps if step.node in changed], steps)
        self.fused = fused_steps([step.node for step in self.plain], model, edited)
        made = {step.node for step in self.plain}
        self.cuts = tuple(dict.fromkeys(node for step in self.plain for node in _nodes(step) if node not in made))
        self.before = _upto(self.cuts, {step.node: step for step in steps})

    def record(self, batch: Inputs) -> tuple[Tensor, ...]:
        """Return the values at the split for one batch, each (n, ...)."""
        given = batch if isinstance(batch, tuple) else tuple(batch.values()) if isinstance(batch, dict) else (batch,)
        values: dict[fx.Node, Any] = dict(zip(self.inputs, given, strict=False))
        for step in self.before:
            _advance(step, step.weights({}, torch.float32), values)
        cut = tuple(values[node] for node in self.cuts)
        if not all(isinstance(value, Tensor) and value.ndim and len(value) == length(batch) for value in cut):
            raise TypeError("what reaches the edited part is not one tensor a test item")
        return cut


@final
class Recorded:
    """The values at the split for a whole test set: one tensor (n, ...) for each cut, channels last.

    Args:
        cuts: the tensors.
        strides: of one item as the model makes it, so that a pass of a batch can be repeated bit for bit.
    """

    def __init__(self, cuts: tuple[Tensor, ...], strides: tuple[tuple[int, ...], ...]) -> None:
        self.cuts, self._strides = cuts, strides

    def __len__(self) -> int:
        return len(self.cuts[0])

    @staticmethod
    def of(trace: Trace, inputs: Inputs, batch_size: int) -> Recorded:
        """Run the part of the model before the split once, in batches."""
        n = length(inputs)
        first = trace.record(rows(inputs, slice(0, batch_size)))
        whole = tuple(_room(value, n) for value in first)
        for start in range(0, n, batch_size):
            cut = first if start == 0 else trace.record(rows(inputs, slice(start, start + batch_size)))
            for room, value in zip(whole, cut, strict=True):
                room[start : start + len(value)] = value
        return Recorded(whole, tuple(value.stride() for value in first))

    def to(self, dtype: torch.dtype) -> Recorded:
        """Return a copy with the floating-point cuts in another dtype."""
        return Recorded(tuple(v.to(dtype) if v.is_floating_point() else v for v in self.cuts), self._strides)

    def take(self, index: slice | Tensor) -> tuple[Tensor, ...]:
        """Return some items; indexed ones keep channels last."""
        if isinstance(index, slice):
            return tuple(value[index] for value in self.cuts)
        return tuple(_gather(value, index) for value in self.cuts)

    def original(self, index: slice) -> tuple[Tensor, ...]:
        """Return some items as the model itself makes them, copied."""
        pairs = zip(self.take(index), self._strides, strict=True)
        return tuple(
            torch.empty_strided(v.shape, strides, dtype=v.dtype, device=v.device).copy_(v) for v, strides in pairs
        )


@final
class Suffix:
    """The part of a traced model that an edit can change, in one dtype.

    Args:
        trace: of the model.
        dtype: of weights and activations; a linear layer that makes the logits is always in float32, since rounding
            them is most of what a narrower dtype would change.
        recorded: the values at the split in this dtype, of which a few are run once, to see what the pass needs.
        plain: run what the model does, bit for bit, on values as it makes them; faster steps, to rounding, otherwise.
    """

    def __init__(self, trace: Trace, dtype: torch.dtype, recorded: Recorded, *, plain: bool = False) -> None:
        self.trace, self.dtype = trace, dtype
        self._steps = trace.plain if plain else trace.fused
        self._head = _head(self._steps, trace.result) if dtype == torch.bfloat16 else None
        self._fixed = {step: self._weights(step, {}) for step in self._steps if not step.edited}
        self._last = _last_uses(self._steps, trace.result)
        self._dirty, self._chunk = self._tried(recorded)

    def _tried(self, recorded: Recorded) -> tuple[bool, int]:
        """Run four items: does the pass change what is recorded, and how many items fit the caches at once?"""
        cut = tuple(value.clone() for value in recorded.take(slice(0, 4)))
        versions, largest = [value._version for value in cut], 1
        values: dict[fx.Node, Any] = dict(zip(self.trace.cuts, cut, strict=True))
        weights = self.prepare({})
        for step in self._steps:
            self._advance(step, weights, values)
            if isinstance(value := values[step.node], Tensor):
                largest = max(largest, value.nbytes // len(cut[0]))
        dirty = any(value._version != version for value, version in zip(cut, versions, strict=True))
        return dirty, max(32, min(2000, _WORKING_SET // largest))

    def prepare(self, params: Params) -> dict[Step, Any]:
        """Return the weights of every step for these edited parameters."""
        return {**self._fixed, **{step: self._weights(step, params) for step in self._steps if step.edited}}

    def _weights(self, step: Step, params: Params) -> Any:
        return step.weights(params, torch.float32 if step is self._head else self.dtype)

    def _advance(self, step: Step, weights: dict[Step, Any], values: dict[fx.Node, Any]) -> None:
        if step is self._head:
            for node in _nodes(step):
                values[node] = values[node].float()
        _advance(step, weights[step], values)

    def run(self, weights: dict[Step, Any], cut: tuple[Tensor, ...]) -> Tensor:
        """Return the logits of one batch in float32, shape (n, classes)."""
        values: dict[fx.Node, Any] = dict(
            zip(self.trace.cuts, (v.clone() for v in cut) if self._dirty else cut, strict=True)
        )
        for step in self._steps:
            self._advance(step, weights, values)
            for node in self._last.get(step, ()):
                del values[node]
        found = values[self.trace.result]
        return outputs(lambda: found, ())

    def first(self, weights: dict[Step, Any], recorded: Recorded) -> Tensor:
        """Return the logits of as many items as are run at once."""
        return self.run(weights, recorded.take(slice(0, self._chunk)))

    def over(self, weights: dict[Step, Any], recorded: Recorded) -> Tensor:
        """Return the logits of all items, shape (n, classes), float32."""
        n, size = len(recorded), self._chunk
        return torch.cat([self.run(weights, recorded.take(slice(a, a + size))) for a in range(0, n, size)])

    def some(self, weights: dict[Step, Any], recorded: Recorded, index: Tensor) -> Tensor:
        """Return the logits of the items in `index`, shape (len(index), classes), float32."""
        parts: tuple[Tensor, ...] = torch.split(index, self._chunk)
        return torch.cat([self.run(weights, recorded.take(part)) for part in parts])


def _advance(step: Step, weights: Any, values: dict[fx.Node, Any]) -> None:
    args = fx.node.map_arg(step.args, values.__getitem__)
    kwargs = fx.node.map_arg(step.kwargs, values.__getitem__) if step.kwargs else {}
    values[step.node] = step.run(weights, *args, **kwargs)


def _nodes(step: Step) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((step.args, step.kwargs), found.append)
    yield from found


def _with_constants(after: list[Step], steps: list[Step]) -> list[Step]:
    """Add the constants that the part behind the split reads: they are weights, not values of test items."""
    used = {node for step in after for node in _nodes(step)} | {step.node for step in after}
    kept = {step.node for step in after} | {step.node for step in steps if step.node.op == "get_attr"} & used
    return [step for step in steps if step.node in kept]


def _upto(targets: tuple[fx.Node, ...], steps: dict[fx.Node, Step]) -> list[Step]:
    wanted, todo = set(), [node for node in targets if node in steps]
    while todo:
        node = todo.pop()
        if node in steps and node not in wanted:
            wanted.add(node)
            todo.extend(_nodes(steps[node]))
    return [step for node, step in steps.items() if node in wanted]


def _head(steps: list[Step], result: fx.Node) -> Step | None:
    last = steps[-1]
    return last if last.node is result and isinstance(last, Whole) and type(last.module) is nn.Linear else None


def _last_uses(steps: list[Step], result: fx.Node) -> dict[Step, list[fx.Node]]:
    last: dict[fx.Node, Step] = {}
    for step in steps:
        for node in (step.node, *_nodes(step)):
            last[node] = step
    last.pop(result, None)
    found: dict[Step, list[fx.Node]] = {}
    for node, step in last.items():
        found.setdefault(step, []).append(node)
    return found


def _room(value: Tensor, n: int) -> Tensor:
    """Return an empty tensor for n such items, channels last."""
    shape = (n, *value.shape[1:])
    if value.ndim != 4:
        return value.new_empty(shape)
    _, c, h, w = shape
    return torch.empty_strided(shape, (c * h * w, 1, w * c, c), dtype=value.dtype, device=value.device)


def _gather(value: Tensor, index: Tensor) -> Tensor:
    if value.ndim != 4:
        return value[index]
    return value.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
