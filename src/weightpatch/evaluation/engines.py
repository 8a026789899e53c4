"""Ways to the logits of edited models on one test set: a traced suffix, the last layer alone, or replayed passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._calling import Inputs, Output, Params, length, outputs, rows, selected
from ..network import Network, Recording, structural_clone
from .steps import Whole, fits
from .tracing import Recorded, Suffix, Trace

__all__ = ["Engine", "Head", "Replayed", "Traced"]

BUDGET = 2 << 30  # bytes of recorded activations, in float32 and in bfloat16


class Engine(ABC):
    """Logits of edited models on the items of one test set."""

    @abstractmethod
    def weights(self, params: Params) -> Any:
        """Return what the other methods take for these edited parameters."""

    @abstractmethod
    def over(self, weights: Any) -> Tensor:
        """Return the logits of all items, shape (n, classes), float32 or the model's own wider dtype."""

    @abstractmethod
    def some(self, weights: Any, index: Tensor) -> Tensor:
        """Return the logits of the items in `index`, shape (len(index), classes)."""

    def fits(self, weights: Any) -> bool:
        """Say whether the weights are so far from overflow that `over` gives what a full pass does, or NaN."""
        return True

    @abstractmethod
    def batch(self, params: Params, number: int) -> Tensor:
        """Return the logits of one batch of the test set as a full pass gives them, bit for bit where that can be."""

    @abstractmethod
    def first(self, weights: Any) -> Tensor:
        """Return the logits of the first items, as many as are run at once: what a timing needs."""

    @abstractmethod
    def rough(self) -> Engine | None:
        """Return the same in bfloat16, which is faster on some machines; None where it could not be."""


@final
class Traced(Engine):
    """The operations behind the edit, with batch normalisation folded and channels last, on recorded values.

    The first convolutions of an edit of low rank are corrected rather than run, see `Shortcut`, where this is faster.
    Its float32 logits differ from those of a full pass by rounding.
    """

    def __init__(self, trace: Trace, recorded: Recorded, batch_size: int, dtype: torch.dtype = torch.float32) -> None:
        self._trace, self._recorded, self._batch_size = trace, recorded, batch_size
        share = BUDGET * dtype.itemsize // (torch.float32.itemsize + torch.bfloat16.itemsize)
        self._suffix = Suffix(trace, recorded, dtype, room=share - recorded.nbytes)
        self._plain = Suffix(trace, recorded, dtype, plain=True)

    @staticmethod
    def of(model: nn.Module, network: Network, inputs: Inputs, batch_size: int, output: Output = None) -> Traced | Head:
        """Trace a model and record a test set; where only a linear layer that makes the logits is edited, that is all.

        Raises:
            Exception: of any kind, where the model cannot be traced or computes in another dtype than float32.
        """
        floats = {value.dtype for value in (*model.parameters(), *model.buffers()) if value.is_floating_point()}
        if floats != {torch.float32}:
            raise TypeError(f"the model computes in {floats}")
        clone = structural_clone(model)
        trace = Trace(clone, network.names, output=output)
        item = sum(value.nbytes for value in trace.record(rows(inputs, slice(0, 1))))
        if item * length(inputs) * 1.5 > BUDGET:
            trace = Trace(clone, network.names, whole=True, output=output)
        traced = Traced(trace, Recorded.of(trace, inputs, batch_size), batch_size)
        head = trace.fused[0] if len(trace.fused) == len(trace.cuts) == 1 else None
        features = traced._recorded.values[trace.cuts[0]]
        linear = isinstance(head, Whole) and type(head.module) is nn.Linear and features.ndim == 2
        if isinstance(head, Whole) and linear and not callable(output):
            return Head(traced, features, head)
        return traced

    def weights(self, params: Params) -> Any:
        """Fold and convert the weights."""
        return self._suffix.prepare(params)

    def fits(self, weights: Any) -> bool:
        """Look at the folded weights; values on the way are looked at as they are made."""
        return self._suffix.fits(weights)

    def over(self, weights: Any) -> Tensor:
        """Return the logits of all items."""
        return self._suffix.over(weights)

    def some(self, weights: Any, index: Tensor) -> Tensor:
        """Return the logits of some items, gathered from what is recorded."""
        return self._suffix.some(weights, index)

    def batch(self, params: Params, number: int) -> Tensor:
        """Return the logits of one batch by the model's own operations on values laid out as it makes them."""
        cut = self._recorded.original(slice(number * self._batch_size, (number + 1) * self._batch_size))
        return self._plain.run(self._plain.prepare(params), cut)

    def first(self, weights: Any) -> Tensor:
        """Return the logits of the first items."""
        return self._suffix.first(weights)

    def rough(self) -> Traced:
        """Return the same with everything converted to bfloat16."""
        return Traced(self._trace, self._recorded.to(torch.bfloat16), self._batch_size, torch.bfloat16)


