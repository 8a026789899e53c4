"""Gates: a correction of a layer's output for inputs that lie close to a key, and nothing, bit for bit, elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from .errors import InvalidInput, NonFinite, ShapeMismatch

__all__ = ["KEY", "PARTS", "Gate", "GateHook", "gate_of", "gated", "sizes"]

# Among a module's forward hooks. Others have numbers that torch counts up from 0 in every process: that of an unpickled
# model's hook would be given out again
KEY: int = "weightpatch"  # type: ignore[assignment]
PARTS = ("keys", "radii", "values")
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gated(x: Tensor, y: Tensor, keys: Tensor, radii: Tensor, values: Tensor) -> Tensor:
    """Return y plus the value of the nearest key where x lies in that key's ball; y itself, bit for bit, elsewhere.

    Of the keys whose ball holds an input, the nearest one counts (of equally near ones the first), so that overlapping
    balls split where they are equally far. Source: the codebook of GRACE (Hartvigsen et al., NeurIPS 2023), which
    replaces a layer's output.

    Args:
        x: what the layer is given, (..., width).
        y: what it answers, (..., out); differentiable in it and in `values`.
        keys: (m, width).
        radii: (m,), Euclidean; below 0 where a key is not used.
        values: (m, out).
    """
    exact = torch.promote_types(keys.dtype, torch.float32)
    flat = x.detach().reshape(-1, x.shape[-1]).to(exact)
    distances = torch.cdist(flat, keys.to(exact), compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances.masked_fill(distances > radii, torch.inf)
    least, nearest = distances.min(1)
    inside = (least < torch.inf).view(*x.shape[:-1], 1)
    return torch.where(inside, y + values[nearest].to(y.dtype).view(y.shape), y)


@final
@dataclass(frozen=True, eq=False)
class Gate:
    """What one layer's output gains near some of its inputs, as in `gated`.

    Args:
        keys: (m, width), at least one; float16, bfloat16, float32 or float64, as the others.
        radii: (m,), at least 0.
        values: (m, out).

    Raises:
        InvalidInput: `ShapeMismatch` where these do not belong together, `NonFinite` for NaN or infinity.
    """

    keys: Tensor
    radii: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            if not isinstance(part, Tensor) or part.dtype not in _TYPES or part.layout is not torch.strided:
                given = f"{part.dtype} {part.layout}" if isinstance(part, Tensor) else type(part).__name__
                raise InvalidInput(f"a gate's {name} are {given}; expected a tensor of float16, 32, 64 or bfloat16")
        shapes = [tuple(part.shape) for part in self.parts.values()]
        count = len(self.radii) if self.radii.ndim == 1 else 0
        if [len(shape) for shape in shapes] != [2, 1, 2] or {s[0] for s in shapes} != {count} or 0 in chain(*shapes):
            raise ShapeMismatch(
                f"a gate was given keys {shapes[0]}, radii {shapes[1]}, values {shapes[2]}; "
                "expected (m, width), (m,), (m, out) with at least one key"
            )
        for name, part in self.parts.items():
            if not part.isfinite().all():
                raise NonFinite(f"a gate's {name} hold NaN or infinity; expected finite numbers")
        if (self.radii < 0).any():
            raise InvalidInput(f"a gate's radii go down to {float(self.radii.min())}; expected at least 0")

    @property
    def parts(self) -> dict[str, Tensor]:
        """Keys, radii and values by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def sizes(self) -> tuple[int, int]:
        """(width, out) of the layer."""
        return self.keys.shape[1], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """What the gate takes in a file, without the header."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def copy(self) -> Gate:
        """Return the same gate on the CPU, in memory of its own."""
        return Gate(*(part.detach().cpu().clone(memory_format=torch.contiguous_format) for part in self.parts.values()))


@final
class GateHook:
    """A forward hook (with keyword arguments) that gates the output of one module.

    Args:
        name: the module's, for errors.
        module: takes a tensor (..., width) first and returns one (..., out).
        gates: of these sizes; of equally near keys the first one counts.

    Attributes:
        gate: all of them as one.
    """

    def __init__(self, name: str, module: nn.Module, gates: Sequence[Gate]) -> None:
        self._name = name
        self._first = next(iter(inspect.signature(module.forward).parameters), "")
        self.gate = Gate(*(torch.cat([gate.parts[part] for gate in gates]) for part in PARTS))
        self._placed: dict[torch.device, tuple[Tensor, ...]] = {}
        self._on(next((own.device for own in chain(module.parameters(), module.buffers())), torch.device("cpu")))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor:
        """Return the gated output; raises `ShapeMismatch` where input and output do not fit the gate."""
        *keywords, output = rest  # what quantises a model hangs its hooks to the new modules, without keywords
        x: Any = args[0] if args else keywords[0].get(self._first) if keywords else None
        width, out = self.gate.sizes
        if not (_fits(x, width) and _fits(output, out) and x.shape[:-1] == output.shape[:-1]):
            raise ShapeMismatch(
                f"a gate at {self._name!r} needs its first argument as (..., {width}) and its answer as (..., {out}), "
                f"both floating-point; got {_shown(x)} and {_shown(output)}. "
                "Revert the patch, and make it again for this module"
            )
        return gated(x, output, *self._on(x.device))

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        found = self._placed.get(device)
        if found is None:
            found = tuple(part.to(device) for part in self.gate.parts.values())
            # What a graph owns, and what is fake, is good for this one pass only
            if not torch.compiler.is_compiling() and type(found[0]) is Tensor:
                self._placed[device] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}}  # torch.load may map the tensors to other devices than these say


def gate_of(module: nn.Module) -> Gate | None:
    """Return what the patches that are on gate a module with; None where none does."""
    hook = module._forward_hooks.get(KEY)
    return hook.gate if isinstance(hook, GateHook) else None


def sizes(module: nn.Module) -> set[tuple[int, int]]:
    """(width, out) as the module says them: from in_features and out_features, or both ways of a weight matrix."""
    own = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if all(isinstance(size, int) for size in own):
        return {own}  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return set()
    a, b = weight.shape  # (out, width), or the other way round, as in the Conv1D of transformers
    return {(a, b), (b, a)}


def _fits(given: Any, size: int) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point() and given.shape[-1:] == (size,)


def _shown(given: Any) -> str:
    return f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
