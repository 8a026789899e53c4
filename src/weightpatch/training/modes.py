"""Whether a model answers the same in training mode as in evaluation mode."""

from __future__ import annotations

import torch
from torch import nn

from .._calling import Inputs, rows
from ..network import preserved_rng, structural_clone
from ..network.isolation import Noise
from ..network.live import arguments
from ..network.tree import equal

__all__ = ["eval_is_train"]


def eval_is_train(model: nn.Module, inputs: Inputs) -> bool:
    """Say whether a pass in the model's present mode is one in evaluation mode: no batch statistics, no dropout.

    Found by running both on two items: answers, buffers and random generators must be the same, bit for bit.
    """
    modes = [module.training for module in model.modules()]
    if not any(modes):
        return True
    few = rows(inputs, slice(0, 2))
    device = next((p.device for p in model.parameters()), None)
    with preserved_rng(device) as noise, torch.no_grad():
        answers = []
        for mode in (modes, [False] * len(modes)):
            clone = structural_clone(model)
            for module, training in zip(clone.modules(), mode, strict=True):
                module.__dict__["training"] = training
            noise.restore()
            try:
                args, kwargs = arguments(few)
                answers.append(clone(*args, **kwargs))
            except (ValueError, RuntimeError):  # batch statistics of too few values, for one
                return False
            unchanged = all(map(torch.equal, clone.buffers(), model.buffers()))
            if not unchanged or not noise.same(Noise.now(device)):
                return False
    return equal(answers[0], answers[1], exactly=True)
