"""Editors: how parameters move until a constraint holds. One method a file; wrappers instead of subclasses."""

from .adam import Adam
from .base import Certificate, Editor, IterativeEditor, Solution, iterate
from .gradient_descent import GradientDescent
from .ladder import ladder
from .metric import LayerMetric, Metric
from .minimum_norm import MinimumNorm
from .momentum import Momentum
from .preconditioned import Preconditioned
from .retry import Retry
from .rmsprop import RMSProp
from .rprop import RProp
from .scaled_gradient_descent import ScaledGradientDescent
from .shrink import Shrink

__all__ = [
    "Adam",
    "Certificate",
    "Editor",
    "GradientDescent",
    "IterativeEditor",
    "LayerMetric",
    "Metric",
    "MinimumNorm",
    "Momentum",
    "Preconditioned",
    "RMSProp",
    "RProp",
    "Retry",
    "ScaledGradientDescent",
    "Shrink",
    "Solution",
    "iterate",
    "ladder",
]
