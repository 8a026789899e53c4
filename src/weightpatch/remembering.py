"""The demands of patches: what later edits of the same model keep to."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .constraints import All, Classified, Constraint, Within
from .patches import Demand, applied

__all__ = ["noted", "recalled", "without_patches"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HELD = (*_FLOATS, torch.uint8, torch.int16, torch.int32, torch.int64)


def noted(bound: Constraint, asked: Constraint) -> tuple[Demand, ...]:
    """Return what was asked, with today's answers bound, as a patch can hold it; what it cannot hold is left out.

    Args:
        bound: what was solved: what was asked, and then what is remembered.
        asked: the same before it was bound.
    """
    found = []
    for part in _parts(bound)[: len(_parts(asked))]:
        if isinstance(part, Classified) and isinstance(part.inputs, Tensor):
            found.append(("Classified", part.margin, part.inputs, part.labels))
        elif isinstance(part, Within) and isinstance(part.inputs, Tensor):
            found.append(("Within", part.tolerance, part.inputs, part.targets))
    return tuple(Demand(*facts) for facts in found if facts[2].dtype in _HELD and facts[3].dtype in _HELD)


def recalled(model: nn.Module, constraint: Constraint, device: torch.device) -> Constraint:
    """Return the constraint with the demands of all patches that are on the model."""
    earlier: list[Constraint] = []
    for demand in (demand for patch in applied(model) for demand in patch.demands):
        inputs, wanted = demand.inputs.to(device), demand.wanted.to(device)
        if demand.kind == "Classified":
            earlier.append(Classified(inputs, wanted.long(), demand.limit))
        else:
            earlier.append(Within(inputs, wanted, demand.limit))
    return All((constraint, *earlier)) if earlier else constraint


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
