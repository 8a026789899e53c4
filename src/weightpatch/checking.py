"""Grading an edit: by full passes, in the model's own dtype, as deployed; and what it did to what is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ._calling import Function, Params, length, outputs
from .constraints import Constraint
from .effects import Effect
from .errors import InvalidInput
from .locality import Locality
from .network import Network, Noise
from .outcome import Reality, Result, Solved

__all__ = ["check", "effect", "measured"]

_DRAWS = 32  # passes of a model that draws random numbers
_ALONE = 8  # items of a batch that are asked alone, to see whether they depend on the others
_ROUNDING = 64  # units in the last place that a batch of another size may be off by
_HALVES = 2  # the same in bfloat16, whose products are summed in float32


def check(network: Network, solved: Solved, keep: Locality | None, max_drift: float = math.inf) -> Solved:
    """Grade parameters by a full pass, in the model's own dtype, on the bound constraint, and as deployed."""
    params, refined, reality = network.rounded(solved.params), None, Reality()
    function = network.full(params)
    with torch.no_grad():
        after = float(solved.constraint.violation(function).max())
        finite = math.isfinite(after) and all(bool(p.isfinite().all()) for p in params.values())
        kept, held_out = (None, None) if keep is None or not finite else measured(network, params, keep)
    if finite and after <= 0:
        deployed = network.deployed(params)
        refined = solved.constraint.refined(deployed)
        reality = Reality() if refined is not None else _reality(solved.constraint, deployed, network.device)
    tries = max(1, len(solved.attempts))
    told = [None if one is None else one.after(tries) for one in (kept, _worse(held_out, solved.held_out))]
    drift = max((one.drift for one in told if one is not None), default=0.0)
    if not finite:
        result = Result.nonfinite
    elif refined is not None:
        result = Result.unsatisfied
    elif after <= 0 and not reality.true:
        result = Result.unreliable
    elif after <= 0:
        result = Result.satisfied if solved.within and drift <= max_drift else Result.over_budget
    elif solved.certificate is not None and solved.certificate.affine and solved.certificate.infeasible:
        result = Result.infeasible
    elif _same(params, network.rounded(network.start)):
        result = Result.stalled
    else:
        result = Result.unsatisfied
    return replace(
        solved,
        result=result,
        params=params,
        after=after,
        kept=told[0],
        held_out=told[1],
        reality=reality,
        refined=refined,
    )


def measured(network: Network, params: Params, keep: Locality) -> tuple[Effect, Effect | None]:
    """Return what parameters change on all that is kept, and on the part of it that no search has seen."""
    seen, unseen = keep.split
    found = effect(network, params, seen)
    held_out = None if unseen is None else effect(network, params, unseen)
    if held_out is None or keep.judge is not None:
        return found, held_out
    if len(keep.parts) > 1:  # each has a mean of its own, over positions of its own
        return effect(network, params, keep), held_out
    return found + held_out, held_out


@torch.no_grad()
def effect(network: Network, params: Params, keep: Locality) -> Effect:
    """Return what parameters change on all of these items."""
    moved = [name for name, start in network.rounded(network.start).items() if not torch.equal(start, params[name])]
    if not moved:  # from where this search began, which may be beyond what is to be kept to
        bound = any(part.answers is not None for part in keep.parts)
        return keep.bind(network.before).effect(network.before) if bound else keep.unchanged()
    at = network.narrow(moved)
    before, after = (at({name: some[name] for name in moved}) for some in (network.start, params))
    return keep.between(before, after)


def _worse(new: Effect | None, old: Effect | None) -> Effect | None:
    """Return the figure of a search before it looked at what judges it, where that is the larger one."""
    if new is None or old is None:
        return new
    return old if (old.changed, old.drift) > (new.changed, new.drift) else new


def _reality(constraint: Constraint, function: Function, device: torch.device) -> Reality:
    """Ask again: several times where the model draws random numbers, and item by item where these depend on others."""
    with torch.no_grad():
        noise, draws, held = Noise.now(device), 1, 1
        differ = _differ(constraint.violation(function), constraint.violation(function))
        if differ or not noise.same(Noise.now(device)):  # what is drawn may seldom matter
            draws, held = _DRAWS, sum(constraint.satisfied(function) for _ in range(_DRAWS))
        if differ:
            return Reality(draws, held)
        apart = [one for part in constraint.conjuncts for one in _apart(part, function)]
        alone = sum(_holds_alone(one, function) for one in apart)
    return Reality(draws, held, len(apart), alone)


def _apart(part: Constraint, function: Function) -> list[Constraint]:
    """Return what is asked of each item alone, where items of the batch depend on each other beyond rounding."""
    if len(part.batches) != 1 or (n := length(part.batches[0])) < 2:
        return []
    alone = [(place, one) for place in range(n) if (one := part.alone(place)) is not None]
    if not alone:
        return []
    whole = outputs(function, part.batches[0], part.output)
    if len(whole) != n:
        raise InvalidInput(
            f"the model returned {tuple(whole.shape)} for {n} items of {part.kind}; expected one row an item"
        )
    some = sorted({round(step * (len(alone) - 1) / (_ALONE - 1)) for step in range(_ALONE)})
    depend = any(
        (answer := _answer_alone(one, function)) is None or _differ(answer, whole[place : place + 1])
        for place, one in (alone[index] for index in some)
    )
    return [one for _, one in alone] if depend else []


def _answer_alone(one: Constraint, function: Function) -> Tensor | None:
    """Return the answer to one item; None where the model refuses a single one, as some batch normalisation does."""
    try:
        return outputs(function, one.batches[0], one.output)
    except (RuntimeError, ValueError):
        return None


def _holds_alone(one: Constraint, function: Function) -> bool:
    try:
        return one.satisfied(function)
    except (RuntimeError, ValueError):
        return False


def _differ(one: Tensor, other: Tensor) -> bool:
    """Say whether two answers differ by more than rounding."""
    if one.shape != other.shape:
        return True
    halves = torch.equal(one.bfloat16().to(one.dtype), one) or torch.equal(one.half().to(one.dtype), one)
    near = _HALVES * torch.finfo(torch.bfloat16).eps if halves else _ROUNDING * torch.finfo(one.dtype).eps
    scale = torch.maximum(one.abs().max(), other.abs().max()).clamp_min(1.0)
    return not bool(((one - other).abs() <= near * scale).all())


def _same(one: Params, other: Params) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.values(), other.values(), strict=True))
