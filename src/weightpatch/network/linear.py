"""Linear layers, whichever way round their weight is."""

from __future__ import annotations

from torch import nn

__all__ = ["is_linear", "is_transposed"]


def is_transposed(module: nn.Module) -> bool:
    """Say whether a linear layer's weight is (width, out), as that of the Conv1D of transformers, which has an nf."""
    return not isinstance(module, nn.Linear) and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer of either kind."""
    return isinstance(module, nn.Linear) or is_transposed(module)
