"""The numbers of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch

from ..errors import InvalidInput

__all__ = ["TrainSettings"]


@final
@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How long, how much at a time, and how often to look.

    Args:
        steps: updates of the weights.
        batch_size: items of one process and one backward pass.
        edits: edits of one process and one backward pass.
        accumulate: backward passes an update, whose gradients are averaged.
        clip: the largest norm of the gradient; longer ones are scaled down to it. None clips nothing.
        precision: bfloat16 or float16 for mixed precision; None computes in the model's own dtype.
        seed: all randomness depends on it and on the number of the step.
        k: the number of steps an edit may take, as a function of the training step, such as `Ramp`; the editor's own
            `max_steps` when not given. Validation always uses the editor's own.
        log_every: steps from one line of the history to the next.
        validate_every: steps from one validation to the next; there is one at the end too.
        checkpoint_every: steps from one checkpoint to the next; there is one at the end too.
        patience: training ends after so many validations without a new best one; None never ends early.
        bad_steps: training stops with an error after so many steps in a row whose loss or gradient is NaN or infinite.
    """

    steps: int
    batch_size: int = 128
    edits: int = 4
    accumulate: int = 1
    clip: float | None = 10.0
    precision: torch.dtype | None = None
    seed: int = 0
    k: Callable[[int], int] | None = None
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500
    patience: int | None = None
    bad_steps: int = 5

    def __post_init__(self) -> None:
        whole = ["steps", "batch_size", "edits", "accumulate", "log_every", "validate_every", "checkpoint_every"]
        for name in (*whole, "bad_steps", *(["patience"] if self.patience is not None else [])):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(f"TrainSettings was given {name}={value!r}; expected an integer, at least 1")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise InvalidInput(f"TrainSettings was given clip={self.clip}; expected a number above 0, or None")
        if self.precision not in (None, torch.bfloat16, torch.float16):
            raise InvalidInput(
                f"TrainSettings was given precision={self.precision}; expected torch.bfloat16, torch.float16 or None"
            )
