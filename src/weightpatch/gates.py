"""Gates: a correction of a layer's output for inputs that lie close to a key, and nothing, bit for bit, elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from ._readings import check_reading
from .errors import InvalidInput, NonFinite, ShapeMismatch

__all__ = ["KEY", "PARTS", "Gate", "GateHook", "Lock", "Reading", "gate_of", "gated", "sizes"]

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
class Reading:
    """What keys are compared with: a layer's first argument, pooled over positions, in a metric.

    Only the default can be run so far: the gated layer's own input, each position by itself. A patch can hold the rest.

    Args:
        layer: whose first argument is read; "" for the layer that is gated.
        pooling: "none" (each position has its own keys), "mean", "last" (position) or "minimum" (of the distances).
        grid: the sizes that "mean" pools space to; () for one mean of all positions.
        distance: "euclidean", or "cosine" (1 - cos).
        metric: None, or (k, width): keys are compared with ``metric @ (x - centre)``; may be of lower precision.
        centre: None for 0, or (width,).

    Raises:
        InvalidInput: another pooling, distance or grid; metric and centre that do not belong together, or not finite.
    """

    layer: str = ""
    pooling: str = "none"
    grid: tuple[int, ...] = ()
    distance: str = "euclidean"
    metric: Tensor | None = None
    centre: Tensor | None = None

    def __post_init__(self) -> None:
        check_reading(self.pooling, self.grid, self.distance)
        for name, part in self.parts.items():
            _check_part(f"a reading's {name}", part)
        shapes = {name: tuple(part.shape) for name, part in self.parts.items()}
        wanted = {"metric": 2, "centre": 1}
        widths = {shape[-1] for shape in shapes.values() if shape}
        if any(len(shape) != wanted[name] or 0 in shape for name, shape in shapes.items()) or len(widths) > 1:
            raise ShapeMismatch(f"a reading was given {shapes}; expected metric (k, width) and centre (width,)")

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: part for name in ("centre", "metric") if (part := getattr(self, name)) is not None}

    @property
    def width(self) -> int | None:
        """How many numbers a key has; None where the reading leaves it open."""
        return next((len(part) for part in (self.metric, self.centre) if part is not None), None)

    def plain_at(self, layer: str) -> bool:
        """Say whether this is that layer's own input, position by position: what can be run so far."""
        own = self.layer in ("", layer) and (self.pooling, self.distance) == ("none", "euclidean")
        return own and not self.parts

    def copy(self) -> Reading:
        """Return the same reading on the CPU, in memory of its own."""
        return replace(self, **{name: _own(part) for name, part in self.parts.items()})  # type: ignore[arg-type]


@final
@dataclass(frozen=True, eq=False)
class Lock:
    """Balls, of which an input has to lie in one: keys (m, k), radii (m,), and what they are compared with."""

    keys: Tensor
    radii: Tensor
    reading: Reading = Reading()

    def __post_init__(self) -> None:
        _check_part("a gate's keys", self.keys)
        _check_part("a gate's radii", self.radii)
        width = self.reading.width
        if self.keys.ndim == 2 and width not in (None, self.keys.shape[1]):
            raise ShapeMismatch(f"a gate's keys have {self.keys.shape[1]} numbers each; their metric gives {width}")
        if (self.radii < 0).any():
            raise InvalidInput(f"a gate's radii go down to {float(self.radii.min())}; expected at least 0")


@final
@dataclass(frozen=True, eq=False)
class Gate:
    """What one layer's output gains near some of its inputs, as in `gated`.

    Args:
        keys: (m, k), at least one; float16, bfloat16, float32 or float64, as the others. k is the layer's width, or
            what the reading's metric makes of it.
        radii: (m,), at least 0.
        values: (m, out).
        reading: what the keys are compared with.
        also: further locks with m keys each: the i-th value is added where the i-th ball of every lock is met. With
            other readings than the default, they can be saved, and not yet be run.

    Raises:
        InvalidInput: `ShapeMismatch` where these do not belong together, `NonFinite` for NaN or infinity.
    """

    keys: Tensor
    radii: Tensor
    values: Tensor
    reading: Reading = Reading()
    also: tuple[Lock, ...] = ()

    def __post_init__(self) -> None:
        _check_part("a gate's values", self.values)
        for lock in self.locks:
            shapes = [tuple(part.shape) for part in (lock.keys, lock.radii, self.values)]
            count = len(lock.radii) if lock.radii.ndim == 1 else 0
            sizes = {shape[0] for shape in shapes if shape}
            if [len(shape) for shape in shapes] != [2, 1, 2] or sizes != {count} or 0 in chain(*shapes):
                raise ShapeMismatch(
                    f"a gate was given keys {shapes[0]}, radii {shapes[1]}, values {shapes[2]}; "
                    "expected (m, width), (m,), (m, out) with at least one key"
                )

    @property
    def locks(self) -> tuple[Lock, ...]:
        """All that has to be met, the gate's own keys first."""
        return (Lock(self.keys, self.radii, self.reading), *self.also)

    @property
    def parts(self) -> dict[str, Tensor]:
        """Keys, radii and values by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def sizes(self) -> tuple[int, int]:
        """(k, out): the layer's sizes where its own input is read as it is."""
        return self.keys.shape[1], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """What the gate takes in a file, without the header and without its readings, which gates may share."""
        parts = [self.values, *(part for lock in self.locks for part in (lock.keys, lock.radii))]
        return sum(part.numel() * part.element_size() for part in parts)

    def plain_at(self, layer: str) -> bool:
        """Say whether the gate can be run at a layer: one lock, whose keys are that layer's own inputs."""
        return not self.also and self.reading.plain_at(layer)

    def copy(self) -> Gate:
        """Return the same gate on the CPU, in memory of its own."""
        also = tuple(Lock(_own(lock.keys), _own(lock.radii), lock.reading.copy()) for lock in self.also)
        return Gate(_own(self.keys), _own(self.radii), _own(self.values), self.reading.copy(), also)


def _check_part(what: str, part: object) -> None:
    if not isinstance(part, Tensor) or part.dtype not in _TYPES or part.layout is not torch.strided:
        given = f"{part.dtype} {part.layout}" if isinstance(part, Tensor) else type(part).__name__
        raise InvalidInput(f"{what} are {given}; expected a tensor of float16, 32, 64 or bfloat16")
    if not part.isfinite().all():
        raise NonFinite(f"{what} hold NaN or infinity; expected finite numbers")


def _own(part: Tensor) -> Tensor:
    return part.detach().cpu().clone(memory_format=torch.contiguous_format)


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
        keys, radii, values = (torch.cat([gate.parts[part] for gate in gates]) for part in PARTS)
        self.gate = Gate(keys, radii, values)
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
