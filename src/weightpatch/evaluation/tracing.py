"""A network traced once, split where the edit begins, and run behind the split on recorded values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from .._calling import Inputs, Output, Params, length, read, rows, selected
from .products import Corrected, Shortcut
from .steps import Convolution, Step, Whole, fits, fused_steps, plain_steps

__all__ = ["Recorded", "Suffix", "Trace"]

_PRODUCTS = {"matmul", "bmm", "mm", "linear", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "bilinear"}
_PRODUCTS |= {"scaled_dot_product_attention", "multi_head_attention_forward"}
_WORKING_SET = 8 << 20  # bytes of the largest activation of one pass: what caches hold

Prepared = list[tuple[Step, Any]]


@final
class Trace:
    """The operations of a model's forward pass on tensors, and which of them an edit can change.

    Args:
        model: a private clone in eval mode.
        names: the edited parameters, by the model's own names.
        output: which tensor of a structured answer is meant.
        whole: treat everything behind the inputs as changed, so that nothing but the inputs has to be recorded.

    Raises:
        Exception: of any kind, where the forward pass cannot be traced: it branches on values, or computes with shapes.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], *, whole: bool = False, output: Output = None) -> None:
        if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
            raise TypeError("its modules have forward hooks, which a trace leaves out")
        graph = fx.Tracer().trace(model)
        own = dict(model.named_parameters(remove_duplicate=False))
        edited = {id(own[name]): name for name in names}
        self.inputs = [node for node in graph.nodes if node.op == "placeholder"]
        (answer,) = (node.args[0] for node in graph.nodes if node.op == "output")
        self.result, self.finds = _meant(answer, output)
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
        values: dict[fx.Node, Any] = {}
        if isinstance(batch, Mapping):
            values |= {node: batch[node.target] for node in self.inputs if node.target in batch}
        else:
            values |= zip(self.inputs, batch if isinstance(batch, tuple) else (batch,), strict=False)
        for step in self.before:
            _advance(step, step.weights({}, torch.float32), values)
        cut = tuple(values[node] for node in self.cuts)
        if not all(isinstance(value, Tensor) and value.ndim and len(value) == length(batch) for value in cut):
            raise TypeError("what reaches the edited part is not one tensor a test item")
        return cut


@final
class Recorded:
    """What a whole test set makes of some nodes of a trace: one tensor (n, ...) for each, channels last.

    Args:
        values: of the nodes.
        strides: of one item at the split as the model makes it, so that a pass of a batch can be repeated bit for bit.
    """

    def __init__(self, values: dict[fx.Node, Tensor], strides: dict[fx.Node, tuple[int, ...]]) -> None:
        self.values, self._strides = values, strides

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return sum(value.nbytes for value in self.values.values())

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
        strides = (value.stride() for value in first)
        return Recorded(dict(zip(trace.cuts, whole, strict=True)), dict(zip(trace.cuts, strides, strict=True)))

    def add(self, node: fx.Node, make: Callable[[slice], Tensor], size: int) -> None:
        """Record another node, which `make` makes of `size` items at once."""
        room = _room(make(slice(0, 1)), len(self))
        for start in range(0, len(self), size):
            room[start : start + size] = make(slice(start, start + size))
        self.values[node] = room

    def to(self, dtype: torch.dtype) -> Recorded:
        """Return a copy of the values at the split, with the floating-point ones in another dtype."""
        cuts = {node: self.values[node] for node in self._strides}
        return Recorded({k: v.to(dtype) if v.is_floating_point() else v for k, v in cuts.items()}, self._strides)

    def take(self, index: slice | Tensor) -> dict[fx.Node, Tensor]:
        """Return some items; indexed ones keep channels last."""
        if isinstance(index, slice):
            return {node: value[index] for node, value in self.values.items()}
        return {node: _gather(value, index) for node, value in self.values.items()}

    def original(self, index: slice) -> dict[fx.Node, Tensor]:
        """Return some items at the split as the model itself makes them, copied."""
        cuts = ((node, self.values[node][index], strides) for node, strides in self._strides.items())
        return {
            node: torch.empty_strided(v.shape, strides, dtype=v.dtype, device=v.device).copy_(v)
            for node, v, strides in cuts
        }


