"""Exact answers from approximate logits: whatever could differ is computed again, exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["answers", "margins", "settle", "spread"]

SAFETY = 2.0


def margins(logits: Tensor) -> Tensor:
    """Return by how much the best class beats the second, shape (n,); NaN where a logit is NaN or both are infinite."""
    best, index = logits.max(1, keepdim=True)
    second = logits.scatter_(1, index, -torch.inf).amax(1)  # in place and back: a copy would take most of the time
    logits.scatter_(1, index, best)
    return best.squeeze(1) - second


def spread(difference: Tensor) -> Tensor:
    """Return the most that a margin can be off by, shape (n,), from the errors of an item's logits (n, classes)."""
    return difference.amax(1) - difference.amin(1)


def answers(logits: Tensor) -> Tensor:
    """Return the class of each item, shape (n,); -1, which is no class, where a logit is NaN."""
    best, index = logits.max(1)
    return index.where(~best.isnan(), -1)


def settle(coarse: Tensor, exact: Callable[[Tensor], Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
    """Replace approximate logits (n, classes) by exact ones wherever the approximation could change an answer.

    The error is bounded by `SAFETY` times the largest one seen: on `sample`, which is always computed exactly, and on
    every item computed exactly because its margin is within the bound. Where those err more than was assumed the bound
    grows and the search is repeated; it ends, at the latest, with every item exact. An approximation that is not
    finite is never trusted.

    Returns:
        The logits, and which items are exact, (n,) bool.
    """
    logits, known = coarse.clone(), torch.zeros(len(coarse), dtype=torch.bool, device=coarse.device)
    gap, bound, todo = margins(coarse), torch.zeros((), device=coarse.device), sample
    while len(todo):
        logits[todo] = exact(todo)
        known[todo] = True
        bound = torch.maximum(bound, SAFETY * spread(coarse[todo] - logits[todo]).max())
        todo = (~known & ~(gap > bound)).nonzero().squeeze(1)
    return logits, known
