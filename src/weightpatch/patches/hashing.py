"""What tells one set of weights from another: SHA-256 over names, types, shapes and every bit."""

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import NotEditable

_PACKED = ("__torch__.torch.classes.quantized.", "__torch__.torch.classes.rnn.")
_CHUNK = 2**22  # bytes that are hashed, and brought from another device, at a time


def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """The SHA-256 (64 hex digits) over the sorted names, types, shapes and bytes of parameters and persistent buffers.

    A model and its state dict have the same one; device, memory layout and order do not matter, every bit does. What
    torch.compile has wrapped counts as what is inside. Packed weights of quantised modules count for a model, though
    its state dict does not hold them as tensors. Raises `NotEditable` for tensors whose values cannot be read: meta,
    quantised, sparse, sharded.
    """
    return combined(digests(named_tensors(weights)))


def combined(found: Mapping[str, str]) -> str:
    """The fingerprint of weights whose tensors have these digests."""
    lines = (json.dumps([name, found[name]]) + "\n" for name in sorted(found))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each tensor; tied ones are hashed once."""
    first = tied(tensors)
    found = {name: digest(tensors[name]) for name in set(first.values())}
    return {name: found[first[name]] for name in tensors}


def digest(tensor: Tensor) -> str:
    """The SHA-256 over a tensor's type, shape and little-endian bytes in C order."""
    found = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    for piece in _pieces(tensor.detach()):
        found.update(as_bytes(piece))
    return found.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in C order; no copy is made of a contiguous one in main memory."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # one number counts as contiguous whatever its stride
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def named_tensors(weights: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and persistent buffers under all their names, sorted; raises `NotEditable` for unreadable ones."""
    pairs = _of_module(weights) if isinstance(weights, nn.Module) else weights.items()
    found = {name: value for name, value in pairs if isinstance(value, Tensor)}
    for name, value in found.items():
        _check_readable(name, value)
    return dict(sorted(found.items()))


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For every name, the first name of the tensor that lies in the same memory."""
    first: dict[object, str] = {}
    found = {}
    for name, t in tensors.items():
        place = (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) if t.numel() else name
        found[name] = first.setdefault(place, name)
    return found


def uncompiled(name: str) -> str:
    """The name that a tensor or module has without torch.compile's wrappers around modules."""
    return ".".join(part for part in name.split(".") if part not in ("", "_orig_mod"))


def _of_module(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield uncompiled(name), parameter
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield uncompiled(f"{prefix}.{name}"), buffer
        for name, value in vars(part).items():
            if isinstance(value, torch.ScriptObject) and str(value._type()).startswith(_PACKED):
                found = hashlib.sha256("".join(_lines(value)).encode()).digest()
                yield uncompiled(f"{prefix}.{name}"), torch.tensor(list(found), dtype=torch.uint8, device="cpu")


def _lines(packed: object) -> Iterator[str]:
    """What tells packed weights from others: digests of their tensors, and everything else as text, one a line."""
    if isinstance(packed, torch.ScriptObject):
        yield from _lines(packed.__getstate__())
    elif isinstance(packed, tuple | list):
        yield f"{len(packed)}\n"
        for item in packed:
            yield from _lines(item)
    elif not isinstance(packed, Tensor):
        yield f"{packed!r}\n"
    elif not packed.is_quantized:
        yield f"{digest(packed)}\n"
    elif packed.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        yield f"{digest(packed.int_repr())} {packed.q_scale().hex()} {packed.q_zero_point()}\n"
    else:
        scales, zeros = packed.q_per_channel_scales(), packed.q_per_channel_zero_points()
        yield f"{digest(packed.int_repr())} {digest(scales)} {digest(zeros)} {packed.q_per_channel_axis()}\n"


def _check_readable(name: str, tensor: Tensor) -> None:
    # Every tensor with storage of its own can be read; wrappers (sharded, quantised) dispatch elsewhere
    wrapper = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    lazy = torch.nn.parameter.is_lazy(tensor)
    if tensor.is_meta or wrapper or lazy or tensor.is_quantized or tensor.layout is not torch.strided:
        raise NotEditable(
            f"tensor {name!r} ({type(tensor).__name__}, {tensor.layout}, {tensor.device}) has no plain values to read; "
            "load or materialise the model as ordinary dense tensors first"
        )


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    if not tensor.numel():
        return
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor
    count = max(1, _CHUNK * flat.shape[0] // (flat.numel() * flat.element_size()))
    yield from torch.split(flat, count)
