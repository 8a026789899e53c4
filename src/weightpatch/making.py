"""Making the patch of an edit: what changed, for which weights, how, and with what evidence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ._calling import Params
from .checking import check
from .gates import Gate
from .locality import Locality
from .network import GATE, Network
from .outcome import Result, Solved
from .patches import Patch, applied, base_fingerprint

__all__ = ["patched"]


def patched(
    model: nn.Module, network: Network, solved: Solved, keep: Locality | None, max_drift: float, made: dict[str, Any]
) -> tuple[Patch | None, Solved]:
    """Return the patch and the grade of the weights it composes to; an exact one where rounding lost the demand.

    Args:
        model: the user's.
        network: a view of it, or of its copy with room for gates.
        solved: what was found.
        keep: what should stay.
        max_drift: nats.
        made: how it was made, as `Patch.between` takes it.
    """
    if solved.result is Result.nonfinite:
        return None, solved
    base, own = network.rounded(network.start), dict(model.state_dict())
    plain = {name: value for name, value in solved.params.items() if f".{GATE}." not in name}
    gates = {name: value for name, value in solved.params.items() if name not in plain}
    on = tuple(patch.id for patch in applied(model))
    facts: dict[str, Any] = {"fingerprint": base_fingerprint(model), "requires": on, "context": on, **made}
    for exact in (False, True):
        patch = Patch.between(own, plain, gates=_gates(gates), exact=exact, **facts)
        composed = {**base, **gates, **{name: value.to(network.device) for name, value in patch.result(own).items()}}
        graded = solved
        if not all(torch.equal(composed[name], value) for name, value in solved.params.items()):
            with network.isolated():
                graded = check(network, replace(solved, params=composed), keep, max_drift)
        if graded.result is solved.result:
            break
    return patch.annotated(metrics=_metrics(graded)), graded


def _metrics(solved: Solved) -> dict[str, Any]:
    """Return what was measured, as JSON values."""
    found: dict[str, Any] = {"result": solved.result.name, "steps": solved.steps}
    if math.isfinite(solved.after):
        found["violation"] = solved.after
    for name, effect in (("kept", solved.kept), ("held_out", solved.held_out)):
        if effect is not None and math.isfinite(effect.drift):
            found[name] = effect.to_json()
    if not solved.reality.true:
        found["reality"] = str(solved.reality)
    return found


def _gates(params: Params) -> dict[str, Gate]:
    """Return the gates that are in use, by layer."""
    found = {}
    for name, radii in params.items():
        layer, _, part = name.rpartition(f".{GATE}.")
        if part == "radii" and bool((used := radii >= 0).any()):
            keys, values = (params[f"{layer}.{GATE}.{other}"][used] for other in ("keys", "values"))
            found[layer] = Gate(keys, radii[used], values)
    return found
