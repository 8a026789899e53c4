"""What a constraint says of itself in a file: data, never code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

from torch import Tensor

__all__ = ["Plain", "Record"]

Plain: TypeAlias = "str | int | float | bool | list[Any] | dict[str, Any] | None"


@final
@dataclass(frozen=True, eq=False)
class Record:
    """A constraint as tensors and plain values, from which its class makes it again.

    Attributes:
        kind: namespaced, such as "weightpatch/classified"; the part before the slash is the author's.
        version: of the kind, at least 1: a reader refuses those that it does not know.
        tensors: by name; float16, bfloat16, float32, float64, uint8, int16, int32, int64 or bool.
        scalars: JSON values: strings, numbers, booleans, None, and lists and dicts of these.
    """

    kind: str
    version: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Plain] = field(default_factory=dict)
