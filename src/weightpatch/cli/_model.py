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
        raise InvalidInput(f"--model was given {factory!r}; expected package.module:factory, as in torchvision.models:resnet18")
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
        _load_into(model, read_state(weights), weights)
    return model.eval()


def read_state(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a .safetensors file, or from a .pt/.pth file as data only, never as code."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InvalidInput(f"{path} is not a file; expected weights as .safetensors, .pt or .pth")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InvalidInput(f"{path} could not be read as weights: {error}") from error
    except Exception as error:  # the unpickler's own error class, whose home differs between torch versions
        raise InvalidInput(f"{path} is not a plain file of tensors and was refused: {str(error).splitlines()[0]}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InvalidInput(f"{path} does not hold named tensors; expected a state_dict")
    return state


def _load_into(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InvalidInput(f"{path} does not fit the model: {error}") from error
