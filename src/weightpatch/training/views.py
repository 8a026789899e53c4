"""The passes of one training step: recorded once with their graph, replayed with edited parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._calling import Function, Inputs, Params, call, leaves, length, rows
from ..network import LiveNetwork, Recording
from ..network.live import arguments
from ..network.tree import equal, flatten_call

__all__ = ["Batch", "Part", "Recorder", "View"]


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """One recorded batch.

    Attributes:
        inputs: what the network was given.
        recording: of a full pass; differentiable in the parameters where gradients were on.
        output: the answer of that pass.
    """

    inputs: Inputs
    recording: Recording
    output: Any

    def tensors(self) -> list[Tensor]:
        """Return what the recording stores that is differentiated."""
        return [tensor for tensor in self.recording.tensors() if tensor.requires_grad]


@final
@dataclass(frozen=True, eq=False)
class Part:
    """Some items of a recorded batch, as a constraint shows them: `inputs` are the very tensors it will ask for."""

    batch: Batch
    inputs: Inputs
    index: slice | None = None

    def recording(self) -> Recording:
        """Return what was recorded of these items."""
        whole = self.batch.recording
        with torch.no_grad():
            return whole if self.index is None else whole.items(self.index, length(self.batch.inputs))


@final
class View:
    """The network as one edit sees it: a function of the edited parameters that replays the batches it knows.

    Args:
        network: what runs.
        fixed: the parameters that are not edited, by name.
    """

    def __init__(self, network: LiveNetwork, fixed: Params) -> None:
        self._network, self._fixed = network, fixed
        self._known: dict[tuple[Any, ...], Recording] = {}

    def show(self, inputs: Inputs, recording: Recording) -> None:
        """Replay this recording where these inputs are asked for."""
        if recording.plan is not None:
            self._known[_key(*arguments(inputs))] = recording

    def at(self, params: Params) -> Function:
        """Return the network with these edited parameters, as a function of inputs."""

        def function(*args: Any, **kwargs: Any) -> Any:
            recording = self._known.get(_key(args, kwargs))
            return self._network.run({**self._fixed, **params}, recording, args, kwargs)

        return function


@final
class Recorder:
    """Records batches of a network, several in one pass where its answers to items do not depend on each other."""

    def __init__(self, network: LiveNetwork) -> None:
        self._network = network
        self._separable: dict[Any, bool] = {}

    def whole(self, live: Params, inputs: Inputs, *, answer: bool = True) -> Batch:
        """Record one batch; `answer` says whether the answer, too, is to be differentiable."""
        idle = not answer and self._network.idle(inputs)
        with torch.no_grad() if idle else nullcontext():
            output, recording = self._network.record(live, inputs)
        return Batch(inputs, recording, output)

    def parts(self, live: Params, batches: Sequence[Inputs]) -> list[Part]:
        """Record several batches; none where the network records nothing."""
        batches = [batch for batch in batches if not self._network.idle(batch)]
        together = joined(batches) if len(batches) > 1 else None
        if together is not None and self._separable.get(_kind(together), True):
            whole = self.whole(live, together)
            if whole.recording.plan is None:
                return []
            starts = [0]
            for batch in batches:
                starts.append(starts[-1] + length(batch))
            parts = [Part(whole, b, slice(*starts[i : i + 2])) for i, b in enumerate(batches)]
            if self._may_split(live, parts[-1]):
                return parts
        alone = [Part(self.whole(live, batch), batch) for batch in batches]
        return [part for part in alone if part.batch.recording.plan is not None]

    def shares(self, live: Params, batch: Batch, count: int) -> list[Part]:
        """Split a batch into `count` parts of consecutive items; the whole for each where it cannot be split."""
        n = length(batch.inputs)
        bounds = [slice(i * n // count, max((i + 1) * n // count, i * n // count + 1)) for i in range(count)]
        parts = [Part(batch, rows(batch.inputs, index), index) for index in bounds]
        whole = [Part(batch, batch.inputs)] * count
        return parts if count > 1 and self._may_split(live, parts[0]) else whole

    def _may_split(self, live: Params, part: Part) -> bool:
        """Say whether a part of a recording replays as a full pass of its items; tried once for each kind of batch."""
        kind = _kind(part.inputs)
        if kind not in self._separable:
            here = {name: value.detach() for name, value in live.items()}
            with torch.no_grad():
                view = View(self._network, here)
                expected = call(view.at({}), part.inputs)
                view.show(part.inputs, part.recording())
                self._separable[kind] = equal(call(view.at({}), part.inputs), expected)
        return self._separable[kind]


def joined(batches: Sequence[Inputs]) -> Inputs | None:
    """Return one batch of all items, nested as each of them, or None where they differ in more than their values."""
    flat = [pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch) for batch in batches]
    parts, structure = [part for part, _ in flat], flat[0][1]
    if any(other != structure for _, other in flat) or not all(_all_items(part) for part in parts):
        return None
    if len({tuple((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in part) for part in parts}) != 1:
        return None
    return pytree.tree_unflatten([torch.cat(column) for column in zip(*parts, strict=True)], structure)  # type: ignore[no-any-return]


def _all_items(parts: Sequence[Any]) -> bool:
    """Say whether a batch is made of tensors alone that have one row an item."""
    return bool(parts) and all(isinstance(part, Tensor) and part.ndim and len(part) == len(parts[0]) for part in parts)


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Identify a call by its very tensors and by its constants."""
    tensors, constants, _ = flatten_call(args, kwargs)
    return (*map(id, tensors), *constants)


def _kind(inputs: Inputs) -> tuple[Any, ...]:
    return tuple((leaf.ndim, leaf.dtype) for leaf in leaves(inputs))
