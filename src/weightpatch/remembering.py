"""The demands of patches: what later edits of the same model keep to."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import nn

from ._calling import Function
from .constraints import All, Constraint, restored
from .errors import InvalidInput
from .patches import Demand, Unrecorded, applied
from .records import Record

__all__ = ["noted", "recalled", "without_patches"]


def noted(
    bound: Constraint, asked: Constraint, before: Function, after: Function
) -> tuple[list[Demand], list[Unrecorded]]:
    """Return what was asked, with today's answers bound, as a patch can hold it, and what it cannot hold.

    Args:
        bound: what was solved: what was asked, and then what is remembered.
        asked: the same before it was bound.
        before: the model as it was, for the violations.
        after: the edited one.
    """
    demands, unrecorded = [], []
    for part in bound.conjuncts[: len(asked.conjuncts)]:
        try:
            demands.append(Demand(part.record(), _largest(part, before), _largest(part, after)))
        except InvalidInput as error:
            unrecorded.append(Unrecorded(part.kind, " ".join(str(error).split())[:1000]))
    return demands, unrecorded


def recalled(model: nn.Module, constraint: Constraint, device: torch.device) -> tuple[Constraint, tuple[str, ...]]:
    """Return the constraint with the demands of all patches that are on the model, and what cannot be asked again."""
    earlier: list[Constraint] = []
    unchecked: list[str] = []
    for patch in applied(model):
        unchecked += [f"{one.kind} of patch {patch.id[:12]}: {one.reason}" for one in patch.manifest.unrecorded]
        for demand in patch.demands:
            found = restored(_on(demand.record, device))
            if found is None:
                record = demand.record
                unchecked.append(
                    f"{record.kind} {record.version} of patch {patch.id[:12]}: no class of this process reads it; "
                    "register one with weightpatch.constraints.register"
                )
            else:
                earlier.append(found)
    return All((constraint, *earlier)) if earlier else constraint, tuple(unchecked)


def _on(record: Record, device: torch.device) -> Record:
    return replace(record, tensors={name: tensor.to(device) for name, tensor in record.tensors.items()})


def _largest(part: Constraint, function: Function) -> float | None:
    with torch.no_grad():
        found = float(part.violation(function).max())
    return found if math.isfinite(found) else None


def without_patches(model: nn.Module) -> nn.Module:
    """Return a copy of the model without its patches."""
    bare = copy.deepcopy(model)
    for patch in reversed(applied(bare)):
        patch.revert(bare)
    return bare
