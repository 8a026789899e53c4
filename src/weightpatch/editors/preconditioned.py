"""Gradient descent in the metric of a layer's inputs, with a Polyak step inside a trust region."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from .._calling import Params
from ..errors import InvalidInput
from ..problem import Problem
from .base import IterativeEditor, Rate, each, objective
from .metric import Metric
from .shrink import between


@final
@dataclass(frozen=True, kw_only=True)
class Preconditioned(IterativeEditor):
    """Preconditioned gradient descent: ``θ ← θ - α η d``, ``η = min(l_e / gᵀ d, r min_l p_l / ||d||_l)``.

    C in ``d = C⁻¹ g`` is the second moment of the inputs of each edited layer, so that the step changes the layer's
    answers on reference data as little as it can for the progress it makes; with a two-sided metric ``d = G⁻¹ g C⁻¹``,
    and it is the model's answers that change little. The first η is Polyak's: it solves the linearised demand. The
    second is a trust region: what one step adds to a layer's outputs, ``||d||_l² = tr(d C dᵀ)``, stays, in root mean
    square on the reference data, below r times these outputs' own, p_l. Source: Polyak, *Introduction to Optimization*,
    1987; the metric is that of K-FAC (Martens and Grosse 2015), its input side also that of ROME (Meng et al. 2022).

    With a line search, a step that does not halve the loss is doubled as long as that lowers it, inside of the trust
    region, and one that does not lower it at all is halved until it does. Where that does not help, the plain step is
    made: along a subgradient the loss need not go down. Editable Training goes through plain steps alone.

    Args:
        lr: α, in Polyak steps.
        metric: from `weightpatch.statistics`.
        radius: r; no bound on a layer whose outputs are 0 on the reference data, as those of a new block are.
        line_search: how many other lengths of a step are tried at most, at one forward pass each.

    >>> from weightpatch.statistics import second_moments
    >>> moments = second_moments(model, images, parameters="layer3.weight")
    >>> wp.edit(model, fix, Preconditioned(metric=moments.metric(), max_steps=20), parameters="layer3.*")
    Edit(satisfied, ...)
    """

    lr: Rate = 1.05
    metric: Metric
    radius: float = 0.5
    line_search: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.metric, Metric):
            raise InvalidInput(
                f"Preconditioned was given metric={self.metric!r:.80}; expected weightpatch.statistics."
                "second_moments(model, inputs).metric()"
            )
        if not self.radius > 0:
            raise InvalidInput(f"Preconditioned was given radius={self.radius}; expected a number above 0")
        if not isinstance(self.line_search, int) or self.line_search < 0:
            raise InvalidInput(
                f"Preconditioned was given line_search={self.line_search!r}; expected an integer, at least 0"
            )

    @property
    def differentiable(self) -> bool:
        """Whether it makes plain steps."""
        return not self.line_search

    def scaled(self, value: Tensor, grads: Params) -> Params:
        """Return ``η d``."""
        moved, squares = self.metric.applied(grads)
        spreads = self.metric.spreads(moved) if self.metric.two_sided else squares
        total = torch.stack(list(squares.values())).sum()
        tiny = torch.finfo(total.dtype).tiny
        eta = value / total.clamp_min(tiny)
        for name, spread in spreads.items():
            eta = torch.minimum(eta, self._allowed(name) * spread.clamp_min(tiny).rsqrt())
        return {name: eta * d for name, d in moved.items()}

    def init(self, params: Params) -> None:
        """Return nothing: there is no state."""

    def step(self, params: Params, grads: Params, state: None) -> tuple[Params, None]:
        """Move every parameter by ``-α`` times its scaled direction."""
        return {name: p - each(self.lr, name) * grads[name] for name, p in params.items()}, None

    def advanced(self, problem: Problem, params: Params, grads: Params, state: None) -> tuple[Params, None]:
        """Make a step of the length that the line search finds."""
        moved, _ = self.step(params, grads, state)
        return (self._searched(problem, params, moved) if self.line_search else moved), None

    @torch.no_grad()
    def _searched(self, problem: Problem, params: Params, moved: Params) -> Params:
        """Look along the step for a length that is not too short, and lowers the loss."""

        def loss(t: float) -> float:
            found = float(objective(self, problem, between(params, moved, t)))
            return found if math.isfinite(found) else math.inf

        start, least, best, tried = loss(0.0), loss(1.0), 1.0, 0
        if start / 2 < least < start:
            most = self._longest(params, moved)
            while tried < self.line_search and 2 * best <= most and (value := loss(2 * best)) < least:
                best, least, tried = 2 * best, value, tried + 1
        while tried < self.line_search and least >= start:
            best, least, tried = best / 2, loss(best / 2), tried + 1
        return between(params, moved, best) if least < start else moved

    def _longest(self, params: Params, moved: Params) -> float:
        """Return how many times as long the step may be in the trust region; at least 1."""
        spreads = self.metric.spreads({name: p - params[name] for name, p in moved.items()})
        ratios = [self._allowed(name) / math.sqrt(spread) for name, s in spreads.items() if (spread := float(s)) > 0]
        return max(1.0, min(ratios, default=1.0))

    def _allowed(self, layer: str) -> float:
        return self.radius * math.sqrt(self.metric.layers[layer].power) or math.inf
