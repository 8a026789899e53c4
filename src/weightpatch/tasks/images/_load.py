"""One loader for a path whose format is seen from what lies there."""

from pathlib import Path
from typing import Literal

from weightpatch.errors import InvalidInput
from weightpatch.tasks.images._cifar import cifar10
from weightpatch.tasks.images._folder import image_folder
from weightpatch.tasks.images._idx import find_idx, idx
from weightpatch.tasks.images._labelled import LabelledImages
from weightpatch.tasks.images._npz import npz


def load(
    path: str | Path,
    *,
    split: Literal["train", "test"] = "test",
    size: int | None = None,
    mean: float | tuple[float, ...] = 0.0,
    std: float | tuple[float, ...] = 1.0,
    classes: tuple[str, ...] | None = None,
) -> LabelledImages:
    """Labelled images from a .npz file, a folder of IDX files, of CIFAR-10's binary files, or of a subfolder a class.

    `split` chooses between the IDX or CIFAR-10 files of one folder, `size` scales the images of subfolders; mean, std
    and classes as in `npz`, `idx` and `image_folder` (CIFAR-10 has its own classes).
    Raises InvalidInput where nothing fits.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        return npz(path, mean=mean, std=std, classes=classes)
    if not path.is_dir():
        raise InvalidInput(f"{path} is neither a .npz file nor a folder; expected images with labels")
    found = find_idx(path, split)
    if found:
        return idx(*found, mean=mean, std=std, classes=classes)
    if any(path.glob("*_batch*.bin")):
        return cifar10(split, path, mean=mean, std=std)
    if any(child.is_dir() for child in path.iterdir()):
        return image_folder(path, size=size, mean=mean, std=std, classes=classes)
    raise InvalidInput(
        f"{path} holds no images with labels; expected IDX files ({split}), CIFAR-10's *_batch*.bin, "
        "or a subfolder for each class"
    )
