"""Editors: how parameters move until a constraint holds. One method a file; wrappers instead of subclasses."""

from ._closed_form import NormalisedGradient
from .adam import Adam
from .auto import Auto, Budget, Rung
from .base import Attempt, Certificate, Editor, IterativeEditor, Solution, iterate
from .bounded import Bounded
from .gate import Gate
from .gauss_newton import GaussNewton
from .gradient_descent import GradientDescent
from .key_value import KeyValue
from .ladder import ladder
from .low_rank import LowRank
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
    "Attempt",
    "Auto",
    "Bounded",
    "Budget",
    "Certificate",
    "Editor",
    "Gate",
    "GaussNewton",
    "GradientDescent",
    "IterativeEditor",
    "KeyValue",
    "LayerMetric",
    "LowRank",
    "Metric",
    "MinimumNorm",
    "Momentum",
    "NormalisedGradient",
    "Preconditioned",
    "RMSProp",
    "RProp",
    "Retry",
    "Rung",
    "ScaledGradientDescent",
    "Shrink",
    "Solution",
    "iterate",
    "ladder",
]
