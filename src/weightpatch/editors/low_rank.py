"""Let any editor move a change of low rank, in place of every weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import final

import torch
from torch import Tensor

from .._calling import Params
from ..errors import InvalidInput, NotEditable
from ..problem import Problem
from .base import Editor, IterativeEditor, Solution, parts
from .metric import Metric


@final
@dataclass(frozen=True)
class LowRank(Editor):
    """Run an editor on the factors of ``W = W_start + (α / r) B A`` with B (out, r) starting at 0 and A (r, in) random.

    Convolutions are read as matrices (out, in · k · k), as patches of low rank do, so that the patch takes
    ``r (out + in)`` numbers a matrix. A matrix with no more than r rows or columns moves in full: no rank is above r
    there. Source: LoRA (Hu et al., ICLR 2022), whose A is Gaussian too; here its variance is 1 / in, which makes ||BA||
    about ||B|| as long as A is near its start.

    What the editor has settings for, it does to the factors: their `weight_decay` pulls B to 0 and A to its start, and
    so the change to 0. What it measures of answers, as `keep_weight` does, is of the whole model. A rate by names needs
    those of the factors: ``fc.weight.left`` is B, ``fc.weight.right`` is A.

    Args:
        editor: moves the factors; none with a metric or a gate, which are about the weights themselves.
        rank: r, at least 1.
        alpha: α; the change is scaled by α / r.
        seed: of A.
        vectors: whether biases, norms and all else of fewer than two dimensions move too, in full; else they stay.

    Raises:
        InvalidInput: a setting cannot be used.
        NotEditable: when run, there is no matrix to move.

    >>> wp.edit(model, fix, LowRank(wp.editors.Adam(lr=1e-2, max_steps=100), rank=4))
    Edit(satisfied, ...)
    """

    editor: Editor
    rank: int = 4
    alpha: float = 4.0
    seed: int = 0
    vectors: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.editor, Editor):
            raise InvalidInput(
                f"LowRank was given editor={self.editor!r:.80}; expected an editor such as Adam(lr=1e-2)"
            )
        if not isinstance(self.rank, int) or self.rank < 1:
            raise InvalidInput(f"LowRank was given rank={self.rank!r}; expected an integer, at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InvalidInput(f"LowRank was given alpha={self.alpha}; expected a finite number above 0")
        if not isinstance(self.seed, int):
            raise InvalidInput(f"LowRank was given seed={self.seed!r}; expected an integer")
        for part in parts(self.editor):
            if isinstance(part, Metric) or (isinstance(part, Editor) and (part.slots or part.taps)):
                raise InvalidInput(
                    f"LowRank was given {self.editor!r:.80}, which needs the weights themselves for its metric or gate "
                    "and cannot move factors; use it without LowRank, or wrap another editor such as Adam(lr=1e-2)"
                )

    def run(self, problem: Problem) -> Solution:
        """Return the solution of the wrapped editor, composed to full parameters."""
        names = [name for name, value in problem.start.items() if self.vectors or value.ndim > 1]
        if not names:
            raise NotEditable(
                f"LowRank has no matrix to move among {', '.join(list(problem.start)[:5])}; choose weights of linear "
                "or convolution layers too, or pass vectors=True"
            )
        part = problem.part(names)
        factors = self._factors(part.start)
        _check_rates(self.editor, factors)
        found = self.editor.run(
            Problem(factors, lambda given: part.at(self._composed(part.start, given)), part.constraint, part.keep)
        )
        with torch.no_grad():
            composed = self._composed(part.start, found.params)
            kept = {n: torch.where(composed[n] == p, p, composed[n]) for n, p in part.start.items()}  # -0 + 0 is not -0
        # A certificate is about the factors, in which no answer is affine.
        return replace(found, params={**problem.start, **kept}, certificate=None)

    def _factors(self, start: Params) -> Params:
        """Return B = 0 and a random A of each matrix, and every other tensor itself."""
        found: Params = {}
        generator = torch.Generator("cpu").manual_seed(self.seed)
        for name, value in start.items():
            if value.ndim < 2 or min(matrix := value.reshape(len(value), -1).shape) <= self.rank:
                found[name] = value
                continue
            drawn = torch.randn(self.rank, matrix[1], dtype=torch.float64, device="cpu", generator=generator)
            left, right = _names(name)
            found[left] = value.new_zeros(matrix[0], self.rank)
            found[right] = (drawn / matrix[1] ** 0.5).to(value)
        return found

    def _composed(self, start: Params, factors: Params) -> Params:
        """Return the full parameters, differentiable in the factors."""
        return {name: factors[name] if name in factors else self._moved(name, p, factors) for name, p in start.items()}

    def _moved(self, name: str, start: Tensor, factors: Params) -> Tensor:
        left, right = _names(name)
        return start + self.alpha / self.rank * (factors[left] @ factors[right]).view_as(start)


def _names(name: str) -> tuple[str, str]:
    return f"{name}.left", f"{name}.right"


def _check_rates(editor: Editor, factors: Params) -> None:
    for part in parts(editor):
        for field in fields(part) if isinstance(part, IterativeEditor) else ():
            rate = getattr(part, field.name)
            missing = sorted(factors.keys() - rate.keys()) if isinstance(rate, Mapping) else []
            if missing:
                raise InvalidInput(
                    f"{type(part).__name__} was given {field.name} by names, without {', '.join(missing[:4])}, which "
                    "are what it moves inside of LowRank; give one value for all or one for each of them"
                )
