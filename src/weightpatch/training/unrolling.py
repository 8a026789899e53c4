"""The gradient of an outer loss through the steps of an editor: by one retained graph, or step by step in reverse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._calling import Function, Params
from ..editors import IterativeEditor
from ..editors.base import direction
from ..errors import InvalidInput
from ..network import twice_differentiable, uncached_casts
from ..problem import Problem

__all__ = ["Adjoint", "Outcome", "Unrolled", "Unrolling", "step_bytes"]

Outer = Callable[[Params], Tensor]
_PLAIN = (type(None), bool, int, float, str)


class Outcome(NamedTuple):
    """The result of one tried edit.

    Attributes:
        steps: how many updates were made.
        loss: the outer loss.
        grads: its gradient with respect to each leaf; None where it does not depend on one.
    """

    steps: int
    loss: Tensor
    grads: Sequence[Tensor | None]


class Unrolling(ABC):
    """A way to differentiate ``outer(Edit(θ))`` with respect to everything that was read on the way."""

    @abstractmethod
    def gradient(self, editor: IterativeEditor, problem: Problem, outer: Outer, leaves: Sequence[Tensor]) -> Outcome:
        """Run the editor and return the outer loss with its gradients.

        Args:
            editor: whose hyper-parameters may be leaves.
            problem: its start may be leaves, and its function may read leaves.
            outer: the loss at the edited parameters.
            leaves: what gradients are asked for.
        """


@final
@dataclass(frozen=True)
class Unrolled(Unrolling):
    """Keep the graph of all steps: the fastest, with memory that grows with the number of steps.

    Args:
        create_graph: whether the editor's gradients are differentiated too. Without, each is taken for a constant,
            ``∂θ̂/∂θ = 1``: the first-order approximation, which is cheaper and not the true gradient.
    """

    create_graph: bool = True

    def gradient(self, editor: IterativeEditor, problem: Problem, outer: Outer, leaves: Sequence[Tensor]) -> Outcome:
        """Run the editor once and its graph backwards."""
        problem = _on(twice_differentiable if self.create_graph else uncached_casts, problem)
        params = {n: v.view_as(v) if v.requires_grad else _leaf(v) for n, v in problem.start.items()}
        state, steps = editor.init(params), 0
        for _ in range(editor.max_steps):
            grads = direction(editor, problem, params, create_graph=self.create_graph)
            if grads is None:
                break
            params, state = editor.step(params, grads, state)
            steps += 1
        loss = outer(params)
        return Outcome(steps, loss.detach(), _grad([loss], leaves))


@final
class Adjoint(Unrolling):
    """Keep the parameters and the state of every step only, and go back by one vector-Jacobian product a step.

    With ``z_{t+1} = Φ(z_t, c)`` for parameters and state z and leaves c: ``λ_t = (∂Φ/∂z)ᵀ λ_{t+1}`` and
    ``∂L/∂c = ∂L/∂c|_K + Σ_t (∂Φ/∂c)ᵀ λ_{t+1}``, each Φ computed again. Its activations are those of one step, whatever
    the number of steps.
    """

    def gradient(self, editor: IterativeEditor, problem: Problem, outer: Outer, leaves: Sequence[Tensor]) -> Outcome:
        """Run the editor forwards without a graph, then every step again in reverse."""
        problem = _on(twice_differentiable, problem)
        moments: list[tuple[Params, Any]] = []
        params, state = _free(problem.start), editor.init(problem.start)
        for _ in range(editor.max_steps):
            grads = direction(editor, problem, params)
            if grads is None:
                break
            moments.append((params, state))
            with torch.no_grad():
                params, state = editor.step(params, grads, state)
            params = _free(params)
            _check_state(editor, state)
        loss = outer(params)
        found = _grad([loss], [*params.values(), *leaves])
        adjoint, found = found[: len(params)], found[len(params) :]
        for params, state in reversed(moments):
            adjoint, more = _step_back(editor, problem, params, state, adjoint, leaves)
            found = [_sum(a, b) for a, b in zip(found, more, strict=True)]
        start = {id(p): grad for p, grad in zip(problem.start.values(), adjoint, strict=False)}
        grads_ = [_sum(grad, start.get(id(leaf))) for leaf, grad in zip(leaves, found, strict=True)]
        return Outcome(len(moments), loss.detach(), grads_)


def _step_back(
    editor: IterativeEditor,
    problem: Problem,
    params: Params,
    state: Any,
    adjoint: list[Tensor | None],
    leaves: Sequence[Tensor],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Carry the gradient behind one step to the parameters and tensors of the state before it, and to leaves."""
    moving, held = _free(params), pytree.tree_map_only(Tensor, _leaf, state)
    grads = direction(editor, problem, moving, create_graph=True)
    assert grads is not None  # it went on from here before
    moved, kept = editor.step(moving, grads, held)
    outputs = [*(moved[name] for name in params), *_tensors(kept)]
    weights = [*adjoint, *[None] * (len(outputs) - len(adjoint))]
    sources = [*moving.values(), *_tensors(held)]
    found = _grad(outputs, [*sources, *leaves], weights)
    return found[: len(sources)], found[len(sources) :]


def step_bytes(editor: IterativeEditor, problem: Problem, but: Sequence[Tensor]) -> int:
    """Return how much memory the retained graph of one step takes, in bytes, without the tensors in `but`."""
    known = {tensor.untyped_storage()._cdata for tensor in but}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor

    problem, params = _on(twice_differentiable, problem), _free(problem.start)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grads = direction(editor, problem, params, create_graph=True)
        if grads is not None:
            editor.step(params, grads, editor.init(params))
    return sum(found.values())


def _on(kernels: Callable[[], AbstractContextManager[None]], problem: Problem) -> Problem:
    """Return the problem with a model that runs on these kernels."""

    def at(params: Params) -> Function:
        inner = problem.at(params)

        def function(*args: Any, **kwargs: Any) -> Any:
            with kernels():
                return inner(*args, **kwargs)

        return function

    return replace(problem, at=at)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _free(params: Params) -> Params:
    return {name: _leaf(value) for name, value in params.items()}


def _tensors(state: Any) -> list[Tensor]:
    return [part for part in pytree.tree_leaves(state) if isinstance(part, Tensor)]


def _check_state(editor: IterativeEditor, state: Any) -> None:
    odd = [part for part in pytree.tree_leaves(state) if not isinstance(part, (Tensor, *_PLAIN))]
    if odd:
        raise InvalidInput(
            f"{type(editor).__name__}.step returned {type(odd[0]).__name__} in its state; to be differentiated step by "
            "step it has to be made of tensors and numbers in tuples, named tuples, lists and dicts"
        )


def _sum(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    if one is None or two is None:
        return two if one is None else one
    return one + two


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor | None] | None = None
) -> list[Tensor | None]:
    """Return the gradient of a weighted sum of outputs; those without a weight or a graph count nothing."""
    pairs = zip(outputs, weights or [torch.ones_like(output) for output in outputs], strict=True)
    used = [(output, weight) for output, weight in pairs if weight is not None and output.requires_grad]
    if not used:
        return [None] * len(inputs)
    return list(torch.autograd.grad([o for o, _ in used], inputs, [w for _, w in used], allow_unused=True))
