"""Editable Training: train a network so that its mistakes can be patched in a few steps, without side effects."""

from .episodes import Episode
from .objective import EditableObjective, Terms
from .rates import LearnedRates

__all__ = ["EditableObjective", "Episode", "LearnedRates", "Terms"]
