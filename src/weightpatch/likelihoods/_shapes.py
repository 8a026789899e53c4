"""Where the numbers of a position are among outputs of any shape, and what fits them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeMismatch
from ._base import Likelihood

__all__ = ["aligned", "as_outputs", "check_alike", "check_targets", "classes_last", "dimension", "events"]

_IMAGES = 4  # dimensions of outputs from which on classes are on dimension 1, as torch's losses have them


def dimension(outputs: Tensor, dim: int | None) -> int:
    if dim is None:
        return 1 if outputs.ndim >= _IMAGES else -1
    return dim


def events(outputs: Tensor, dim: int | None) -> Tensor:
    """Return outputs with a position's numbers on the last dimension, (n, ..., k); those of shape (n,) as (n, 1)."""
    if outputs.ndim <= 1:
        return outputs.reshape(-1, 1)
    return outputs.movedim(dimension(outputs, dim), -1)


def aligned(targets: Tensor, outputs: Tensor, dim: int | None) -> Tensor:
    """Return targets of the shape of the outputs, dimensions of 1 aside, as their answers are laid out, (n, ..., k)."""
    same = [size for size in targets.shape if size != 1] == [size for size in outputs.shape if size != 1]
    return events(targets.reshape(outputs.shape), dim) if same else targets


def as_outputs(laid: Tensor, outputs: Tensor, dim: int | None) -> Tensor:
    """Return what is laid out with a position's numbers last, (n, ..., k), in the shape of the outputs."""
    return laid.reshape(outputs.shape) if outputs.ndim <= 1 else laid.movedim(-1, dimension(outputs, dim))


def classes_last(likelihood: Likelihood, outputs: Tensor, dim: int) -> Tensor:
    if outputs.ndim < 2 or not -outputs.ndim <= dim < outputs.ndim or outputs.shape[dim] < 2:
        raise ShapeMismatch(
            f"{likelihood!r} was asked about outputs of shape {tuple(outputs.shape)}; expected at least 2 classes on "
            f"dimension {dim}. For numbers write likelihood=Gaussian(), for one output that says yes or no Bernoulli()"
        )
    return outputs.movedim(dim, -1)


def check_alike(likelihood: Likelihood, before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape:
        raise ShapeMismatch(
            f"{likelihood!r} was asked to compare outputs of shapes {tuple(before.shape)} and {tuple(after.shape)}; "
            "expected two equal shapes"
        )


def check_targets(likelihood: Likelihood, targets: Tensor, shape: torch.Size, *, whole: bool) -> None:
    if targets.shape != shape or (whole and (targets.is_floating_point() or targets.dtype == torch.bool)):
        raise ShapeMismatch(
            f"{likelihood!r} was given targets {str(targets.dtype)[6:]}{tuple(targets.shape)}; expected "
            f"{'integers ' if whole else ''}{tuple(shape)}, those of the answers"
        )