@final
class Head(Engine):
    """A linear layer that makes the logits of what is recorded: only the classes whose weights changed are computed.

    The demand for a class has a gradient for that class and for those that win in its place, and for no other: whatever
    the editor, few rows of the layer move. ``y[:, c] = x W[c] + b[c]`` for those, on the unedited logits.
    """

    def __init__(self, traced: Traced, features: Tensor, step: Whole) -> None:
        self._traced, self._features, self._names = traced, features, step.names
        self._own = {name: value.detach() for name, value in step.module.named_parameters()}
        self._base, self._fits = self._logits(self._own), bool(fits(features))

    def weights(self, params: Params) -> Params:
        """Return the layer's weight and bias."""
        return {own: params.get(self._names.get(own, ""), value) for own, value in self._own.items()}

    def fits(self, weights: Params) -> bool:
        """Look at what is recorded, and at the weights."""
        return self._fits and all(bool(fits(value)) for value in (*weights.values(), *self._own.values()))

    def over(self, weights: Params) -> Tensor:
        """Return the logits of all items."""
        moved = torch.stack(
            [(weights[own] != value).reshape(len(value), -1).any(1) for own, value in self._own.items()]
        )
        classes = moved.any(0).nonzero().squeeze(1)
        if 4 * len(classes) > self._base.shape[1]:
            return self._logits(weights)
        logits = self._base.clone()
        logits[:, classes] = self._logits({own: value[classes] for own, value in weights.items()})
        return logits

    def some(self, weights: Params, index: Tensor) -> Tensor:
        """Return the logits of some items."""
        return F.linear(self._features[index], weights["weight"], weights.get("bias"))

    def batch(self, params: Params, number: int) -> Tensor:
        """Return the logits of one batch by the model's own operations."""
        return self._traced.batch(params, number)

    def first(self, weights: Params) -> Tensor:
        """Return the logits of all items."""
        return self.over(weights)

    def rough(self) -> None:
        """Return nothing: rounding the logits is all that would change."""

    def _logits(self, weights: Params) -> Tensor:
        return F.linear(self._features, weights["weight"], weights.get("bias"))


@final
class Replayed(Engine):
    """The model itself, replaying what does not depend on the edit; its logits of all items are those of full passes.

    Args:
        network: the model.
        inputs: n items.
        batch_size: items in one pass.
        sample: the items that are most often asked for, recorded as well.
        output: which tensor of a structured answer is meant.
        recordings: of the batches and of the sample, where they are made already.
        autocast: run in bfloat16 where PyTorch's autocast does.
    """

    def __init__(
        self,
        network: Network,
        inputs: Inputs,
        batch_size: int,
        sample: Tensor,
        output: Output = None,
        recordings: tuple[list[Recording | None], Recording] | None = None,
        autocast: bool = False,
    ) -> None:
        self._network, self._inputs, self._batch_size, self._sample = network, inputs, batch_size, sample
        self._batches = [slice(a, a + batch_size) for a in range(0, length(inputs), batch_size)]
        self._autocast, self._output = autocast, output
        self._recordings, self._sampled = recordings or self._record()

    def _record(self) -> tuple[list[Recording | None], Recording]:
        recordings: list[Recording | None] = []
        spent = 0
        for batch in self._batches:
            recording = self._network.record(rows(self._inputs, batch)) if spent < BUDGET else None
            spent += 0 if recording is None else recording.nbytes
            recordings.append(recording if spent < BUDGET else None)
        return recordings, self._network.record(rows(self._inputs, self._sample))

    def weights(self, params: Params) -> Params:
        """Return them as they are."""
        return params

    def over(self, weights: Any) -> Tensor:
        """Return the logits of all items, batch by batch."""
        with self._precision():
            return torch.cat([self.batch(weights, i) for i in range(len(self._batches))])

    def some(self, weights: Any, index: Tensor) -> Tensor:
        """Return the logits of some items by full passes, or of the sample by a replayed one."""
        with self._precision():
            if index is self._sample:
                return selected(self._network.run(weights, self._sampled), self._output)
            parts: tuple[Tensor, ...] = torch.split(index, self._batch_size)
            return torch.cat(
                [outputs(self._network.full(weights), rows(self._inputs, part), self._output) for part in parts]
            )

    def batch(self, params: Params, number: int) -> Tensor:
        """Return the logits of one batch."""
        recording = self._recordings[number]
        if recording is None:
            return outputs(self._network.full(params), rows(self._inputs, self._batches[number]), self._output)
        return selected(self._network.run(params, recording), self._output)

    def first(self, weights: Any) -> Tensor:
        """Return the logits of the first batch."""
        with self._precision():
            return self.batch(weights, 0)

    def rough(self) -> Replayed:
        """Return the same under autocast."""
        made = (self._recordings, self._sampled)
        return Replayed(self._network, self._inputs, self._batch_size, self._sample, self._output, made, autocast=True)

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._network.device.type, torch.bfloat16) if self._autocast else nullcontext()
