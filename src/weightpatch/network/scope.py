"""Which parameters may move: glob patterns to canonical names, and why a parameter may not."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..errors import InvalidInput, NonFinite, NotEditable, NothingToEdit

__all__ = ["ParameterRow", "check_finite", "explain", "select"]


@dataclass(frozen=True)
class ParameterRow:
    """What `explain` says of one parameter.

    Attributes:
        name: its name; the first one where it is tied.
        shape: its shape.
        dtype: its dtype, without "torch.".
        editable: whether an edit may change it.
        reason: why not, or what else an edit of it changes; "" where there is nothing to say.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    editable: bool
    reason: str


def select(model: nn.Module, patterns: str | Sequence[str] = "*") -> tuple[str, ...]:
    """Return the names of the parameters that match any pattern, in the model's order.

    Patterns are case-sensitive globs (`fnmatch`). A tied parameter goes by its first name; where a pattern names only
    some of its places, a warning says that all of them change. Parameters that do not require grad are left out with a
    warning, unless no parameter does: then the model is a deployed one and all may be edited.

    Raises:
        NothingToEdit: no parameter matches.
        NotEditable: none of those that match can be edited.
    """
    chosen = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not chosen or not all(isinstance(pattern, str) for pattern in chosen):
        raise InvalidInput(f"parameters={patterns!r}; expected globs of names such as 'layer3.*'")
    places = _places(model)
    matched = [name for name, known in places.items() if any(_matches(place, chosen) for place in known)]
    reasons = _reasons(model)
    packed = {name: why for name, why in _packed(model).items() if _matches(name, chosen)}
    if not matched and not packed:
        raise NothingToEdit(_nothing(model, chosen, tuple(place for known in places.values() for place in known)))
    editable = tuple(name for name in matched if name not in reasons)
    refused = {**{name: reasons[name] for name in matched if name in reasons}, **packed}
    told = "; ".join(f"{name} {why}" for name, why in list(refused.items())[:5]) + ("; ..." if len(refused) > 5 else "")
    if not editable:
        raise NotEditable(f"parameters={patterns!r} matches nothing that can be edited: {told}")
    if refused:
        warnings.warn(f"{len(refused)} parameters stay as they are: {told}", UserWarning, stacklevel=3)
    for name in editable:
        known = places[name]
        if not all(_matches(place, chosen) for place in known):
            warnings.warn(
                f"{' and '.join(known)} are one tied parameter: both places change", UserWarning, stacklevel=3
            )
    return editable


def explain(model: nn.Module) -> list[ParameterRow]:
    """List every parameter of a model, whether it can be edited and why not."""
    places, reasons, rows = _places(model), _reasons(model), []
    for name, parameter in model.named_parameters():
        also = f"tied with {', '.join(places[name][1:])}" if len(places[name]) > 1 else ""
        reason = reasons.get(name, also)
        rows.append(ParameterRow(name, _shape(parameter), str(parameter.dtype)[6:], name not in reasons, reason))
    rows += [ParameterRow(name, (), "quantised", False, why) for name, why in _packed(model).items()]
    return rows


def check_finite(model: nn.Module) -> None:
    """Refuse NaN and infinity in a model's weights and buffers; -inf in a buffer is taken for an attention mask.

    Raises:
        NonFinite: names the tensor.
    """
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()) or _adds_up(tensor):
                continue
            values = tensor.detach()
            bad = ~values.isfinite() if kind == "parameter" else values.isnan() | (values == torch.inf)
            if bool(bad.any()):
                raise NonFinite(
                    f"{kind} {name} of the model holds {int(bad.sum())} values that are NaN or infinite, of "
                    f"{tensor.numel()}; repair the checkpoint before editing it"
                )


def _adds_up(tensor: Tensor) -> bool:
    """Say whether the sum is finite, and so every value: one cheap pass, without a mask as large as the tensor."""
    with torch.no_grad():
        half = tensor.dtype.itemsize < 4
        return bool(torch.isfinite(tensor.float().sum() if half else tensor.sum()))


def _places(model: nn.Module) -> dict[str, list[str]]:
    """Map each parameter's first name to all of its names."""
    first: dict[int, str] = {}
    places: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return places


def _reasons(model: nn.Module) -> dict[str, str]:
    """Say why parameters cannot be edited, by name; those that can are absent."""
    parameters = dict(model.named_parameters())
    deployed = not any(parameter.requires_grad for parameter in parameters.values())
    owners = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    memory: dict[tuple[Any, ...], str] = {}
    reasons = {}
    for name, parameter in parameters.items():
        reason = _reason(parameter, owners[id(parameter)], deployed)
        if not reason and parameter.numel():
            key = (parameter.device, parameter.data_ptr(), _shape(parameter), parameter.stride())
            other = memory.setdefault(key, name)
            if other != name:
                reason = f"shares its memory with {other} but is another Parameter; assign one to the other"
        if reason:
            reasons[name] = reason
    return reasons


def _reason(parameter: nn.Parameter, owner: nn.Module, deployed: bool) -> str:
    if isinstance(parameter, UninitializedParameter):
        return "has no shape yet (run the lazy model once)"
    if parameter.is_meta:
        return "is on the meta device, without values"
    if parameter.is_complex():
        return f"is complex ({str(parameter.dtype)[6:]}); only real parameters are edited"
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"is {str(parameter.dtype)[6:]}; only float16, bfloat16, float32 and float64 parameters are edited"
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.max_norm is not None:
        return "is renormalised in place at every call (max_norm); set max_norm=None first"
    if not parameter.requires_grad and not deployed:
        return "is frozen (requires_grad=False)"
    return ""


def _packed(model: nn.Module) -> dict[str, str]:
    """Name the weights that quantised modules keep outside of their parameters."""
    return {
        f"{name}.weight": f"is packed in a quantised {type(module).__name__}; edit the float model and quantise again"
        for name, module in model.named_modules()
        if "quantized" in type(module).__module__
        and hasattr(module, "_packed_params")
        and not name.endswith("_packed_params")
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    if isinstance(parameter, UninitializedParameter):
        return ()
    return tuple(parameter.shape)


def _nothing(model: nn.Module, patterns: Sequence[str], names: Sequence[str]) -> str:
    if not names:
        return f"the model {type(model).__name__} has no parameters; nothing can be edited"
    blocks = [f"{name}.*" for name, child in model.named_children() if any(True for _ in child.parameters())]
    near: list[str] = []
    for pattern in patterns:
        prefix = pattern.rstrip(".*")
        inside = any(name.startswith(prefix + ".") for name in names) and prefix
        near += [f"{prefix}.*"] if inside else difflib.get_close_matches(pattern, [*names, *blocks], 3, 0.5)
    hint = f"did you mean {', '.join(dict.fromkeys(near))}? " if near else ""
    given = " or ".join(map(repr, patterns))
    return f"no parameter matches {given}; {hint}the model has {', '.join(blocks[:12] or names[:12])}"
