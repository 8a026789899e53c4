"""Editable Training: train a network so that its mistakes can be patched in a few steps, without side effects."""

from .blocks import ResidualBlock, SparseBlock, add_block
from .curriculum import Ramp
from .episodes import Episode
from .items import Items, TrainingData
from .loop import Trained, train
from .objective import EditableObjective, Terms
from .rates import LearnedRates
from .samplers import Listed, Mistakes, Mixed, RandomLabels, RankMatched, Sampler
from .settings import TrainSettings
from .validation import Accurate, Figures, Frugal, Validation

__all__ = [
    "Accurate",
    "EditableObjective",
    "Episode",
    "Figures",
    "Frugal",
    "Items",
    "LearnedRates",
    "Listed",
    "Mistakes",
    "Mixed",
    "Ramp",
    "RandomLabels",
    "RankMatched",
    "ResidualBlock",
    "Sampler",
    "SparseBlock",
    "Terms",
    "TrainSettings",
    "Trained",
    "TrainingData",
    "Validation",
    "add_block",
    "train",
]
