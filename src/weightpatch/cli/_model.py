"""The user's model on the command line: a factory to import, and a file of weights that cannot run code."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor, nn


def load_model(factory: str, weights: Path | None) -> nn.Module:
    """Call a factory, load `weights` strictly when given, and return the model in evaluation mode.

    Args:
        factory: package.module:factory, with literal keyword arguments where it needs some, as in
            package.models:resnet(width=16).
        weights: .safetensors, .pt or .pth.
    """
    from torch import nn

    module_name, name, arguments = _parsed(factory)
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        build = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(f"--model {factory!r} could not be imported from {here}: {error}") from error
    try:
        model = build(**arguments)
    except TypeError as error:
        raise InvalidInput(f"--model {factory!r} could not be called: {error}") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"--model {factory!r} returned {type(model).__name__}; expected a torch.nn.Module")
    if weights is not None:
        from ..patches import load_weights

        if not weights.is_file():
            raise InvalidInput(f"{weights} is not a file; expected weights as .safetensors, .pt or .pth")
        _load_into(model, dict(load_weights(weights).tensors), weights)
    return model.eval()


def _parsed(factory: str) -> tuple[str, str, dict[str, Any]]:
    """Take package.module:factory(name=literal) apart."""
    module_name, _, call = factory.partition(":")
    try:
        found = ast.parse(call, mode="eval").body
        if isinstance(found, ast.Name):
            found = ast.Call(found, [], [])
        if module_name and isinstance(found, ast.Call) and isinstance(found.func, ast.Name) and not found.args:
            return module_name, found.func.id, {str(k.arg): ast.literal_eval(k.value) for k in found.keywords if k.arg}
    except (SyntaxError, ValueError):
        pass
    raise InvalidInput(
        f"--model was given {factory!r}; expected package.module:factory, as in mypackage.models:build or "
        "mypackage.models:build(width=16)"
    )


def _load_into(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InvalidInput(f"{path} does not fit the model: {error}") from error
