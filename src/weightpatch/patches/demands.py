"""What a patch was made for, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..errors import InvalidInput, NonFinite
from ..records import Record
from .manifest import DemandEntry
from .plain import copied

HELD = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
}


@final
@dataclass(frozen=True, eq=False)
class Demand:
    """A constraint's record, and by how much it was violated before and after the edit.

    To patches the record is opaque: no kind is looked up, nor imported; who asks a demand again has to know its kind.

    Args:
        record: what was asked.
        before: the largest violation before the edit, met where at most 0; None where it was not measured.
        after: the same on the edited weights.

    Raises:
        InvalidInput: a file cannot hold the record; the message says why. `NonFinite` for NaN and infinity.
    """

    record: Record
    before: float | None = None
    after: float | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.record.tensors.items():
            _check_tensor(f"tensor {name!r} of a demand of kind {self.record.kind}", tensor)
        self.entry  # noqa: B018 - checks everything else

    @property
    def entry(self) -> DemandEntry:
        """What the manifest says of it."""
        record = self.record
        scalars = dict(record.scalars)
        names, before, after = tuple(sorted(record.tensors)), _float(self.before), _float(self.after)
        return DemandEntry(record.kind, record.version, names, scalars, before, after)

    def copy(self) -> Demand:
        """Return the same demand on the CPU, in memory of its own."""
        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.record.tensors.items()
        }
        scalars = copied(dict(self.record.scalars))
        return replace(self, record=Record(self.record.kind, self.record.version, own, scalars))


def _check_tensor(what: str, tensor: object) -> None:
    held = ", ".join(str(dtype).removeprefix("torch.") for dtype in HELD.values())
    if not isinstance(tensor, Tensor) or tensor.dtype not in HELD.values() or tensor.layout is not torch.strided:
        given = f"{tensor.dtype} {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InvalidInput(f"{what} is {given}; expected a dense tensor of one of {held}")
    if tensor.ndim > 16:
        raise InvalidInput(f"{what} has {tensor.ndim} dimensions; expected at most 16")
    if not tensor.isfinite().all():
        raise NonFinite(f"{what} holds NaN or infinity; expected finite numbers")


def _float(violation: float | None) -> float | None:
    return float(violation) if isinstance(violation, int) and not isinstance(violation, bool) else violation
