"""What an editor is, and the one loop that runs the iterative ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from .._calling import Params
from ..effects import Effect
from ..errors import InvalidInput, NotEditable
from ..problem import Problem
from .metric import Metric

Rate: TypeAlias = "float | Mapping[str, float | Tensor]"


def each(rate: Rate, name: str) -> float | Tensor:
    """Return the hyper-parameter of one tensor, where it is given by the tensors' names; else the one of all."""
    return rate[name] if isinstance(rate, Mapping) else rate


def root(square: Tensor) -> Tensor:
    """Return √x for x ≥ 0 whose derivative at 0 is 0 in place of infinity, so that steps can be differentiated."""
    positive = square > 0
    return square.where(positive, 1).sqrt().where(positive, 0)


@final
@dataclass(frozen=True, eq=False)
class Certificate:
    """Evidence that an answer is the best, or that there is none: the multipliers λ ≥ 0 of the demands.

    Attributes:
        multipliers: one a demand, (n,), float64: of the least norm where there is an answer; of a contradiction where
            there is none, ``Σ λ_i ∇l_i = 0`` and ``Σ λ_i l_i > 0``. Of a demand about a distance, ``||r|| ≤ ρ``, which
            has one of any sign for each number of r, it is the length of these.
        infeasible: the demands that contradict each other; empty where there is an answer.
        affine: whether the answers to the demands' inputs were seen to be affine in the edited parameters, as those of
            a linear readout are. Then the answer is optimal, and a contradiction is one; else they hold for the
            linearised demands alone.
        gap: the relative duality gap, at most rounding where the answer is optimal.
    """

    multipliers: Tensor
    infeasible: tuple[int, ...]
    affine: bool
    gap: float


@final
@dataclass(frozen=True, eq=False)
class Attempt:
    """What one rung of `Auto` came to.

    Attributes:
        name: of the rung.
        held: whether every demand was met.
        within: whether that was within the budget.
        kept: what changed on the kept items that the search saw; None where nothing is kept.
        held_out: what changed on those that it did not see; None likewise, and where there is one item alone.
        generality: the share of the altered copies for which the demands hold; None without them.
        steps: how many updates it took.
        seconds: what it took.
    """

    name: str
    held: bool
    within: bool
    kept: Effect | None
    held_out: Effect | None
    generality: float | None
    steps: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return own | {name: effect and effect.to_json() for name, effect in own.items() if isinstance(effect, Effect)}

    def __str__(self) -> str:
        parts = ["taken" if self.within else "over the budget" if self.held else "does not hold"]
        parts += [] if self.kept is None else [f"changes {self.kept.changed} of {self.kept.items} kept"]
        parts += [] if self.held_out is None else [f"{self.held_out} held out, drift {self.held_out.drift:.2g} nats"]
        parts += [] if self.generality is None else [f"generality {100 * self.generality:.0f} %"]
        return f"{self.name}: {', '.join(parts)}, {self.steps} steps, {1000 * self.seconds:.0f} ms"


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """What an editor hands back. It never grades itself; the driver does.

    Attributes:
        params: where it arrived.
        steps: how many updates it made.
        certificate: what an exact method can say about its answer.
        attempts: what a ladder tried, in turn.
        within: whether its own budget is kept.
    """

    params: Params
    steps: int
    certificate: Certificate | None = None
    attempts: tuple[Attempt, ...] = ()
    within: bool = True


class Editor(ABC):
    """A way to move parameters until a problem is solved."""

    @property
    def slots(self) -> Mapping[str, int]:
        """For how many keys it needs room at which layers: the driver adds it; see `Gate`."""
        return {}

    @property
    def taps(self) -> tuple[str, ...]:
        """Which modules' inputs and outputs it looks at: the driver puts taps there; see `KeyValue`."""
        return ()

    @abstractmethod
    def run(self, problem: Problem) -> Solution:
        """Return the parameters this editor arrives at from `problem.start`, solved or not."""

    def settled(self, problem: Problem, solution: Solution) -> Solution:
        """Return the solution as it is shipped: less may change than was judged, never more.

        Args:
            problem: the same; what judged, `problem.judge`, may be looked at now.
            solution: what `run` returned.
        """
        return solution


