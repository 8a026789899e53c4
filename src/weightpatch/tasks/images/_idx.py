"""IDX, the file format of MNIST and its descendants: a big-endian header, then the bytes."""

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
import torch
from torch import Tensor

from weightpatch.errors import InvalidInput
from weightpatch.tasks.images._labelled import LabelledImages, normalised

_UNSIGNED_BYTE = 0x08
_MOST_BYTES = 1 << 31


def idx(
    images: str | Path,
    labels: str | Path,
    *,
    mean: float | tuple[float, ...] = 0.0,
    std: float | tuple[float, ...] = 1.0,
    classes: tuple[str, ...] | None = None,
) -> LabelledImages:
    """The images of an IDX file (n, height, width) and the labels of another (n,), raw or gzipped.

    The images are (pixel / 255 - mean) / std; without `classes` they are called "0", "1", ... up to the largest label.
    Raises InvalidInput for a file that is not IDX, is cut short, or holds more than its header says.
    """
    pixels = read_idx(images, dimensions=3)
    named = read_idx(labels, dimensions=1).to(torch.int64)
    if len(pixels) != len(named):
        raise InvalidInput(
            f"{images} holds {len(pixels)} images and {labels} holds {len(named)} labels; "
            "expected as many of each: take both files from the same split"
        )
    count = int(named.max()) + 1 if len(named) else 0
    return LabelledImages(
        normalised(pixels.unsqueeze(1), mean, std), named, classes or tuple(str(label) for label in range(count))
    )


def find_idx(folder: Path, split: Literal["train", "test"]) -> tuple[Path, Path] | None:
    """The image and label files of a split under MNIST's names, gzipped or raw; None unless both are there."""
    prefix = {"train": "train", "test": "t10k"}[split]
    for ending in (".gz", ""):
        images = folder / f"{prefix}-images-idx3-ubyte{ending}"
        labels = folder / f"{prefix}-labels-idx1-ubyte{ending}"
        if images.is_file() and labels.is_file():
            return images, labels
    return None


def read_idx(path: str | Path, dimensions: int) -> Tensor:
    """The bytes of an IDX file as uint8 of that many dimensions; reads no more than the header announces."""
    path = Path(path)
    try:
        with _opened(path) as file:
            shape = _header(file, path, dimensions)
            size = math.prod(shape)
            body = file.read(size + 1)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InvalidInput(f"{path} is damaged ({error}); fetch the file again") from error
    if len(body) != size:
        found = "more" if len(body) > size else f"only {len(body)}"
        raise InvalidInput(f"{path} announces {size} bytes {shape} and holds {found}; fetch the file again")
    return torch.from_numpy(np.frombuffer(body, dtype=np.uint8).reshape(shape).copy())


def _opened(path: Path) -> IO[bytes]:
    file = path.open("rb")
    gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not gzipped:
        return file
    file.close()
    return cast(IO[bytes], gzip.open(path, "rb"))


def _header(file: IO[bytes], path: Path, dimensions: int) -> tuple[int, ...]:
    magic = file.read(4)
    expected = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if magic != expected:
        raise InvalidInput(
            f"{path} begins with {magic.hex() or 'nothing'}; expected {expected.hex()}, "
            f"an IDX file of unsigned bytes in {dimensions} dimensions"
        )
    raw = file.read(4 * dimensions)
    if len(raw) != 4 * dimensions:
        raise InvalidInput(f"{path} ends inside its header; fetch the file again")
    shape = tuple(int(size) for size in np.frombuffer(raw, dtype=">u4"))
    if math.prod(shape) > _MOST_BYTES:
        raise InvalidInput(
            f"{path} announces {shape}, more than {_MOST_BYTES} bytes; it is damaged or not meant for this"
        )
    return shape
