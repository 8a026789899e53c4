"""A private view of a model that is being trained: every pass reads the parameters of this moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from .._calling import Inputs, Params
from .clone import structural_clone
from .isolation import differentiable_kernels
from .passes import Recording
from .replay import Call, Replayer
from .scope import select

__all__ = ["LiveNetwork"]


@final
class LiveNetwork:
    """A private eval-mode view of a model in training, some of whose parameters an edit may move.

    The model's modes, buffers and random generators are never touched: passes run on a structural clone, in evaluation
    mode, on the parameters given and on copies of the buffers of the last `refresh`. (An eval pass whose running
    statistics a later training pass changes would give silently wrong gradients.)

    Args:
        model: any eager module.
        parameters: which parameters an edit may move, as globs of their names.
        replay: record and replay; full passes otherwise.

    Attributes:
        names: the parameters that may move.

    Raises:
        InvalidInput: not a model, or no parameter matches.
        NotEditable: the model, or every parameter that matches, is of a kind that cannot be edited.
    """

    def __init__(self, model: nn.Module, parameters: str | Sequence[str] = "*", *, replay: bool = True) -> None:
        self._model = model
        self.names = select(model, parameters)
        clone = structural_clone(model)
        own = dict(clone.named_parameters())
        start = {name: own[name].detach().clone() for name in self.names}
        self._kinds = {name: (value.dtype, value.device) for name, value in own.items()}
        self._replayer = Replayer(clone, start, replay=replay, fixed=tuple(name for name in own if name not in start))

    @property
    def full_passes_because(self) -> str:
        """Why nothing is replayed; empty where it is."""
        return self._replayer.full_passes_because

    def fits(self) -> bool:
        """Say whether the model's parameters have the dtypes and devices they had when this view was made."""
        now = {name: (value.dtype, value.device) for name, value in self._model.named_parameters()}
        return now == self._kinds

    def refresh(self) -> Params:
        """Take over the buffers of this moment; return the model's parameters, by name."""
        self._replayer.renew(self._model)
        return dict(self._model.named_parameters())

    def idle(self, inputs: Inputs) -> bool:
        """Say whether it is known already that nothing is recorded of such a batch."""
        return self._replayer.idle(arguments(inputs))

    def record(self, params: Params, inputs: Inputs) -> tuple[Any, Recording]:
        """Return the answer of a full pass and what it recorded, differentiable in `params` where gradients are on.

        Args:
            params: all parameters by name, those that may move and the others.
            inputs: one batch.
        """
        given = params if torch.is_grad_enabled() else {name: value.detach() for name, value in params.items()}
        with differentiable_kernels():
            return self._replayer.record(self._cast(given), arguments(inputs))

    def run(self, params: Params, recording: Recording | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the answer to a recorded batch, or by a full pass where there is no recording."""
        with differentiable_kernels():
            if recording is None:
                return self._replayer.full(self._cast(params), args, kwargs)
            return self._replayer.replay(self._cast(params), recording, (args, kwargs))

    def _cast(self, params: Params) -> Params:
        kinds = self._kinds
        return {n: v if v.dtype is kinds[n][0] else v.to(kinds[n][0]) for n, v in params.items()}


def arguments(inputs: Inputs) -> Call:
    """Return a batch as positional and keyword arguments, as `call` gives them."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
