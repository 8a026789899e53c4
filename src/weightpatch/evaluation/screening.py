"""Exact answers from approximate outputs: whatever could differ is computed again, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..likelihoods import Categorical, Likelihood

__all__ = ["Screen", "margins", "settle"]

SAFETY = 2.0


@final
@dataclass(frozen=True, eq=False)
class Screen:
    """How near items are to another verdict, by a likelihood that says so.

    Attributes:
        likelihood: fitted.
        before: outputs of the unedited model, (n, ..., k).
    """

    likelihood: Likelihood
    before: Tensor

    def margin(self, outputs: Tensor) -> Tensor:
        """Return how far the nearest position of each item is from changing its verdict, (n,); NaN for NaN."""
        if isinstance(self.likelihood, Categorical):
            found = margins(outputs.movedim(self.likelihood.dim or -1, -1))
        else:
            told = self.likelihood.margin(outputs, self.before)
            assert told is not None
            found = told
        return found.reshape(len(found), -1).amin(1)

    def reach(self, error: Tensor) -> Tensor:
        """Return by how much errors of outputs, (m, ..., k), move a margin at most, (): NaN where one is NaN."""
        return self.likelihood.reach(error).amax()


def margins(logits: Tensor) -> Tensor:
    """Return by how much the best class of each position beats the second; `Categorical.margin`, but quicker.

    Args:
        logits: (n, ..., classes), which are changed on the way, and back.
    """
    best, index = logits.max(-1, keepdim=True)
    second = logits.scatter_(-1, index, -torch.inf).amax(-1)  # in place and back: a copy would take most of the time
    logits.scatter_(-1, index, best)
    return best.squeeze(-1) - second


def settle(coarse: Tensor, exact: Callable[[Tensor], Tensor], sample: Tensor, screen: Screen) -> tuple[Tensor, Tensor]:
    """Replace approximate outputs (n, ..., k) by exact ones wherever the approximation could change an answer.

    The error is bounded by `SAFETY` times the largest one seen: on `sample`, which is always computed exactly, and on
    every item computed exactly because its margin is within the bound. Where those err more than was assumed the bound
    grows and the search is repeated; it ends, at the latest, with every item exact. An approximation that is not
    finite is never trusted.

    Returns:
        The outputs, and which items are exact, (n,) bool.
    """
    found, known = coarse.clone(), torch.zeros(len(coarse), dtype=torch.bool, device=coarse.device)
    trusted = coarse.isfinite().reshape(len(coarse), -1).all(1)
    gap, bound, todo = screen.margin(coarse), torch.zeros((), device=coarse.device), sample
    while len(todo):
        found[todo] = exact(todo)
        known[todo] = True
        bound = torch.maximum(bound, SAFETY * screen.reach(coarse[todo] - found[todo]))
        todo = (~known & ~(trusted & (gap > bound))).nonzero().squeeze(1)
    return found, known
