"""How a model is called on one batch, and how one tensor is read from what it returns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidInput, NonFinite

Params: TypeAlias = dict[str, Tensor]
Function: TypeAlias = Callable[..., Any]
Name: TypeAlias = "str | int"  # of an item: its row in the user's data, or the name of its file
Inputs: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"
Output: TypeAlias = "str | int | Callable[[Any], Tensor] | None"

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
# What models of transformers return beside their answer, and what nobody reads as one
_INTERNAL = re.compile(
    r"loss|.*(hidden_states?|attentions|_model_output|past_key_values|mems|router_logits|image_embeds)|.*_loss"
)


def call(function: Function, inputs: Inputs) -> Any:
    """Call `function` on a batch: a tensor is its argument, a tuple its positional, a mapping its keyword arguments."""
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, tuple) else function(inputs)


def outputs(function: Function, inputs: Inputs, output: Output = None) -> Tensor:
    """Call `function` and read one tensor from its answer, as `selected` does.

    Half-precision answers are widened to float32 (exactly), so that differences of them are not rounded again.
    """
    return selected(call(function, inputs), output)


def selected(answer: Any, output: Output = None) -> Tensor:
    """Return one tensor of a model's answer, float32 where it is of half precision.

    Args:
        answer: what the model returned.
        output: its key, attribute, place, or a function that finds it; when not given the answer itself, its `logits`,
            or its first item.
    """
    found = read(answer, output)
    if not isinstance(found, Tensor):
        given = type(answer).__name__ if output is None else f"{type(found).__name__} as output={output!r}"
        raise InvalidInput(
            f"the model returned {given}; expected a tensor. Its answer has {_shown(answer)}: say which one is meant, "
            'as output="logits", output=0 or output=a function of the answer'
        )
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def read(answer: Any, output: Output = None) -> Any:
    """Return what is meant of a model's answer; by default the thing itself, its `logits`, or its first item."""
    if output is not None:
        return _found(answer, output)
    if isinstance(answer, Mapping) and "logits" in answer:
        return answer["logits"]
    if hasattr(answer, "logits"):
        return answer.logits
    return answer[0] if isinstance(answer, (tuple, list)) and answer else answer


def unwatched(answer: Any, *watched: Output) -> list[str]:
    """Name the floating outputs of an answer that none of these selections reads."""
    seen = set[int]()
    for output in watched:
        found = read(answer, output)
        seen |= {id(found)}
        if callable(output) and isinstance(found, Tensor):  # some of a part, or the part in another shape
            seen |= {id(found._base)}
    return [name for name, part in _named(answer) if part.is_floating_point() and id(part) not in seen]


def leaves(inputs: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, in order, those of numpy arrays among them; nested tuples, lists, mappings too."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, np.ndarray):
        if inputs.dtype.kind in "biuf":
            yield torch.as_tensor(inputs, device="cpu")
    elif isinstance(inputs, Mapping):
        for part in inputs.values():
            yield from leaves(part)
    elif isinstance(inputs, (tuple, list)):
        for part in inputs:
            yield from leaves(part)


def length(inputs: Inputs) -> int:
    """Count the items of a batch: the first dimension of its first tensor."""
    return next((len(leaf) for leaf in leaves(inputs) if leaf.ndim), 0)


def rows(inputs: Inputs, index: slice | Tensor) -> Any:
    """Take some items of a batch, in nested tuples, lists and mappings too.

    Tensors and arrays of as many rows as the batch has items are taken apart; those of one row, single numbers and
    plain values go to every item as they are.

    Raises:
        InvalidInput: there is something else in it.
    """
    return inputs[index] if isinstance(inputs, Tensor) and inputs.ndim else _taken(inputs, index, length(inputs))


def _taken(part: Any, index: slice | Tensor, n: int) -> Any:
    if isinstance(part, (Tensor, np.ndarray)):
        if part.ndim and len(part) == n:
            return part[index.cpu().numpy() if isinstance(part, np.ndarray) and isinstance(index, Tensor) else index]
        if not part.ndim or len(part) == 1:
            return part
        raise InvalidInput(
            f"a batch of {n} items holds {tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}; expected {n} "
            "rows, one an item, or one row for all of them"
        )
    if isinstance(part, Mapping):
        return {name: _taken(value, index, n) for name, value in part.items()}
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_taken(value, index, n) for value in part))
    if isinstance(part, (tuple, list)):
        if isinstance(part, list) and len(part) == n > 1 and next(leaves(part), None) is None:
            raise InvalidInput(
                f"a batch of {n} items holds a list of {n} values of {type(part[0]).__name__}; expected a tensor where "
                "they belong to the items, or a tuple where they do not"
            )
        return type(part)(_taken(value, index, n) for value in part)
    if isinstance(part, _PLAIN):
        return part
    raise InvalidInput(
        f"a batch of {n} items holds a {type(part).__name__}, which cannot be taken apart item by item; expected "
        "tensors, arrays, plain values, and tuples, lists and mappings of these"
    )


