"""The demands of patches: what later edits of the same model keep to."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ._calling import Function
from .constraints import All, Classified, Constraint, Within
from .errors import InvalidInput
from .patches import Demand, Unrecorded, applied
from .records import Record

__all__ = ["noted", "recalled", "without_patches"]

_KINDS = {"weightpatch/classified": ("labels", "margin"), "weightpatch/within": ("targets", "tolerance")}


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
    for part in _parts(bound)[: len(_parts(asked))]:
        try:
            demands.append(Demand(_record(part), _largest(part, before), _largest(part, after)))
        except InvalidInput as error:
            unrecorded.append(Unrecorded(part.kind, " ".join(str(error).split())[:1000]))
    return demands, unrecorded


def recalled(model: nn.Module, constraint: Constraint, device: torch.device) -> Constraint:
    """Return the constraint with the demands of all patches that are on the model, of the kinds known here."""
    records = [demand.record for patch in applied(model) for demand in patch.demands]
    earlier = [_constraint(record, device) for record in records if record.kind in _KINDS and record.version == 1]
    return All((constraint, *earlier)) if earlier else constraint


def _record(part: Constraint) -> Record:
    if isinstance(part, Classified) and isinstance(part.inputs, Tensor):
        tensors, scalars = {"inputs": part.inputs, "labels": part.labels}, {"margin": part.margin}
        return Record("weightpatch/classified", 1, tensors, scalars)
    if isinstance(part, Within) and isinstance(part.inputs, Tensor):
        tensors, scalars = {"inputs": part.inputs, "targets": part.targets}, {"tolerance": part.tolerance}
        return Record("weightpatch/within", 1, tensors, scalars)
    raise InvalidInput("only Classified and Within with one tensor of inputs are recorded")


def _constraint(record: Record, device: torch.device) -> Constraint:
    wanted, limit = _KINDS[record.kind]
    if set(record.tensors) != {"inputs", wanted} or not isinstance(found := record.scalars.get(limit), int | float):
        raise InvalidInput(f"a patch's demand of kind {record.kind} lacks inputs, {wanted} or {limit}; take it off")
    inputs, target = (record.tensors[name].to(device) for name in ("inputs", wanted))
    return Classified(inputs, target.long(), found) if wanted == "labels" else Within(inputs, target, found)


def _largest(part: Constraint, function: Function) -> float | None:
    with torch.no_grad():
        found = float(part.violation(function).max())
    return found if math.isfinite(found) else None


def _parts(constraint: Constraint) -> tuple[Constraint, ...]:
    if not isinstance(constraint, All):
        return (constraint,)
    return tuple(part for whole in constraint.parts for part in _parts(whole))


def without_patches(model: nn.Module) -> nn.Module:
    """Return a copy of the model without its patches."""
    bare = copy.deepcopy(model)
    for patch in reversed(applied(bare)):
        patch.revert(bare)
    return bare
