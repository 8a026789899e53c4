"""Altered copies of images: does an edit hold for what looks almost the same? (The measure called generality.)

Every function puts whole sets one after another: copy k of image i is row k·n + i, so `labels.repeat(m)` goes with m
copies, and `out.unflatten(0, (m, n))` separates them.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from weightpatch.errors import InvalidInput, ShapeMismatch


def shifts(images: Tensor) -> Tensor:
    """Four copies (4·n, c, h, w) of images (n, c, h, w): moved by one pixel up, down, left, right; edges repeat."""
    _check(images)
    up = torch.cat([images[..., 1:, :], images[..., -1:, :]], dim=-2)
    down = torch.cat([images[..., :1, :], images[..., :-1, :]], dim=-2)
    left = torch.cat([images[..., 1:], images[..., -1:]], dim=-1)
    right = torch.cat([images[..., :1], images[..., :-1]], dim=-1)
    return torch.cat([up, down, left, right])


def noise(images: Tensor, std: float, seed: int) -> Tensor:
    """Copies (n, c, h, w) with independent Gaussian noise of standard deviation `std`, in units of `images`.

    The noise depends on `seed` and the shape alone: it is drawn on the CPU, never from the global generator.
    """
    _check(images)
    if not 0 <= std < math.inf:
        raise InvalidInput(f"std is {std}; expected a finite number of at least 0")
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    return images + std * drawn.to(images)


def rotations(images: Tensor, degrees: Sequence[float]) -> Tensor:
    """Copies (len(degrees)·n, c, h, w), turned counter-clockwise about the centre, bilinear; edges repeat."""
    _check(images)
    if not degrees or not all(math.isfinite(angle) for angle in degrees):
        raise InvalidInput(f"degrees is {degrees!r}; expected at least one finite angle")
    return torch.cat([_rotated(images, math.radians(angle)) for angle in degrees])


def altered(images: Tensor) -> Tensor:
    """The usual seven copies (7·n, c, h, w): `shifts`, `rotations` by −5 and +5 degrees, `noise` of 0.1 with seed 0."""
    return torch.cat([shifts(images), rotations(images, (-5.0, 5.0)), noise(images, std=0.1, seed=0)])


def _rotated(images: Tensor, angle: float) -> Tensor:
    if not len(images):
        return images.clone()
    height, width = images.shape[-2:]
    cos, sin = math.cos(angle), math.sin(angle)
    # affine_grid counts in half widths and half heights, and asks where each output pixel comes from
    rows = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    theta = torch.tensor(rows, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _check(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point() or 0 in images.shape[1:]:
        raise ShapeMismatch(
            f"images are {images.dtype} of shape {tuple(images.shape)}; "
            "expected floating point of shape (n, channels, height, width)"
        )
