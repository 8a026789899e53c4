"""Hyper-parameters of an editor that are learned with the network, one for each tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..editors import IterativeEditor
from ..errors import InvalidInput

__all__ = ["LearnedRates"]

_SHARES = {"beta", "momentum"}  # between 0 and 1; everything else is positive


@dataclass(frozen=True)
class _Field:
    name: str
    share: bool

    def value(self, raw: Tensor) -> Tensor:
        return raw.sigmoid() if self.share else F.softplus(raw)

    def raw(self, value: float) -> float:
        """Invert `value`; softplus⁻¹(y) = y + ln(1 - e^-y), which keeps its precision where y is small."""
        return math.log(value / (1 - value)) if self.share else value + math.log(-math.expm1(-value))


@final
class LearnedRates(nn.Module):
    """Positive hyper-parameters ``softplus(raw)``, one per edited tensor, and shares such as β as ``sigmoid(raw)``.

    The raw values of a learning rate of 1e-3 lie near -7, where an optimiser's step of 1e-2 changes the rate by 1 %.
    Source: MEND's experiments (Mitchell et al., ICLR 2022) found rates per tensor better than one for all.

    Args:
        editor: where they start.
        names: the edited parameters.
        learn: which of the editor's fields, such as ``("lr", "beta")``.

    Raises:
        InvalidInput: the editor has no such field, or it starts at a value that has no logarithm.
    """

    def __init__(self, editor: IterativeEditor, names: Sequence[str], learn: Sequence[str] = ("lr",)) -> None:
        super().__init__()
        self._names = tuple(names)
        self._fields = tuple(_Field(name, name in _SHARES) for name in learn)
        known = {field.name for field in fields(editor)} & {"lr", "epsilon", *_SHARES}
        for field in self._fields:
            if field.name not in known:
                raise InvalidInput(
                    f"{type(editor).__name__} has no {field.name!r} to learn; expected some of {sorted(known)}"
                )
            start = getattr(editor, field.name)
            values = [float(start[name] if isinstance(start, Mapping) else start) for name in self._names]
            if not all(0 < value < (1 if field.share else math.inf) for value in values):
                raise InvalidInput(f"a learned {field.name} has to start above 0; the editor's is {start!r}")
            self.register_parameter(field.name, nn.Parameter(torch.tensor([field.raw(value) for value in values])))

    def values(self) -> list[Tensor]:
        """Return the values of each field, each of shape (number of edited tensors,), differentiable."""
        return [field.value(self.get_parameter(field.name)) for field in self._fields]

    def editor(self, editor: IterativeEditor, values: Sequence[Tensor]) -> IterativeEditor:
        """Return the editor with these values in the learned fields."""
        learned = {
            field.name: dict(zip(self._names, value.unbind(), strict=True))
            for field, value in zip(self._fields, values, strict=True)
        }
        return replace(editor, **learned)  # type: ignore[arg-type]

    def settled(self, editor: IterativeEditor) -> IterativeEditor:
        """Return the editor with what has been learned, as plain numbers."""
        with torch.no_grad():
            learned = {
                field.name: dict(zip(self._names, value.tolist(), strict=True))
                for field, value in zip(self._fields, self.values(), strict=True)
            }
        return replace(editor, **learned)  # type: ignore[arg-type]
