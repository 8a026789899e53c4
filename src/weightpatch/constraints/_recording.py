"""How constraints become records and come back: which classes read which kinds, and batches as named tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._calling import Inputs, Output
from ..errors import InvalidInput
from ..likelihoods import Likelihood, plain, unplain
from ..records import Record
from ._base import Constraint

__all__ = ["register", "restored"]

_READERS: dict[tuple[str, int], type[Constraint]] = {}
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64),
)
_KIND = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}/[a-z0-9][a-z0-9_.-]{0,63}")
_SCALARS = (bool, int, float, str, type(None))


def register(kind: str, version: int, reader: type[Constraint]) -> None:
    """Have records of a kind read by a class of this process, whose `record` writes them.

    A patch file names kinds, never classes: what nobody registered is reported as not checked.

    Args:
        kind: namespaced, such as "acme/fair": the author's name, a slash, and the constraint's.
        version: of the kind's records.
        reader: its `restored` makes the constraint again.

    Raises:
        InvalidInput: another class reads this kind already, or it is one of weightpatch's own.
    """
    if not isinstance(kind, str) or not _KIND.fullmatch(kind) or not isinstance(version, int) or version < 1:
        raise InvalidInput(
            f'register was given kind={kind!r}, version={version!r}; expected "author/name", each 1 to 64 of a-z, 0-9, '
            "'_', '.' and '-', and a number of at least 1"
        )
    if _READERS.setdefault((kind, version), reader) is not reader:
        raise InvalidInput(f"{_READERS[kind, version].__name__} reads {kind} {version} already; choose another name")


def restored(record: Record) -> Constraint | None:
    """Return the constraint of a record; None where no class of this process reads its kind and version.

    Raises:
        InvalidInput: the record is not what the class wrote.
    """
    reader = _READERS.get((record.kind, record.version))
    if reader is None:
        return None
    try:
        return reader.restored(record)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(f"a record of {record.kind} {record.version} cannot be read: {error}") from error


def packed(inputs: Inputs, name: str = "inputs") -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a batch by name, and how they are nested, as JSON values.

    Raises:
        InvalidInput: there is something else in it than tensors, arrays and plain values.
    """
    found: dict[str, Tensor] = {}

    def plain_of(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            part = torch.as_tensor(part, device="cpu")
        if isinstance(part, Tensor):
            if part.dtype not in _DTYPES:
                raise InvalidInput(f"its {name} hold {part.dtype}, which a patch file cannot hold")
            place = f"{name}{len(found)}"
            found[place] = part.detach()
            return {"tensor": place}
        if isinstance(part, Mapping) and all(isinstance(key, str) for key in part):
            return {"map": {key: plain_of(value) for key, value in part.items()}}
        if type(part) in (tuple, list):
            return {type(part).__name__: [plain_of(value) for value in part]}
        if isinstance(part, _SCALARS):
            return {"value": part}
        raise InvalidInput(f"its {name} hold a {type(part).__name__}, which a patch file cannot hold")

    return found, plain_of(inputs)


def unpacked(content: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the batch that `packed` took apart."""
    (kind, value), *more = content.items()
    if more:
        raise ValueError(f"a part of a batch has several kinds: {sorted(content)}")
    if kind == "tensor":
        return tensors[value]
    if kind == "map":
        return {name: unpacked(part, tensors) for name, part in value.items()}
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(unpacked(part, tensors) for part in value)
    if kind == "value" and isinstance(value, _SCALARS):
        return value
    raise ValueError(f"a part of a batch is of kind {kind!r}")


def meaning(likelihood: Likelihood | None, output: Output) -> dict[str, Any]:
    """Return what outputs mean, and which of them, as JSON values.

    Raises:
        InvalidInput: a function selects the output, or the likelihood is a user's own.
    """
    if callable(output):
        raise InvalidInput("a function selects its output; only a key, attribute or place can be written to a file")
    found = None if likelihood is None else plain(likelihood)
    if likelihood is not None and found is None:
        raise InvalidInput(f"its likelihood {likelihood!r:.60} is not one of weightpatch.likelihoods")
    return {"likelihood": found, "output": output}


def meant(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Return `likelihood` and `output` as `meaning` wrote them."""
    output, likelihood = scalars["output"], scalars["likelihood"]
    if output is not None and not isinstance(output, (str, int)):
        raise ValueError(f"output is {output!r}")
    return {"likelihood": None if likelihood is None else unplain(likelihood), "output": output}
