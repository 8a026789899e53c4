"""The steps of a traced network in any dtype: channels last, batch normalisation folded into convolutions."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._calling import Params

__all__ = [
    "Convolution",
    "Halving",
    "Step",
    "Whole",
    "channels_last",
    "convolve",
    "fits",
    "fused_steps",
    "plain_steps",
]

# Up to here a sum of a million products of a weight and a value overflows in no order, and not even squared beforehand
_LARGEST = 1e15

_ADDS = (operator.add, operator.iadd, torch.add)
_ACTIVATIONS = (F.relu, torch.relu, "relu", "relu_")


@dataclass(eq=False)
class Step:
    """One operation: named inputs to one named value.

    Attributes:
        node: the node of the trace whose value it makes.
        args, kwargs: its arguments; nodes stand for their values.
        edited: whether its weights can change.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    edited: bool

    def weights(self, params: Params, dtype: torch.dtype) -> Any:
        """Return the weights that `run` takes, in this dtype, with these edited parameters in place of the model's."""
        return None

    def run(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the value."""
        raise NotImplementedError


@dataclass(eq=False)
class Call(Step):
    """A function or a method of a tensor, as it was traced."""

    function: Callable[..., Any] = field(default=None)  # type: ignore[assignment]

    def run(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@dataclass(eq=False)
class Constant(Step):
    """A parameter or buffer that the forward pass reads itself."""

    value: Tensor = field(default=None)  # type: ignore[assignment]
    name: str = ""

    def weights(self, params: Params, dtype: torch.dtype) -> Tensor:
        value = params.get(self.name, self.value)
        return value.to(dtype) if value.is_floating_point() else value

    def run(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        return weights


@dataclass(eq=False)
class Whole(Step):
    """Any other module, run as it is on converted weights; `names` maps its parameters' own names to the model's."""

    module: nn.Module = field(default=None)  # type: ignore[assignment]
    names: dict[str, str] = field(default_factory=dict)

    def weights(self, params: Params, dtype: torch.dtype) -> tuple[nn.Module, Params]:
        """Return the module in this dtype, converted once, and its edited parameters by its own names."""
        key = f"_{dtype}"
        if key not in self.__dict__:
            same = all(t.dtype == dtype for t in self.module.state_dict().values() if t.is_floating_point())
            setattr(self, key, self.module if same else copy.deepcopy(self.module).to(dtype))
        return getattr(self, key), {own: params[name].to(dtype) for own, name in self.names.items() if name in params}

    def run(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        module, changed = weights
        return torch.func.functional_call(module, changed, args, kwargs) if changed else module(*args, **kwargs)


@dataclass(eq=False)
class Convolution(Step):
    """A convolution, with the batch normalisation, the addition and the rectifier that follow it.

    In eval mode ``BN(W x + b) = s (W x) + s (b - mean) + bias`` with ``s = weight / √(var + ε)``.
    """

    conv: nn.Conv2d = field(default=None)  # type: ignore[assignment]
    product: fx.Node = field(default=None)  # type: ignore[assignment]  # whose value is the convolution alone
    norm: nn.BatchNorm2d | None = None
    relu: bool = False
    adds: bool = False  # its second argument is added to the result
    names: dict[int, str] = field(default_factory=dict)  # ids of parameters -> names in the model

    def _now(self, params: Params, p: Tensor | None) -> Tensor | None:
        return None if p is None else params.get(self.names.get(id(p), ""), p).detach()

    def kernel(self, params: Params) -> Tensor:
        """Return the convolution's own weights W, edited."""
        weight = self._now(params, self.conv.weight)
        assert weight is not None
        return weight

    def affine(self, params: Params) -> tuple[Tensor | None, Tensor | None]:
        """Return what ``W x`` is multiplied by and what is added then, each (out,), edited; None for nothing."""
        bias = self._now(params, self.conv.bias)
        if self.norm is None:
            return None, bias
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert var is not None
        gain, shift = (self._now(params, p) for p in (self.norm.weight, self.norm.bias))
        scale = (var + self.norm.eps).rsqrt() if gain is None else gain * (var + self.norm.eps).rsqrt()
        return scale, (0 if bias is None else bias) * scale - mean * scale + (0 if shift is None else shift)

    def weights(self, params: Params, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return ``s W`` and the shift."""
        weight, (scale, shift) = self.kernel(params), self.affine(params)
        weight = weight if scale is None else weight * scale[:, None, None, None]
        return channels_last(weight.to(dtype)), None if shift is None else shift.to(dtype)

    def run(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        """Convolve, with all that follows."""
        weight, bias = weights
        return convolve(args[0], weight, bias, self.conv, relu=self.relu, other=args[1] if self.adds else None)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    like: nn.Conv2d | None = None,
    *,
    relu: bool = False,
    other: Tensor | None = None,
) -> Tensor:
    """Convolve with the strides and so on of `like`, or with none; add `other`; rectify: in one pass if possible."""
    padding, stride, dilation, groups = where = _where(like)
    y: Tensor
    if x.device.type == "cpu" and _pointwise(x.dtype):
        if other is None:
            kind = "relu" if relu else "none"
            y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *where, kind, [], "")
        else:
            binary, kind_after = torch.ops.mkldnn._convolution_pointwise.binary, "relu" if relu else None
            y = binary(x, other, weight, bias, *where, "add", 1.0, kind_after, [], None)
        return y
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y = y if other is None else y.add_(other)
    return y.relu_() if relu else y


def _where(like: nn.Conv2d | None) -> tuple[Any, Any, Any, int]:
    if like is None:
        return (0, 0), (1, 1), (1, 1), 1
    return like.padding, like.stride, like.dilation, like.groups


@functools.cache
def _pointwise(dtype: torch.dtype) -> bool:
    """Say whether this machine has convolutions that do what follows them in the same pass."""
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(eq=False)
class Halving(Step):
    """A 2×2 maximum with stride 2: two elementwise maxima, which are faster than the pooling kernel.

    Bfloat16 numbers that are not negative are in the order of their bits, which integers compare faster.
    """

    positive: bool = False

    def run(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the maxima."""
        x = args[0]
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            return F.max_pool2d(x, 2)
        bits = self.positive and x.dtype == torch.bfloat16
        x = x.view(torch.int16) if bits else x
        x = torch.maximum(x[:, :, 0::2], x[:, :, 1::2])
        x = torch.maximum(x[:, :, :, 0::2], x[:, :, :, 1::2])
        return x.view(torch.bfloat16) if bits else x


def fits(tensor: Tensor) -> Tensor:
    """Say whether all numbers of a tensor are far from overflow, and none is NaN: bool, a scalar on its device."""
    dense = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor  # which copies nothing of channels last
    flat = dense.reshape(-1)
    if not len(flat) or not flat.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    low, high = torch.aminmax(flat)
    return (low >= -_LARGEST) & (high <= _LARGEST)


def channels_last(tensor: Tensor) -> Tensor:
    """Return a 4-dimensional tensor with channels last, in its strides also where a dimension is 1."""
    if tensor.ndim != 4:
        return tensor.contiguous()
    n, c, h, w = tensor.shape
    strides = (c * h * w, 1, w * c, c)
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided((n, c, h, w), strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def plain_steps(nodes: Iterable[fx.Node], model: nn.Module, names: Mapping[int, str]) -> list[Step]:
    """Turn the nodes of a trace, in order, into steps that compute just what the model does, bit for bit.

    Args:
        nodes: of a trace of the model.
        model: what was traced.
        names: the names of the edited parameters, by their ids.
    """
    modules = dict(model.named_modules())
    return [_step(node, model, modules, names) for node in nodes]


def fused_steps(nodes: Sequence[fx.Node], model: nn.Module, names: Mapping[int, str]) -> list[Step]:
    """Do the same with fewer and faster steps, to rounding."""
    modules = dict(model.named_modules())
    taken: set[fx.Node] = set()
    steps: dict[fx.Node, Step] = {}
    for node in nodes:
        if _calls(modules, node, nn.Conv2d):
            step, chain = _convolution(node, modules, names, taken)
            taken |= chain
            steps[step.node] = step
    for node in nodes:
        if node not in taken:
            steps[node] = _halving(node, modules, steps) or _step(node, model, modules, names)
    return [steps[node] for node in nodes if node in steps]


def _calls(modules: Mapping[str, nn.Module], node: fx.Node, kind: type[nn.Module]) -> bool:
    """Say whether a node calls exactly this kind of module, without hooks."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _rectifies(modules: Mapping[str, nn.Module], node: fx.Node) -> bool:
    return _calls(modules, node, nn.ReLU) or (
        node.op in ("call_function", "call_method") and node.target in _ACTIVATIONS
    )


def _convolution(
    node: fx.Node, modules: Mapping[str, nn.Module], names: Mapping[int, str], taken: set[fx.Node]
) -> tuple[Step, set[fx.Node]]:
    """Follow a convolution through what can be done in one pass with it; return the step and its nodes."""
    conv = modules[str(node.target)]
    assert isinstance(conv, nn.Conv2d)
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or len(node.args) != 1:
        return _whole(node, conv, names), {node}
    step = Convolution(node, node.args, {}, False, conv, node)
    follower = _only_user(node)
    if follower is not None and _calls(modules, follower, nn.BatchNorm2d):
        norm = modules[str(follower.target)]
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.running_mean is not None:
            step.norm, step.node, follower = norm, follower, _only_user(follower)
    if follower is not None and follower not in taken and (other := _addend(follower, step.node)) is not None:
        step.adds, step.args, step.node, follower = True, (*step.args, other), follower, _only_user(follower)
    if follower is not None and _rectifies(modules, follower):
        step.relu, step.node = True, follower
    owned = [p for module in (conv, step.norm) if module is not None for p in module.parameters()]
    step.names = {id(p): names[id(p)] for p in owned if id(p) in names}
    step.edited = bool(step.names)
    return step, _chain(node, step.node)


def _addend(node: fx.Node, mine: fx.Node) -> fx.Node | None:
    """Return what a node adds to `mine`, where it is another tensor that is made before `mine`'s own chain ends."""
    if not (node.op == "call_function" and node.target in _ADDS and len(node.args) == 2 and not node.kwargs):
        return None
    others = [arg for arg in node.args if arg is not mine]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _chain(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    found, node = {first}, first
    while node is not last:
        node = next(iter(node.users))
        found.add(node)
    return found


def _whole(node: fx.Node, module: nn.Module, names: Mapping[int, str]) -> Whole:
    own = {name: names[id(p)] for name, p in module.named_parameters() if id(p) in names}
    return Whole(node, node.args, dict(node.kwargs), bool(own), module, own)


def _step(node: fx.Node, model: nn.Module, modules: Mapping[str, nn.Module], names: Mapping[int, str]) -> Step:
    if node.op == "call_module":
        return _whole(node, modules[str(node.target)], names)
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(model)
        if not isinstance(value, Tensor):
            raise TypeError(f"the forward pass reads {node.target}, which is no tensor")
        return Constant(node, (), {}, id(value) in names, value, names.get(id(value), ""))
    if node.op == "call_method":
        return Call(node, node.args, dict(node.kwargs), False, _method(str(node.target)))
    assert callable(node.target)
    return Call(node, node.args, dict(node.kwargs), False, node.target)


def _halving(node: fx.Node, modules: Mapping[str, nn.Module], steps: Mapping[fx.Node, Step]) -> Step | None:
    if not (_calls(modules, node, nn.MaxPool2d) and len(node.args) == 1 and _halves(modules[str(node.target)])):
        return None
    maker = steps.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    return Halving(node, node.args, {}, False, isinstance(maker, Convolution) and maker.relu)


def _method(name: str) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def _halves(module: nn.Module) -> bool:
    pair = {2, (2, 2)}
    return (
        isinstance(module, nn.MaxPool2d)
        and module.kernel_size in pair
        and module.stride in pair
        and module.padding in (0, (0, 0))
        and module.dilation in (1, (1, 1))
        and not (module.ceil_mode or module.return_indices)
    )
