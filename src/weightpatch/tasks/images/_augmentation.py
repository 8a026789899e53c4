"""Random changes of training images."""

import torch
from torch import Generator, Tensor


def shifted_and_flipped(
    images: Tensor, generator: Generator, most: int = 2, fill: float | Tensor | tuple[float, ...] = 0.0
) -> Tensor:
    """Images (n, c, h, w), each moved by up to `most` pixels and half of them mirrored, in any dtype.

    What comes in is `fill`, in units of `images`: one number, or one a channel. All randomness comes from `generator`.
    """
    n, channels, height, width = images.shape
    value = torch.as_tensor(fill, dtype=images.dtype, device=images.device).reshape(1, -1, 1, 1)
    padded = value.expand(n, channels, height + 2 * most, width + 2 * most).clone()
    padded[:, :, most : most + height, most : most + width] = images
    down, right = torch.randint(0, 2 * most + 1, (2, n, 1), generator=generator, device="cpu")
    rows, columns = down + torch.arange(height, device="cpu"), right + torch.arange(width, device="cpu")
    flip = torch.rand(n, 1, generator=generator, device="cpu") < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    items = torch.arange(n, device="cpu")[:, None, None]
    return padded[items, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
