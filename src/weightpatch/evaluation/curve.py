"""The strength of a patch: how far the constraint holds and what else changes, between base and patch."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from .._calling import Output, Params, length, outputs, rows
from ..constraints import Constraint
from ..editing import Edit
from ..errors import InvalidInput
from ..likelihoods import Likelihood
from ..network import Network
from ..patches import Patch
from .comparison import Comparison
from .judging import TestSet, check_targets, chosen
from .metrics import Estimate, Flips

__all__ = ["Curve", "Point", "between", "curve", "places", "sweep"]

STRENGTHS = tuple(i / 10 for i in range(11))


@final
@dataclass(frozen=True)
class Point:
    """One strength t of a patch: ``θ(t) = θ_base + t (θ_patched - θ_base)``.

    Attributes:
        strength: t; 0 is the base, 1 the whole patch.
        slack: the least slack of any demand, in the constraint's units; the constraint holds where it is at least 0.
        drawdown: error at t minus error of the base, with its paired 95 % interval, see `Comparison.drawdown`.
        flips: answers that differ from the base's.
    """

    strength: float
    slack: float
    drawdown: Estimate
    flips: Flips


@final
@dataclass(frozen=True)
class Curve:
    """What each strength of one patch costs, in rising order of strength."""

    points: tuple[Point, ...]

    @property
    def threshold(self) -> float | None:
        """The strength from which the constraint holds, linear between the points; None where it never holds.

        It is where the slack last becomes positive, so the constraint holds from there up to the last point.
        """
        if not self.points or not self.points[-1].slack >= 0:
            return None
        later = self.points[-1]
        for earlier in self.points[-2::-1]:
            if not earlier.slack >= 0:
                share = later.slack / (later.slack - earlier.slack)
                return later.strength - (share if share == share else 0.0) * (later.strength - earlier.strength)
            later = earlier
        return later.strength

    def to_json(self) -> dict[str, Any]:
        """Return every number as plain values."""
        return {
            "threshold": self.threshold,
            "points": [
                {
                    "strength": p.strength,
                    "slack": p.slack if abs(p.slack) < float("inf") else None,
                    "drawdown": asdict(p.drawdown),
                    "flips": asdict(p.flips),
                }
                for p in self.points
            ],
        }


def curve(
    model: nn.Module,
    patch: Patch | Edit,
    constraint: Constraint,
    test: TestSet,
    *,
    strengths: Sequence[float] = STRENGTHS,
    likelihood: Likelihood | None = None,
    output: Output = None,
    batch_size: int = 128,
) -> Curve:
    """Measure a patch at several strengths; the model is left as it is.

    Args:
        model: the model that the patch was made for, unpatched.
        patch: the patch, or an edit that has one.
        constraint: what was asked for.
        test: inputs and what is right, as `compare` takes them, on which the drawdown is measured.
        strengths: which t to measure, each from 0 to 1.
        likelihood: what the outputs mean, see `compare`.
        output: which tensor of a structured answer is meant, see `compare`.
        batch_size: how many test items a pass gets.

    Raises:
        InvalidInput: a strength is out of range, or the patch changes nothing.
    """
    strengths = sorted(set(strengths))
    if not strengths or not all(0 <= t <= 1 for t in strengths):
        raise InvalidInput(f"curve was given strengths {strengths}; expected at least one number, each from 0 to 1")
    found = patch.patch if isinstance(patch, Edit) else patch
    if found is None or not found.operations:
        raise InvalidInput("curve was given a patch that changes nothing; expected one with at least one operation")
    check_targets(test[1], length(test[0]))
    network = Network(model, places(model, found))
    with network.isolated():
        bound = constraint.bind(network.before)
    return sweep(network, found, bound, test, strengths, batch_size, likelihood, output)[0]


def places(model: nn.Module, patch: Patch) -> tuple[str, ...]:
    """Return patterns for all names, in a model, of the parameters that a patch changes; tied ones have several."""
    named = list(model.named_parameters(remove_duplicate=False))
    chosen = {id(parameter) for name, parameter in named if name in patch.operations}
    return tuple(glob.escape(name) for name, parameter in named if id(parameter) in chosen)


def sweep(
    network: Network,
    patch: Patch,
    constraint: Constraint,
    test: TestSet,
    strengths: Sequence[float],
    batch_size: int,
    likelihood: Likelihood | None = None,
    output: Output = None,
) -> tuple[Curve, Comparison]:
    """Measure a patch at rising strengths, against a bound constraint; also return the comparison at the last one."""
    paths = [between(network, patch, t) for t in strengths]
    with network.isolated(), torch.no_grad():
        slacks = [-float(constraint.violation(network.at(params)).max()) for params in paths]
    moving = [params for params, t in zip(paths, strengths, strict=True) if t]
    base, *moved = _outputs(network, [network.start, *moving], test, batch_size, output)
    if len(moving) < len(paths):
        moved.insert(0, base)  # strength 0, which comes first
    targets = test[1].detach().cpu()
    fitted = chosen(likelihood, base, targets)
    comparisons = [Comparison(base, found, targets, fitted) for found in moved]
    points = zip(strengths, slacks, comparisons, strict=True)
    return Curve(tuple(Point(t, slack, c.drawdown, c.flips) for t, slack, c in points)), comparisons[-1]


def between(network: Network, patch: Patch, strength: float) -> Params:
    """Return ``θ_base + t (θ_patched - θ_base)`` of the patch's tensors; exactly the patched ones at t = 1."""
    patched = patch.result(network.rounded(network.start))
    start = network.start
    return {
        name: torch.lerp(start[name], patched[name].to(start[name]), strength) if name in patched else start[name]
        for name in start
    }


def _outputs(network: Network, paths: Sequence[Params], test: TestSet, batch_size: int, output: Output) -> list[Tensor]:
    """Return the outputs for the test set of each set of parameters; batch by batch, so that a prefix is run once."""
    parts: list[list[Tensor]] = [[] for _ in paths]
    for start in range(0, length(test[0]), batch_size):
        batch = rows(test[0], slice(start, start + batch_size))
        with network.isolated(), torch.no_grad():
            for found, params in zip(parts, paths, strict=True):
                found.append(outputs(network.at(params), batch, output).cpu())
    return [torch.cat(found) for found in parts]
