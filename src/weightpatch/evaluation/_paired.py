"""Statistics of two models that answer the same n questions; they live in `weightpatch.bounds`."""

from ..bounds import mcnemar, paired_difference

__all__ = ["mcnemar", "paired_difference"]