@final
class Suffix:
    """The part of a traced model that an edit can change, in one dtype, on recorded values.

    Args:
        trace: of the model.
        recorded: the values at the split in this dtype, of which a few are run once, to see what the pass needs.
        dtype: of weights and activations; a linear layer that makes the logits is always in float32, since rounding
            them is most of what a narrower dtype would change.
        room: bytes of products that may be recorded too, once an edit is found that is faster with them.
        plain: run what the model does, bit for bit, on values as it makes them; faster steps, to rounding, otherwise.
    """

    def __init__(
        self, trace: Trace, recorded: Recorded, dtype: torch.dtype, *, room: int = 0, plain: bool = False
    ) -> None:
        self.trace, self.dtype, self._recorded, self._plain = trace, dtype, recorded, plain
        self._steps = trace.plain if plain else trace.fused
        self._head = _head(self._steps, trace.result) if dtype == torch.bfloat16 else None
        self._fixed = {step: self._weights(step, {}) for step in self._steps if not step.edited}
        self._fixed_fit = _fit(self._fixed.values())
        self._last = _last_uses(self._steps, trace.result)
        self._shortcuts: dict[Step, Shortcut] = {}
        self._dirty, self._chunk = self._tried()
        if not self._dirty:
            self._shortcuts = dict(self._affordable(room))

    def _tried(self) -> tuple[bool, int]:
        """Run four items: does the pass change what is recorded, and how many items fit the caches at once?"""
        cut = {node: value.clone() for node, value in self._recorded.take(slice(0, 4)).items()}
        versions, largest = [value._version for value in cut.values()], 1
        values: dict[fx.Node, Any] = dict(cut)
        for step, weights in self.prepare({}):
            self._advance(step, weights, values)
            if isinstance(value := values[step.node], Tensor):
                largest = max(largest, value.nbytes // min(4, len(self._recorded)))
        dirty = any(value._version != version for value, version in zip(cut.values(), versions, strict=True))
        return dirty, max(32, min(2000, _WORKING_SET // largest))

    def _affordable(self, room: int) -> Iterator[tuple[Step, Shortcut]]:
        for step in self._steps:
            x = self._recorded.values.get(step.args[0]) if step.args else None
            if x is None or x.device.type != "cpu" or not isinstance(step, Convolution) or not step.edited:
                continue
            if step.conv.groups == 1 and (shortcut := Shortcut(step, x, self._chunk)).nbytes <= room:
                room -= shortcut.nbytes
                yield step, shortcut

    def prepare(self, params: Params) -> Prepared:
        """Return the steps to run for these edited parameters, with their weights."""
        return [(s, self._fixed[s]) if s in self._fixed else self._edited(s, params) for s in self._steps]

    def _edited(self, step: Step, params: Params) -> tuple[Step, Any]:
        shortcut = self._shortcuts.get(step)
        weights = None if shortcut is None else shortcut.weights(params)
        if shortcut is None or weights is None:
            return step, self._weights(step, params)
        if (product := shortcut.step.args[0]) not in self._recorded.values:
            self._recorded.add(product, shortcut.product, self._chunk)
        return shortcut.step, weights

    def _weights(self, step: Step, params: Params) -> Any:
        return step.weights(params, torch.float32 if step is self._head else self.dtype)

    def _advance(self, step: Step, weights: Any, values: dict[fx.Node, Any]) -> None:
        if step is self._head:
            for node in _nodes(step):
                values[node] = values[node].float()
        _advance(step, weights, values)

    def run(self, prepared: Prepared, cut: dict[fx.Node, Tensor]) -> Tensor:
        """Return the logits of one batch in float32, shape (n, classes); NaN where a value on the way may overflow.

        Where it does, other operations make something else of it: a fused rectifier turns NaN into 0.
        """
        values: dict[fx.Node, Any] = {node: v.clone() if self._dirty else v for node, v in cut.items()}
        fine: list[Tensor] = []
        for step, weights in prepared:
            if not self._plain and _multiplies(step):
                fine += [fits(values[node]) for node in _nodes(step) if isinstance(values[node], Tensor)]
            self._advance(step, weights, values)
            for node in self._last.get(step.node, ()):
                del values[node]
        found = selected(values[self.trace.result], self.trace.finds)
        return found.where(torch.stack(fine).all(), torch.nan) if fine else found

    def fits(self, prepared: Prepared) -> bool:
        """Say whether the weights of all steps are far from overflow."""
        return self._fixed_fit and _fit(weights for step, weights in prepared if step not in self._fixed)

    def first(self, prepared: Prepared) -> Tensor:
        """Return the logits of as many items as are run at once."""
        return self.run(prepared, self._recorded.take(slice(0, self._chunk)))

    def over(self, prepared: Prepared) -> Tensor:
        """Return the logits of all items, shape (n, classes), float32."""
        n, size = len(self._recorded), self._chunk
        return torch.cat([self.run(prepared, self._recorded.take(slice(a, a + size))) for a in range(0, n, size)])

    def some(self, prepared: Prepared, index: Tensor) -> Tensor:
        """Return the logits of the items in `index`, shape (len(index), classes), float32."""
        parts: tuple[Tensor, ...] = torch.split(index, self._chunk)
        return torch.cat([self.run(prepared, self._recorded.take(part)) for part in parts])


def _meant(answer: Any, output: Output) -> tuple[fx.Node, Output]:
    """Return the node of the tensor that is meant, and what is left to do with its value."""
    found = answer
    if not isinstance(answer, fx.Node):
        found = read(answer) if output is None else answer[output] if not callable(output) else None
        output = None
    if not isinstance(found, fx.Node) or isinstance(output, (str, int)):
        raise TypeError("the model's answer is not one tensor, or one of a tuple or mapping")
    return found, output


def _advance(step: Step, weights: Any, values: dict[fx.Node, Any]) -> None:
    args = fx.node.map_arg(step.args, values.__getitem__)
    kwargs = fx.node.map_arg(step.kwargs, values.__getitem__) if step.kwargs else {}
    values[step.node] = step.run(weights, *args, **kwargs)


def _nodes(step: Step) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((step.args, step.kwargs), found.append)
    yield from found


def _multiplies(step: Step) -> bool:
    """Say whether a step makes sums of products, in an order of its own."""
    named = getattr(getattr(step, "function", None), "__name__", "")
    module = isinstance(step, Whole) and any(True for _ in step.module.parameters())
    return module or isinstance(step, (Convolution, Corrected)) or named in _PRODUCTS


def _fit(weights: Iterable[Any]) -> bool:
    return all(bool(fits(tensor)) for some in weights for tensor in _tensors(some))


def _tensors(weights: Any) -> Iterator[Tensor]:
    for part in weights if isinstance(weights, tuple) else (weights,):
        if isinstance(part, nn.Module):
            yield from part.state_dict().values()
        elif isinstance(part, dict):
            yield from part.values()
        elif isinstance(part, Tensor):
            yield part


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


def _last_uses(steps: list[Step], result: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """Return the values that are not needed any more when a node is done."""
    last: dict[fx.Node, fx.Node] = {}
    for step in steps:
        for node in (step.node, *_nodes(step)):
            last[node] = step.node
    last.pop(result, None)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        found.setdefault(user, []).append(node)
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
