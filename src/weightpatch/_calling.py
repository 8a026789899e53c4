"""How a model is called on one batch, and how one tensor is read from what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .errors import InvalidInput, NonFinite

Params: TypeAlias = dict[str, Tensor]
Function: TypeAlias = Callable[..., Any]
Inputs: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"


def call(function: Function, inputs: Inputs) -> Any:
    """Call `function` on a batch: a tensor is its argument, a tuple its positional, a mapping its keyword arguments."""
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, tuple) else function(inputs)


def outputs(function: Function, inputs: Inputs) -> Tensor:
    """Call `function` and read one tensor from its answer: the tensor itself, its `logits`, or its first item.

    Half-precision answers are widened to float32 (exactly), so that differences of them are not rounded again.
    """
    answer = read(call(function, inputs))
    if not isinstance(answer, Tensor):
        raise InvalidInput(
            f"the model returned {type(answer).__name__}; expected a tensor, an object with .logits, or a tuple that "
            "starts with a tensor; wrap the model in a module that returns its logits"
        )
    return answer.float() if answer.dtype in (torch.float16, torch.bfloat16) else answer


def read(answer: Any) -> Any:
    """Return what is taken for a model's answer: the thing itself, its `logits`, or its first item."""
    if isinstance(answer, Mapping) and "logits" in answer:
        return answer["logits"]
    if hasattr(answer, "logits"):
        return answer.logits
    return answer[0] if isinstance(answer, (tuple, list)) and answer else answer


def leaves(inputs: Inputs) -> Iterator[Tensor]:
    """Yield the tensors of a batch, in order."""
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    yield from (part for part in parts if isinstance(part, Tensor))


def length(inputs: Inputs) -> int:
    """Count the items of a batch: the first dimension of its first tensor."""
    return next((len(leaf) for leaf in leaves(inputs) if leaf.ndim), 0)


def rows(inputs: Inputs, index: slice | Tensor) -> Any:
    """Take some items of a batch; what is not a tensor stays as it is."""

    def take(part: Any) -> Any:
        return part[index] if isinstance(part, Tensor) and part.ndim else part

    if isinstance(inputs, Mapping):
        return {name: take(part) for name, part in inputs.items()}
    return tuple(take(part) for part in inputs) if isinstance(inputs, tuple) else take(inputs)


def describe(inputs: Inputs) -> str:
    """Say what a batch holds, for error messages: shapes, dtypes, devices."""
    return (
        ", ".join(f"{tuple(leaf.shape)} {str(leaf.dtype)[6:]} on {leaf.device}" for leaf in leaves(inputs))
        or "no tensor"
    )


def check_batch(inputs: Inputs, who: str) -> int:
    """Refuse an empty batch and NaN or Inf in it; return its length."""
    n = length(inputs)
    if n == 0:
        raise InvalidInput(
            f"{who} was given an empty batch ({describe(inputs)}); expected at least one item on dimension 0"
        )
    for leaf in leaves(inputs):
        if leaf.device.type == "meta":
            raise InvalidInput(
                f"{who} was given inputs on meta ({describe(inputs)}); expected tensors that hold values"
            )
        check_finite_tensor(leaf, f"the inputs of {who}")
    return n


def check_finite_tensor(tensor: Tensor, what: str) -> None:
    """Refuse NaN and Inf in a tensor of any dtype."""
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFinite(
            f"{what} hold {bad} values that are NaN or infinite, of {tensor.numel()}; remove or repair them"
        )
