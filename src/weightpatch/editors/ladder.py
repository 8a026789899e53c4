"""The editor that is used when none is given."""

from __future__ import annotations

from .base import Editor
from .retry import Retry
from .rmsprop import RMSProp
from .shrink import Shrink


def ladder(keep_weight: float = 0.0) -> Editor:
    """Return gentle RMSProp steps first, then bolder ones with less regard for what is kept, the first success shrunk.

    RMSProp, because its steps do not depend on the scale of the gradient, so that the rates hold for many models.

    Args:
        keep_weight: how much KL(before || after) on the kept inputs weighs on the first rung, a tenth of it on the
            second, and nothing on the last; 0 where nothing is kept.

    >>> ladder(100.0).halvings
    10
    """
    return Shrink(
        Retry(
            (
                RMSProp(lr=3e-4, max_steps=100, keep_weight=keep_weight),
                RMSProp(lr=1e-3, max_steps=100, keep_weight=keep_weight / 10),
                RMSProp(lr=1e-2, max_steps=100),
            )
        )
    )
