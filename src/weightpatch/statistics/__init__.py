"""Statistics of what a network's layers see on reference data: the metric in which local edits are small."""

from .moments import LayerMoments, Moments, called, on_path, second_moments
from .outputs import categorical, gaussian

__all__ = ["LayerMoments", "Moments", "called", "categorical", "gaussian", "on_path", "second_moments"]
