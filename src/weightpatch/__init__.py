"""Fix a neural network's mistake without breaking the rest of it: a pull request for weights.

>>> import weightpatch as wp
>>> fix = wp.constraints.Classified(image, label, margin=0.1)
>>> found = wp.edit(model, fix, keep=wp.Locality(images), parameters="layer3.*")
>>> found.raise_for_result().patch.save("4711.patch.safetensors")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import constraints, editors, errors, evaluation, likelihoods, training
    from .editing import Edit, Result, edit
    from .evaluation import Comparison, Report, compare, evaluate
    from .locality import Locality
    from .patches import Patch
    from .training import EditableObjective

__all__ = [
    "Comparison",
    "Edit",
    "EditableObjective",
    "Locality",
    "Patch",
    "Report",
    "Result",
    "__version__",
    "compare",
    "constraints",
    "edit",
    "editors",
    "errors",
    "evaluate",
    "evaluation",
    "likelihoods",
    "training",
]

_HOME = {
    "Comparison": "evaluation",
    "Edit": "editing",
    "EditableObjective": "training",
    "Locality": "locality",
    "Patch": "patches",
    "Report": "evaluation",
    "Result": "editing",
    "compare": "evaluation",
    "edit": "editing",
    "evaluate": "evaluation",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line answers --help and reads a patch without importing torch.
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
