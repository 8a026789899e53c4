"""Statistics of what a network's layers see on reference data: the metric in which local edits are small."""

from .layers import LayerMoments
from .measuring import called, on_path, second_moments
from .moments import Moments

__all__ = ["LayerMoments", "Moments", "called", "on_path", "second_moments"]
