"""What a model of transformers computes before its last, linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from weightpatch.evaluation.standing import Readout

__all__ = ["readout_of"]


@final
class _States(nn.Module):
    """A model up to its last, linear layer: that of the output embeddings, behind what was put before it."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, **inputs: Any) -> Tensor:
        """Return what the last layer is given, (rows, length, width)."""
        whole: Any = self.whole
        found: Tensor = whole.base_model(**inputs)[0]
        head = whole.get_output_embeddings()
        before: nn.Module = head[:-1] if isinstance(head, nn.Sequential) else nn.Identity()
        answer: Tensor = before(found)
        return answer


def readout_of(model: nn.Module, edited: Sequence[str]) -> Readout | None:
    """Return a model's readout; None where it has none that is known, or where that is edited or not in float32.

    Args:
        model: any model; those of transformers say which module their output embeddings are.
        edited: names of parameters.
    """
    named: Any = getattr(model, "get_output_embeddings", None)
    head = None if named is None else named()
    last = head[-1] if isinstance(head, nn.Sequential) and len(head) else head
    if not isinstance(last, nn.Linear) or getattr(model, "base_model", model) is model:
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = {id(p) for p in last.parameters()}
    if last.weight.dtype != torch.float32 or any(id(parameters.get(name)) in own for name in edited):
        return None
    return Readout(_States(model), "whole.", last.weight)