def _found(answer: Any, output: Output) -> Any:
    try:
        if callable(output):
            return output(answer)
        if isinstance(output, str) and not isinstance(answer, Mapping):
            return getattr(answer, output)
        return answer[output]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"output={output!r} was asked of an answer that has {_shown(answer)} ({type(error).__name__}: {error}); "
            "expected the key, attribute or place of one of these, or a function of the answer"
        ) from error


def _named(answer: Any, before: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among the parts of an answer, and of what has names in them."""
    for name, part in _parts(answer):
        if isinstance(part, Tensor):
            yield before + name, part
        elif not isinstance(part, (tuple, list)) or hasattr(part, "_fields"):  # what has none is states, mostly
            yield from _named(part, f"{before}{name}.")


def _parts(answer: Any) -> list[tuple[str, Any]]:
    """Return the named parts of an answer that somebody may read."""
    if isinstance(answer, Mapping):
        named = [(str(name), part) for name, part in answer.items()]
    elif is_dataclass(answer):
        named = [(field.name, getattr(answer, field.name)) for field in fields(answer)]
    elif isinstance(answer, tuple) and hasattr(answer, "_fields"):
        named = list(zip(answer._fields, answer, strict=True))
    elif isinstance(answer, SimpleNamespace):
        named = list(vars(answer).items())
    elif isinstance(answer, (tuple, list)):
        named = [(str(place), part) for place, part in enumerate(answer)]
    else:
        named = []
    return [(name, part) for name, part in named if not _INTERNAL.fullmatch(name)]


def _shown(answer: Any) -> str:
    shown = [f"{name!r}" for name, part in _parts(answer) if isinstance(part, Tensor)]
    return ", ".join(shown[:8]) or f"no parts with names ({type(answer).__name__})"


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


def check_classes(labels: Tensor, who: str, classes: int | None = None) -> None:
    """Refuse labels that are not the numbers of classes, (n,): -1, which says that there is no answer, is no label."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InvalidInput(f"{who} was given labels as {labels.dtype}; expected integers, the numbers of classes")
    low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if low < 0 or (classes is not None and high >= classes):
        known = "" if classes is None else f"; the model answers with {classes} classes, so expected 0 to {classes - 1}"
        raise InvalidInput(f"{who} was given labels from {low} to {high}{known or '; expected 0 and above'}")


def check_names(names: Sequence[Name] | None, n: int, of: str) -> None:
    """Refuse names that are not as many as what they are of."""
    if names is not None and len(names) != n:
        raise InvalidInput(f"items= was given {len(names)} names for {n} {of}; expected one each, in the same order")


def check_finite_tensor(tensor: Tensor, what: str) -> None:
    """Refuse NaN and Inf in a tensor of any dtype."""
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFinite(
            f"{what} hold {bad} values that are NaN or infinite, of {tensor.numel()}; remove or repair them"
        )
