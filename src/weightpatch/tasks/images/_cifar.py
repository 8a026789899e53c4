"""CIFAR-10 in its binary version: records of one label byte and 3·32·32 pixel bytes (the Python one is a pickle)."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from weightpatch.errors import InvalidInput
from weightpatch.tasks.images._labelled import LabelledImages, normalised

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
_RECORD = 1 + 3 * 32 * 32
_MOST_RECORDS = 10_000


def cifar10(
    split: Literal["train", "test"],
    folder: str | Path,
    *,
    mean: float | tuple[float, ...] = MEAN,
    std: float | tuple[float, ...] = STD,
) -> LabelledImages:
    """CIFAR-10 (n, 3, 32, 32) from `data_batch_*.bin` (train) or `test_batch.bin` (test) in `folder`.

    The images are (pixel / 255 - mean) / std, by default with the means and deviations of the training set. Raises
    InvalidInput where the files are missing or not of this format.
    """
    pattern = {"train": "data_batch_*.bin", "test": "test_batch.bin"}[split]
    paths = sorted(Path(folder).glob(pattern))
    if not paths:
        raise InvalidInput(
            f"{folder} holds no {pattern}; expected the folder of CIFAR-10's binary version (cifar-10-binary.tar.gz, "
            "unpacked)"
        )
    records = torch.cat([_records(path) for path in paths])
    pixels = records[:, 1:].reshape(-1, 3, 32, 32)
    return LabelledImages(normalised(pixels, mean, std), records[:, 0].long(), CLASSES)


def _records(path: Path) -> Tensor:
    size = path.stat().st_size
    if size == 0 or size % _RECORD or size > _MOST_RECORDS * _RECORD:
        raise InvalidInput(
            f"{path} has {size} bytes; expected 1 to {_MOST_RECORDS} records of {_RECORD} bytes: "
            "it is cut short, or not CIFAR-10's binary version"
        )
    records = torch.from_numpy(np.fromfile(path, dtype=np.uint8).reshape(-1, _RECORD))
    largest = int(records[:, 0].max())
    if largest >= len(CLASSES):
        raise InvalidInput(f"{path} has the label {largest}; expected 0 to 9: it is not CIFAR-10's binary version")
    return records
