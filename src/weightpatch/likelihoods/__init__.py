"""What a network's outputs mean: the distribution of an answer that they parametrise.

Constraints, localities, statistics, comparisons and reports ask a likelihood what an answer is, when it changed and how
far two predictions are apart. To add one, subclass `Likelihood` and write `divergence` and `answer`.
"""

from __future__ import annotations

from ._base import IGNORED, Likelihood, Of
from ._bernoulli import Bernoulli
from ._categorical import Categorical
from ._gaussian import Gaussian
from ._plain import plain, unplain
from ._shapes import aligned, as_outputs

__all__ = [  # noqa: RUF022 - as `sorted` does it
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "IGNORED",
    "Likelihood",
    "Of",
    "aligned",
    "as_outputs",
    "plain",
    "unplain",
]
