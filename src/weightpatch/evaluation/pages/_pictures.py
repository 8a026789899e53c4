"""Model inputs as pictures in a page: 8-bit PNG files in data URIs."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..._calling import Inputs, rows
from ...errors import InvalidInput

__all__ = ["Image", "Picture", "Scaled", "default_picture", "draw", "png"]

Picture: TypeAlias = Callable[[Any], "Tensor | npt.NDArray[Any]"]

_LARGEST = 224  # pixels a side: what a page can show, and mail can carry two dozen of
_SAMPLE = 1024
_SMALL = 96  # up to this many pixels a side, a picture is enlarged pixel by pixel


@final
@dataclass(frozen=True)
class Image:
    """A picture in a page; `pixelated` where it is so small that it has to be enlarged."""

    source: str
    pixelated: bool


@final
@dataclass(frozen=True, eq=False)
class Scaled:
    """Undo a normalisation that nobody told us: each channel from its least to its largest value in the test set."""

    low: Tensor
    high: Tensor

    @staticmethod
    def like(images: Tensor) -> Scaled:
        """Read the range of each channel off the first images of a set, (n, channels, height, width)."""
        sample = images[:_SAMPLE].detach().cpu().float()
        return Scaled(sample.amin((0, 2, 3)), sample.amax((0, 2, 3)))

    def __call__(self, item: Tensor) -> Tensor:
        """Return one image (channels, height, width) as (height, width, channels) between 0 and 1."""
        span = (self.high - self.low).clamp_min(torch.finfo(torch.float32).tiny)
        scaled = (item.detach().cpu().float() - self.low[:, None, None]) / span[:, None, None]
        return scaled.clamp(0, 1).permute(1, 2, 0)


def default_picture(inputs: Inputs) -> Picture | None:
    """Return how to draw inputs that look like images, (n, 1 or 3, height, width); None for any others."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3) or min(inputs.shape) < 1:
        return None
    return (lambda item: item.permute(1, 2, 0)) if inputs.dtype == torch.uint8 else Scaled.like(inputs)


def draw(picture: Picture | None, inputs: Inputs, row: int) -> Image | None:
    """Return the picture of one input."""
    if picture is None:
        return None
    pixels = _bytes(picture(rows(inputs, torch.tensor(row, device="cpu"))))
    source = "data:image/png;base64," + base64.b64encode(png(pixels)).decode("ascii")
    return Image(source, max(pixels.shape[:2]) <= _SMALL)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode (height, width) or (height, width, 3) bytes; the same pixels give the same file everywhere zlib agrees."""
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + pixels[0].size), np.uint8)  # each line starts with its filter: 0, none
    lines[:, 1:] = pixels.reshape(height, -1)
    colour = 2 if pixels.ndim == 3 else 0
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def _bytes(drawn: Any) -> npt.NDArray[np.uint8]:
    """Turn what a picture function returned into 8-bit pixels, (height, width) or (height, width, 3)."""
    pixels = drawn.detach().cpu() if isinstance(drawn, Tensor) else torch.as_tensor(np.asarray(drawn), device="cpu")
    pixels = pixels.squeeze(2) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or not pixels.numel():
        raise InvalidInput(
            f"picture returned shape {tuple(pixels.shape)}; expected (height, width) or (height, width, 3), bytes or "
            "numbers from 0 to 1"
        )
    scaled = pixels.float() if pixels.dtype == torch.uint8 else pixels.float().nan_to_num(0.0).clamp(0, 1) * 255
    found: npt.NDArray[np.uint8] = _shrunk(scaled).round().to(torch.uint8).numpy()
    return found


def _shrunk(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[:2]
    if max(height, width) <= _LARGEST:
        return pixels
    goal = tuple(max(1, round(side * _LARGEST / max(height, width))) for side in (height, width))
    planes = pixels.reshape(height, width, -1).permute(2, 0, 1)[None]
    return F.interpolate(planes, size=goal, mode="area")[0].permute(1, 2, 0).reshape(*goal, *pixels.shape[2:])
