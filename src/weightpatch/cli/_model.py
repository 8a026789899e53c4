"""The user's model on the command line: a factory to import, and a file of weights that cannot run code."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor, nn


def load_model(factory: str, weights: Path | None) -> nn.Module:
    """Call `package.module:factory`, load `weights` strictly when given, and return the model in evaluation mode."""
    from torch import nn

    module_name, colon, name = factory.partition(":")
    if not colon or not module_name or not name:
        raise InvalidInput(
            f"--model was given {factory!r}; expected package.module:factory, as in mypackage.models:build"
        )
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        build = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(f"--model {factory!r} could not be imported from {here}: {error}") from error
    model = build()
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"--model {factory!r} returned {type(model).__name__}; expected a torch.nn.Module")
    if weights is not None:
        from ..patches import load_weights

        if not weights.is_file():
            raise InvalidInput(f"{weights} is not a file; expected weights as .safetensors, .pt or .pth")
        _load_into(model, dict(load_weights(weights).tensors), weights)
    return model.eval()


def _load_into(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InvalidInput(f"{path} does not fit the model: {error}") from error
