"""Patches: small, checked changes of named weights, as values and as files.

Importing this package does not import torch; `describe` reads a patch file without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .format import describe
from .manifest import DemandEntry, Entry, GateEntry, Manifest, ReadingEntry, Unrecorded

if TYPE_CHECKING:
    from ..gates import Gate, Lock, Reading
    from .applying import base_fingerprint
    from .demands import Demand
    from .hashing import fingerprint
    from .operations import Full, LowRank, Operation, Rows, Sparse, encode
    from .patch import Patch, applied
    from .stack import compose
    from .weights import Weights, load_weights, save_weights

__all__ = [
    "Demand",
    "DemandEntry",
    "Entry",
    "Full",
    "Gate",
    "GateEntry",
    "Lock",
    "LowRank",
    "Manifest",
    "Operation",
    "Patch",
    "Reading",
    "ReadingEntry",
    "Rows",
    "Sparse",
    "Unrecorded",
    "Weights",
    "applied",
    "base_fingerprint",
    "compose",
    "describe",
    "encode",
    "fingerprint",
    "load_weights",
    "save_weights",
]

_HOMES = {
    "..gates": ("Gate", "Lock", "Reading"),
    ".applying": ("base_fingerprint",),
    ".demands": ("Demand",),
    ".hashing": ("fingerprint",),
    ".operations": ("Full", "LowRank", "Operation", "Rows", "Sparse", "encode"),
    ".patch": ("Patch", "applied"),
    ".stack": ("compose",),
    ".weights": ("Weights", "load_weights", "save_weights"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(home, __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
