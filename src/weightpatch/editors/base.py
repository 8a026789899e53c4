"""What an editor is, and the one loop that runs the iterative ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .._calling import Params
from ..errors import InvalidInput, NotEditable
from ..problem import Problem


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """What an editor hands back: parameters, and how many updates it made. It never grades itself; the driver does."""

    params: Params
    steps: int


class Editor(ABC):
    """A way to move parameters until a problem is solved."""

    @abstractmethod
    def run(self, problem: Problem) -> Solution:
        """Return the parameters this editor arrives at from `problem.start`, solved or not."""


@dataclass(frozen=True, kw_only=True)
class IterativeEditor(Editor):
    """An editor that repeats one pure step: ``Edit^k(θ) = θ if l_e(θ) ≤ 0 or k = 0 else Edit^(k-1)(θ - α d)``.

    The stop rule is tested before every step and after the last, so k steps cost k + 1 forward passes.

    Args:
        lr: the step length α, in units of the parameter per unit of the method's direction d; at least 0.
        max_steps: k, the most updates made; 0 makes none.
        keep_weight: how much ``KL(before || after)`` on the kept inputs (nats) weighs in the loss; needs `keep`.
        weight_decay: how much ``½ ||θ - θ_start||²`` weighs in the loss: a pull to the start, not to 0.
    """

    lr: float
    max_steps: int = 10
    keep_weight: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "keep_weight", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidInput(
                    f"{type(self).__name__} was given {name}={value}; expected a finite number, at least 0"
                )
        if not isinstance(self.max_steps, int) or self.max_steps < 0:
            raise InvalidInput(
                f"{type(self).__name__} was given max_steps={self.max_steps!r}; expected an integer, at least 0"
            )

    @abstractmethod
    def init(self, params: Params) -> Any:
        """Return the state before the first step."""

    @abstractmethod
    def step(self, params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        """Return parameters and state one update on; pure, elementwise torch operations, nothing in place."""

    @final
    def run(self, problem: Problem) -> Solution:
        """Repeat `step` until the constraint holds, at most `max_steps` times."""
        return iterate(self, problem)


def iterate(editor: IterativeEditor, problem: Problem) -> Solution:
    """Run the loop of an iterative editor: stop as soon as l_e ≤ 0, or when the violation is no longer finite."""
    params, state = problem.start, editor.init(problem.start)
    for steps in range(editor.max_steps):
        moving = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            violation = problem.violation(moving)
            worst = float(violation.detach().max())
            if worst <= 0 or not math.isfinite(worst):
                return Solution(params, steps)
            loss = violation.relu().sum() + _penalty(editor, problem, moving)
        params, state = editor.step(params, _gradient(loss, moving), state)
    return Solution(params, editor.max_steps)


def _penalty(editor: IterativeEditor, problem: Problem, params: Params) -> Tensor | float:
    penalty: Tensor | float = 0.0
    if editor.keep_weight:
        penalty = penalty + editor.keep_weight * problem.drift(params)
    if editor.weight_decay:
        penalty = penalty + editor.weight_decay * problem.distance(params)
    return penalty


def _gradient(loss: Tensor, params: Params) -> Params:
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True) if loss.requires_grad else []
    if all(g is None for g in grads):
        raise NotEditable(
            f"the constraint does not depend on {sorted(params)}; choose parameters between the input and the output "
            "that is constrained, and check that the model does not detach them"
        )
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), grads, strict=True)}
