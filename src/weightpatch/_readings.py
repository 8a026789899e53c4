"""The names of what a gate's keys can be compared with; needs no torch."""

from __future__ import annotations

from .errors import InvalidInput

POOLINGS = ("none", "mean", "last", "minimum")
DISTANCES = ("euclidean", "cosine")

_MOST = 2**16


def check_reading(pooling: object, grid: object, distance: object) -> None:
    """Refuse (`InvalidInput`) poolings and distances that are not in the lists, and grids that pool nothing."""
    if not isinstance(pooling, str) or pooling not in POOLINGS:
        raise InvalidInput(f"a key's pooling is {pooling!r:.80}; expected one of {', '.join(POOLINGS)}")
    if not isinstance(distance, str) or distance not in DISTANCES:
        raise InvalidInput(f"a key's distance is {distance!r:.80}; expected one of {', '.join(DISTANCES)}")
    sizes = isinstance(grid, tuple) and len(grid) <= 3 and all(type(n) is int and 0 < n <= _MOST for n in grid)
    if not sizes or (grid and pooling != "mean"):
        raise InvalidInput(
            f"a key's grid is {grid!r:.80} with pooling {pooling!r}; expected () or, with 'mean', up to three sizes of "
            f"1 to {_MOST}"
        )
