"""Operations: how one named tensor changes, in as few bytes as it takes.

Values-type operations (`Full`, `Rows`, `Sparse`) hold new values and reproduce them bit for bit; `LowRank` holds the
factors of a difference. `encode` finds the smallest.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from math import prod
from typing import ClassVar, final

import torch
from torch import Tensor

from ..errors import NonFinite, NotEditable, ShapeMismatch
from .arrays import index_code
from .lowrank import factors, within
from .rounding import bits, rounded

INDEX = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
EDITABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Operation(ABC):
    """A change of one tensor; its fields are the tensors that a patch file holds."""

    kind: ClassVar[str]

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that describe the operation, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """What the operation takes in a file, without the header."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @abstractmethod
    def add(self, total: Tensor, own: Tensor) -> Tensor:
        """Add what the operation changes in `own`, the tensor it was made for, to `total` (float64, same shape).

        Where `total` equals `own` the outcome is exactly the new value. `total` may be overwritten.
        """

    def on(self, own: Tensor) -> Tensor:
        """The tensor, in its own type, that the operation makes of the one it was made for."""
        return rounded(self.add(own.to(torch.float64, copy=True), own), own.dtype)


@final
@dataclass(frozen=True, eq=False)
class Full(Operation):
    """All values new: values has the tensor's own shape and type."""

    values: Tensor
    kind: ClassVar[str] = "full"

    def add(self, total: Tensor, own: Tensor) -> Tensor:
        """total + values - own."""
        return _moved(total, own, self.values)

    def on(self, own: Tensor) -> Tensor:
        """values."""
        return self.values.clone()


@final
@dataclass(frozen=True, eq=False)
class Rows(Operation):
    """Some rows new: index (m,), rising; values (m, ...) in the tensor's own type."""

    index: Tensor
    values: Tensor
    kind: ClassVar[str] = "rows"

    def add(self, total: Tensor, own: Tensor) -> Tensor:
        """total[index] + values - own[index]."""
        index = self.index.long()
        total[index] = _moved(total[index], own[index], self.values)
        return total

    def on(self, own: Tensor) -> Tensor:
        """own, with own[index] = values."""
        return own.contiguous().index_copy(0, self.index.long(), self.values)


@final
@dataclass(frozen=True, eq=False)
class Sparse(Operation):
    """Some numbers new: index (m,), rising, into the flat tensor; values (m,) in the tensor's own type."""

    index: Tensor
    values: Tensor
    kind: ClassVar[str] = "sparse"

    def add(self, total: Tensor, own: Tensor) -> Tensor:
        """total.flat[index] + values - own.flat[index]."""
        index, flat = self.index.long(), total.reshape(-1)
        flat[index] = _moved(flat[index], own.reshape(-1)[index], self.values)
        return flat.reshape(total.shape)

    def on(self, own: Tensor) -> Tensor:
        """own, with own.flat[index] = values."""
        return own.reshape(-1).index_copy(0, self.index.long(), self.values).reshape(own.shape)


@final
@dataclass(frozen=True, eq=False)
class LowRank(Operation):
    """A sum of outer products is added: left (o, r), right (r, i), for a tensor of o rows with i numbers each."""

    left: Tensor
    right: Tensor
    kind: ClassVar[str] = "lowrank"

    def add(self, total: Tensor, own: Tensor) -> Tensor:
        """total + left @ right, in float64, one product after the other so that every machine gets the same bits."""
        left, right = self.left.to(torch.float64), self.right.to(torch.float64)
        delta = torch.zeros(len(left), right.shape[1], dtype=torch.float64, device="cpu")
        for column, row in zip(left.T, right, strict=True):
            delta += column[:, None] * row
        return _plus(total, delta.reshape(total.shape))


def encode(base: Tensor, new: Tensor, *, exact: bool = False) -> Operation | None:
    """The operation with the fewest bytes that makes `new` of `base`; None where they agree in every bit.

    All but `LowRank` reproduce `new` bit for bit. `LowRank` is taken where the composed weights are as good as `new`, a
    few rounding steps away at most (`lowrank.within`), or, with `exact`, where they equal it in every bit. Raises
    `ShapeMismatch`, `NonFinite`, or `NotEditable` for types other than float16, bfloat16, float32 and float64.
    """
    _check(base, new)
    base, new = (t.detach().cpu().contiguous() for t in (base, new))
    changed = bits(base) != bits(new)
    if not changed.any():
        return None
    best = _smallest_exact(new, changed)
    found = factors(base, new, below=best.nbytes) if base.ndim > 1 else ()
    for left, right in found:
        low = LowRank(left, right)
        made = low.on(base)
        if torch.equal(bits(made), bits(new)) if exact else within(made, base, new):
            return low
    return best


def _smallest_exact(new: Tensor, changed: Tensor) -> Operation:
    size, total = new.element_size(), new.numel()
    best, least = "full", total * size
    if new.ndim > 1:
        rows = changed.reshape(len(new), -1).any(1)
        count = int(rows.sum())
        if (cost := count * (size * prod(new.shape[1:]) + _index(len(new)).itemsize)) < least:
            best, least = "rows", cost
    if int(changed.sum()) * (size + _index(total).itemsize) < least:
        index = changed.reshape(-1).nonzero()[:, 0]
        return Sparse(index.to(_index(total)), new.reshape(-1)[index])
    if best == "rows":
        index = rows.nonzero()[:, 0]
        return Rows(index.to(_index(len(new))), new[index])
    return Full(new.clone())


def _moved(total: Tensor, own: Tensor, values: Tensor) -> Tensor:
    own, values = own.to(torch.float64), values.to(torch.float64)
    return torch.where(total == own, values, total + (values - own))


def _plus(total: Tensor, delta: Tensor) -> Tensor:
    return torch.where(delta == 0, total, total + delta)  # adding nothing keeps the sign of zero


def _index(count: int) -> torch.dtype:
    return INDEX[index_code(count - 1)]


def _check(base: Tensor, new: Tensor) -> None:
    if base.shape != new.shape or base.dtype != new.dtype:
        raise ShapeMismatch(
            f"the new tensor is {new.dtype} {tuple(new.shape)}; expected the old one's {base.dtype} {tuple(base.shape)}"
        )
    if base.dtype not in EDITABLE:
        raise NotEditable(f"a patch cannot hold {base.dtype}; expected one of {', '.join(map(str, EDITABLE))}")
    for what, tensor in (("old", base), ("new", new)):
        if not tensor.isfinite().all():
            raise NonFinite(f"the {what} tensor holds NaN or infinity; a patch needs finite weights")