def parts(value: Any) -> Iterator[Any]:
    """Yield an editor, what it wraps, and all of their settings."""
    yield value
    if is_dataclass(value) and not isinstance(value, Metric):
        for field in fields(value):
            yield from parts(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from parts(item)


@dataclass(frozen=True, kw_only=True)
class IterativeEditor(Editor):
    """An editor that repeats one pure step: ``Edit^k(θ) = θ if l_e(θ) ≤ 0 or k = 0 else Edit^(k-1)(θ - α d)``.

    The stop rule is tested before every step and after the last, so k steps cost k + 1 forward passes.

    Args:
        lr: the step length α, in units of the parameter per unit of the method's direction d; at least 0. One for all
            tensors, or one for each by its name (Editable Training learns those).
        max_steps: k, the most updates made; 0 makes none.
        keep_weight: how much ``KL(before || after)`` on the kept inputs (nats) weighs in the loss; needs `keep`.
        weight_decay: how much ``½ ||θ - θ_start||²`` weighs in the loss: a pull to the start, not to 0.
    """

    lr: Rate
    max_steps: int = 10
    keep_weight: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "keep_weight", "weight_decay"):
            given = getattr(self, name)
            for value in given.values() if isinstance(given, Mapping) else (given,):
                if not isinstance(value, Tensor) and not (math.isfinite(value) and value >= 0):
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

    def scaled(self, value: Tensor, grads: Params) -> Params:
        """Return the directions that `step` is given: the gradients, unless the method needs the loss's value too.

        Args:
            value: the loss, a scalar above 0.
            grads: its gradient.
        """
        return grads

    def direction(self, problem: Problem, params: Params, *, create_graph: bool = False) -> Params | None:
        """Return what `step` is given at `params`; None where the loop ends: all is met, or something is not finite.

        It is the gradient of the loss, as `scaled` makes it, unless the method solves for it. Gradients are on.

        Args:
            problem: what is asked.
            params: where the direction is taken.
            create_graph: whether the direction itself is to be differentiated, as Editable Training does.
        """
        violation = problem.violation(params)
        worst = float(violation.detach().max())
        if worst <= 0 or not math.isfinite(worst):
            return None
        loss = violation.relu().sum() + _penalty(self, problem, params)
        return self.scaled(loss, _gradient(loss, params, create_graph))

    def advanced(self, problem: Problem, params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        """Return parameters and state one update of `run` on: those of `step`, unless the method looks ahead.

        Args:
            problem: what is asked.
            params: where the search is.
            grads: the directions, as `scaled` makes them.
            state: of the method.
        """
        return self.step(params, grads, state)

    @property
    def differentiable(self) -> bool:
        """Whether an update is a `step` and no more, so that Editable Training can go through it."""
        return True

    @final
    def run(self, problem: Problem) -> Solution:
        """Repeat `step` until the constraint holds, at most `max_steps` times."""
        return iterate(self, problem)


def iterate(editor: IterativeEditor, problem: Problem) -> Solution:
    """Run the loop of an iterative editor: stop as soon as l_e ≤ 0, or when the violation is no longer finite."""
    params, state = problem.start, editor.init(problem.start)
    for steps in range(editor.max_steps):
        moving = {name: p.detach().requires_grad_() for name, p in params.items()}
        grads = None if problem.expired else direction(editor, problem, moving)
        if grads is None:
            return Solution(params, steps)
        params, state = editor.advanced(problem, params, grads, state)
    return Solution(params, editor.max_steps)


def direction(
    editor: IterativeEditor, problem: Problem, params: Params, *, create_graph: bool = False
) -> Params | None:
    """Return what the editor's step is given at `params`; None where the loop ends here.

    Args:
        editor: its penalties are part of the loss.
        problem: what is asked.
        params: where the direction is taken.
        create_graph: whether the direction itself is to be differentiated, as Editable Training does.
    """
    with torch.enable_grad():
        return editor.direction(problem, params, create_graph=create_graph)


def objective(editor: IterativeEditor, problem: Problem, params: Params) -> Tensor:
    """Return the editor's loss at `params`, a scalar: the violations above 0, summed, and its penalties."""
    return problem.violation(params).relu().sum() + _penalty(editor, problem, params)


def _penalty(editor: IterativeEditor, problem: Problem, params: Params) -> Tensor | float:
    penalty: Tensor | float = 0.0
    if editor.keep_weight:
        penalty = penalty + editor.keep_weight * problem.drift(params)
    if editor.weight_decay:
        penalty = penalty + editor.weight_decay * problem.distance(params)
    return penalty


def _gradient(loss: Tensor, params: Params, create_graph: bool) -> Params:
    moved = list(params.values())
    grads = torch.autograd.grad(loss, moved, allow_unused=True, create_graph=create_graph) if loss.requires_grad else []
    if all(g is None for g in grads):
        raise NotEditable(
            f"the constraint does not depend on {sorted(params)}; choose parameters between the input and the output "
            "that is constrained, and check that the model does not detach them"
        )
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), grads, strict=True)}
