"""Labelled images in a NumPy archive."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from weightpatch.errors import InvalidInput
from weightpatch.tasks.images._labelled import LabelledImages, normalised

_MOST_BYTES = 1 << 32
_CHANNELS = (1, 3)


def npz(
    path: str | Path,
    *,
    mean: float | tuple[float, ...] = 0.0,
    std: float | tuple[float, ...] = 1.0,
    classes: tuple[str, ...] | None = None,
) -> LabelledImages:
    """Images and labels from the arrays `images` and `labels`, or `x` and `y`, of a .npz file; nothing is unpickled.

    `images`: uint8, or floats in [0, 1], of shape (n, h, w), (n, h, w, c) or (n, c, h, w) with 1 or 3 channels (the
    last axis counts as channels only if the second cannot be); returned as (value - mean) / std with values in [0, 1].
    `labels`: integers (n,). Without `classes` they are called "0", "1", ... up to the largest label. Raises
    InvalidInput for anything else.
    """
    images, labels = _arrays(Path(path))
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InvalidInput(f"{path}: labels are {labels.dtype}{labels.shape}; expected integers of shape (n,)")
    pixels = _channels_first(_bytes(images, path), path)
    if len(pixels) != len(labels):
        raise InvalidInput(f"{path}: {len(pixels)} images and {len(labels)} labels; expected as many of each")
    count = int(labels.max()) + 1 if len(labels) else 0
    named = torch.from_numpy(labels.astype(np.int64))
    return LabelledImages(normalised(pixels, mean, std), named, classes or tuple(str(label) for label in range(count)))


def _arrays(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise InvalidInput(f"{path} unpacks to {size} bytes; expected at most {_MOST_BYTES}: split it")
        with np.load(path, allow_pickle=False) as archive:
            for images, labels in (("images", "labels"), ("x", "y")):
                if images in archive and labels in archive:
                    return archive[images], archive[labels]
            names = sorted(archive.files)
    except (zipfile.BadZipFile, EOFError, MemoryError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path} cannot be read as a .npz file of plain arrays ({error})") from error
    raise InvalidInput(f"{path} holds the arrays {names}; expected images and labels, or x and y")


def _bytes(images: NDArray[np.generic], path: str | Path) -> Tensor:
    """The values on the scale 0 to 255, whatever their type."""
    if images.dtype == np.uint8:
        return torch.from_numpy(images)
    if images.dtype.kind != "f":
        raise InvalidInput(f"{path}: images are {images.dtype}; expected uint8, or floats in [0, 1]")
    values = torch.from_numpy(images.astype(np.float32))
    if values.numel() and not bool(((values >= 0) & (values <= 1)).all()):
        raise InvalidInput(
            f"{path}: images go from {values.min():.4g} to {values.max():.4g}; expected floats in [0, 1], or uint8: "
            "undo the normalisation and pass it as mean and std"
        )
    return values * 255


def _channels_first(pixels: Tensor, path: str | Path) -> Tensor:
    if pixels.ndim == 3:
        return pixels.unsqueeze(1)
    if pixels.ndim == 4 and pixels.shape[1] in _CHANNELS:
        return pixels
    if pixels.ndim == 4 and pixels.shape[3] in _CHANNELS:
        return pixels.permute(0, 3, 1, 2)
    raise InvalidInput(
        f"{path}: images are of shape {tuple(pixels.shape)}; expected (n, h, w), (n, h, w, c) or (n, c, h, w) with 1 "
        "or 3 channels"
    )
