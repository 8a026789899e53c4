"""One step of training: a batch and edits that depend on its number alone, gradients, and an update or none."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .._calling import Inputs, outputs
from ..errors import NonFinite
from .checkpoints import write_whole
from .episodes import Episode
from .items import TrainingData, batch_index, derived, derived_seed
from .objective import EditableObjective
from .placing import named_tensors, placed
from .samplers import Sampler
from .settings import TrainSettings
from .validation import answering

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Stepper"]


@final
@dataclass(eq=False)
class Stepper:
    """Makes steps, given what accelerate has prepared.

    Attributes:
        skipped: how many steps were skipped.
        in_a_row: how many of them just now.
    """

    objective: EditableObjective
    wrapped: nn.Module
    optimiser: Any
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    data: TrainingData
    sampler: Sampler
    settings: TrainSettings
    folder: Path
    accelerator: Accelerator
    skipped: int = 0
    in_a_row: int = 0

    def update(self, step: int) -> dict[str, Any]:
        """Make one step of the optimiser, or skip it where something is not finite; return what was found."""
        settings, accelerator = self.settings, self.accelerator
        torch.manual_seed(derived_seed(settings.seed, "noise", step, accelerator.process_index))
        buffers = [(buffer, buffer.clone()) for buffer in self.objective.buffers()]
        total = self._backward(step)
        norm = float(accelerator.clip_grad_norm_(list(self.wrapped.parameters()), settings.clip or math.inf))
        loss = float(accelerator.reduce(total, "mean"))
        good = math.isfinite(loss) and math.isfinite(norm)
        scaled = accelerator.scaler is not None  # a scaler skips steps with an infinite gradient, and learns from them
        if good or scaled:
            self.optimiser.step()
        self.optimiser.zero_grad()
        if not good:
            _put_back(buffers)
        if self.schedule is not None:
            self.schedule.step()
        self._count(step, good, good or (scaled and math.isfinite(loss)))
        terms = {} if self.objective.terms is None else asdict(self.objective.terms)
        return {"loss": loss, **terms, "norm": norm, "k": self.objective.editor.max_steps}

    def _backward(self, step: int) -> Tensor:
        """Average the gradients of the parts of one step; return the mean loss, a scalar, NaN where one is."""
        parts, total = self.settings.accumulate, torch.zeros((), device=self.accelerator.device)
        for part in range(parts):
            self._drawn = self._draw(step * parts + part)
            try:
                with self._together(part + 1 == parts):
                    loss = self.wrapped(self._drawn[1], batch=self._drawn[0])
                    self.accelerator.backward(loss / parts)
            except NonFinite:
                if self.accelerator.num_processes > 1:  # the others wait for this gradient
                    raise
                return total + math.nan
            total = total + loss.detach() / parts
        return total

    def _together(self, last: bool) -> AbstractContextManager[Any]:
        """Let processes exchange gradients only at the last part."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def _draw(self, number: int) -> tuple[tuple[Inputs, Any], list[Episode]]:
        """Return one batch and its edits, on the accelerator's device."""
        settings, device = self.settings, self.accelerator.device
        ranks, rank, size = self.accelerator.num_processes, self.accelerator.process_index, settings.batch_size
        index = batch_index(len(self.data), size * ranks, number, settings.seed)[rank * size : (rank + 1) * size]
        batch = self.data.batch(index, derived(settings.seed, "augment", number, rank))
        generator = derived(settings.seed, "edits", number, rank)
        with answering(self.objective.model) as model:

            def function(*args: Any, **kwargs: Any) -> Tensor:
                return outputs(model, placed(args, device) if args else placed(kwargs, device))

            episodes = self.sampler.draw(settings.edits, function, generator)
        return placed(batch, device), placed(episodes, device)

    def _count(self, step: int, good: bool, expected: bool) -> None:
        """Count skipped steps, and stop where there are too many in a row."""
        self.skipped += not good
        self.in_a_row = 0 if expected else self.in_a_row + 1
        if self.in_a_row < self.settings.bad_steps:
            return
        path = self.folder / "bad-batch.safetensors"
        if self.accelerator.is_main_process:
            found = {name.removeprefix("."): tensor.clone().contiguous() for name, tensor in named_tensors(self._drawn)}
            write_whole(path, lambda partial: save_file(found, partial, metadata={"step": str(step)}))
        raise NonFinite(
            f"training stopped at step {step}: the loss or its gradient was NaN or infinite {self.in_a_row} times in a "
            f"row; {path} has the last batch and its edits; look for bad values in it, or try a smaller learning rate, "
            "fewer editor steps or no mixed precision"
        )


def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Undo what a pass did to running statistics."""
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
