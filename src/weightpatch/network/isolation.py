"""What surrounds every pass: random generators, inference mode and kernels are as they were afterwards."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

__all__ = [
    "CHECKPOINTED",
    "Noise",
    "differentiable_kernels",
    "isolated",
    "make_differentiable",
    "no_recomputation",
    "preserved_rng",
    "twice_differentiable",
    "uncached_casts",
]

CHECKPOINTED = "recomputation in the backward pass would see other weights"


@dataclass(frozen=True, eq=False)
class Noise:
    """The states of the random generators of torch (CPU and one accelerator), Python and numpy."""

    cpu: Tensor
    python: Any
    numpy: Any
    device: torch.device | None
    accelerator: Tensor | None

    @staticmethod
    def now(device: torch.device | None = None) -> Noise:
        """Read the states."""
        on_chip = device is not None and device.type not in ("cpu", "meta")
        state = torch.get_device_module(device).get_rng_state(device) if on_chip else None
        chip = device if on_chip else None
        return Noise(torch.get_rng_state(), random.getstate(), np.random.get_state(), chip, state)

    def restore(self) -> None:
        """Write the states back."""
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)

    def same(self, other: Noise) -> bool:
        """Say whether no generator has moved between the two."""
        pairs = ((self.cpu, other.cpu), (self.accelerator, other.accelerator))
        return (
            all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
            and self.python == other.python
            and all(np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True))
        )


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[Noise]:
    """Put the random generators of torch (CPU and this accelerator), Python and numpy back as they were."""
    noise = Noise.now(device)
    try:
        yield noise
    finally:
        noise.restore()


_depth = 0
_was_enabled = True
_lock = threading.Lock()


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Switch off the fused attention kernels of eval mode that torch uses only where no gradient is needed.

    They round differently and zero padded positions, so that an edit which changes nothing would seem to change
    something. The answers compared are therefore those of the kernels that training and fine-tuning use.
    """
    global _depth, _was_enabled
    with _lock:
        _depth += 1
        if _depth == 1:
            _was_enabled = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                torch.backends.mha.set_fastpath_enabled(_was_enabled)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Choose attention kernels whose backward pass can itself be differentiated; casts are not cached.

    The fused ones fail only in the second backward pass.
    """
    with sdpa_kernel(SDPBackend.MATH), uncached_casts():
        yield


@contextmanager
def uncached_casts() -> Iterator[None]:
    """Cast weights anew each time, where autocast is on.

    The cache knows tensors by identity, and a differentiated loop makes new ones at every step.
    """
    kinds = [kind for kind in ("cpu", torch.accelerator.current_accelerator()) if kind is not None]
    with ExitStack() as stack:
        for kind in (kind if isinstance(kind, str) else kind.type for kind in kinds):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False))
        yield


def make_differentiable(recurrent: nn.RNNBase) -> None:
    """Make a recurrent module of a clone always choose the kernels that have a backward pass.

    On a CPU torch chooses others, which round differently, where gradients are off; cuDNN's have none in eval mode.
    """
    inner = recurrent.forward

    @wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        wanted = torch.is_grad_enabled()
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            output = inner(*args, **kwargs)
        return output if wanted else pytree.tree_map_only(Tensor, torch.detach, output)

    recurrent.__dict__["forward"] = forward


@contextmanager
def isolated(device: torch.device | None = None) -> Iterator[None]:
    """Run with gradients, outside inference mode, and leave the random generators as they were."""
    with preserved_rng(device), torch.inference_mode(False), torch.enable_grad(), differentiable_kernels():
        yield


@contextmanager
def no_recomputation() -> Iterator[None]:
    """Refuse activation checkpointing: the backward pass would run modules again with other weights in place."""
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(CHECKPOINTED))
            opened = stack.pop_all()
    except RuntimeError:  # the caller has hooks of his own around
        opened = ExitStack()
    with opened:
        yield
