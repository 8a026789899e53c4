"""A residual block in front of a network's head: room for edits that leaves today's answers as they are."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidInput

__all__ = ["ResidualBlock", "add_block"]


@final
class ResidualBlock(nn.Module):
    """``x + W₂ ELU(W₁ x + b₁) + b₂`` with W₂ and b₂ zero at first, so that a new block changes nothing.

    Source: the block of Sinitsin et al., Editable Neural Networks, ICLR 2020, for ImageNet: 512-4096-512.

    Args:
        width: of x, its last dimension.
        hidden: of the layer between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return x + self.outer(F.elu(self.inner(x)))  # type: ignore[no-any-return]


def add_block(model: nn.Module, before: str, hidden: int = 4096) -> str:
    """Put a `ResidualBlock` before a linear layer of the model, in place; the model answers as before, bit for bit.

    The layer `before` becomes a sequence of `block` and `head`: its weight is from now on `{before}.head.weight`. To
    load such a model's weights, build the model and call this again first.

    Args:
        model: any module with that layer.
        before: the layer's name, such as "fc".
        hidden: the width of the block's inner layer.

    Returns:
        The block's parameters as a glob, for `parameters=`.

    Raises:
        InvalidInput: there is no such layer, it is not `torch.nn.Linear`, or `hidden` is below 1.

    >>> objective = EditableObjective(model, editor, parameters=add_block(model, "fc", hidden=4096))
    """
    head = dict(model.named_modules()).get(before)
    if head is None or head is model:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
        near = difflib.get_close_matches(before, linear, 3, 0.3) or linear[-3:]
        raise InvalidInput(f"add_block was given before={before!r}; the model's linear layers are {', '.join(near)}")
    if not isinstance(head, nn.Linear):
        raise InvalidInput(f"add_block was given before={before!r}, a {type(head).__name__}; expected torch.nn.Linear")
    if hidden < 1:
        raise InvalidInput(f"add_block was given hidden={hidden}; expected at least 1")
    block = ResidualBlock(head.in_features, hidden).to(head.weight.device, head.weight.dtype).train(head.training)
    where, _, name = before.rpartition(".")
    setattr(model.get_submodule(where), name, nn.Sequential(OrderedDict(block=block, head=head)))
    return f"{before}.block.*"
