"""Keep every parameter near its start: after each step it is put back to the edge."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, final

from .._calling import Params
from ..errors import InvalidInput
from ..problem import Problem
from .base import IterativeEditor, Rate

_WRAPPED: Any = None  # stands for the wrapped editor's own setting
_SETTINGS = ("lr", "max_steps", "keep_weight", "weight_decay")


class BoundedState(NamedTuple):
    """Where the parameters started, None before the first step, and the wrapped editor's state."""

    start: Params | None
    inner: Any


@final
@dataclass(frozen=True)
class Bounded(IterativeEditor):
    """Take the editor's steps θ' and project: ``θ ← min(max(θ', θ_0 - r), θ_0 + r)``, so ``||θ - θ_0||_∞ ≤ r``.

    θ_0 is the start. With Adam or gradient descent on one layer this is FT-L of the editing literature. The bound holds
    to the rounding of the model's dtype, and an edit for which it leaves no room ends as unsatisfied. Source: Zhu et
    al., *Modifying Memories in Transformer Models*, 2020.

    It is an iterative editor itself, so that Editable Training can go through it. The settings that all of these have
    are those of the wrapped editor; given here, they take the place of its own.

    Args:
        editor: whose steps are taken.
        radius: r, in units of the parameters; above 0, infinite for no bound.

    >>> wp.edit(model, fix, Bounded(wp.editors.Adam(lr=1e-3, max_steps=100), radius=5e-2))
    Edit(satisfied, ...)
    """

    editor: IterativeEditor
    radius: float
    lr: Rate = field(default=_WRAPPED, repr=False, kw_only=True)
    max_steps: int = field(default=_WRAPPED, repr=False, kw_only=True)
    keep_weight: float = field(default=_WRAPPED, repr=False, kw_only=True)
    weight_decay: float = field(default=_WRAPPED, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.editor, IterativeEditor):
            raise InvalidInput(
                f"Bounded was given editor={self.editor!r:.80}; expected an IterativeEditor such as "
                "weightpatch.editors.Adam(lr=1e-3): the bound is kept after every step; wrap the result instead, as in "
                "Shrink(Bounded(...))"
            )
        if not isinstance(self.radius, (int, float)) or not self.radius > 0:
            raise InvalidInput(f"Bounded was given radius={self.radius!r}; expected a number above 0")
        given = {name: value for name in _SETTINGS if (value := getattr(self, name)) is not _WRAPPED}
        object.__setattr__(self, "editor", replace(self.editor, **given))
        for name in _SETTINGS:
            object.__setattr__(self, name, getattr(self.editor, name))

    def init(self, params: Params) -> BoundedState:
        """Return the wrapped editor's state.

        The start is noted by the first step: so a step is all that the gradient of Editable Training has to go through.
        """
        return BoundedState(None, self.editor.init(params))

    def step(self, params: Params, grads: Params, state: BoundedState) -> tuple[Params, BoundedState]:
        """Take the wrapped editor's step, then put what went beyond the bound back to it."""
        return self._put_back(params, state, *self.editor.step(params, grads, state.inner))

    def advanced(
        self, problem: Problem, params: Params, grads: Params, state: BoundedState
    ) -> tuple[Params, BoundedState]:
        """Take the wrapped editor's update, however it looks ahead, then put what went beyond the bound back to it."""
        return self._put_back(params, state, *self.editor.advanced(problem, params, grads, state.inner))

    @property
    def differentiable(self) -> bool:
        """Whether the wrapped editor is."""
        return self.editor.differentiable

    def _put_back(self, params: Params, state: BoundedState, moved: Params, inner: Any) -> tuple[Params, BoundedState]:
        start = params if state.start is None else state.start
        near = {name: p.clamp(start[name] - self.radius, start[name] + self.radius) for name, p in moved.items()}
        return near, BoundedState(start, inner)

    def direction(self, problem: Problem, params: Params, *, create_graph: bool = False) -> Params | None:
        """Return the wrapped editor's directions."""
        return self.editor.direction(problem, params, create_graph=create_graph)
