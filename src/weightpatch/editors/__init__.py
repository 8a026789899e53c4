"""Editors: how parameters move until a constraint holds. One method a file; wrappers instead of subclasses."""

from .adam import Adam
from .base import Editor, IterativeEditor, Solution, iterate
from .gradient_descent import GradientDescent
from .ladder import ladder
from .momentum import Momentum
from .retry import Retry
from .rmsprop import RMSProp
from .rprop import RProp
from .scaled_gradient_descent import ScaledGradientDescent
from .shrink import Shrink

__all__ = [
    "Adam",
    "Editor",
    "GradientDescent",
    "IterativeEditor",
    "Momentum",
    "RMSProp",
    "RProp",
    "Retry",
    "ScaledGradientDescent",
    "Shrink",
    "Solution",
    "iterate",
    "ladder",
]
