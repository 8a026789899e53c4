"""Labelled images in a folder with one subfolder a class."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from weightpatch.errors import InvalidInput, MissingExtra
from weightpatch.tasks.images._labelled import LabelledImages, normalised

if TYPE_CHECKING:
    from PIL.Image import Image

_ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def image_folder(
    path: str | Path,
    *,
    size: int | None = None,
    mean: float | tuple[float, ...] = 0.0,
    std: float | tuple[float, ...] = 1.0,
    classes: tuple[str, ...] | None = None,
) -> LabelledImages:
    """The image files in the subfolders of `path`; each subfolder's name is the class of what lies in it.

    Grey if every file is grey, else RGB; (pixel / 255 - mean) / std. With `size`, the shorter side is scaled to it
    (bicubic) and the middle square cut out; without, all files must have one size. `classes` fixes the labels' order
    (a class may have no subfolder, a subfolder must have its class); by default the subfolders' names, sorted. Files
    come in order of class and name, and are the images' names. Raises InvalidInput, or MissingExtra without Pillow.
    """
    files, names = _labelled_files(Path(path), classes)
    opened = [_opened(file, size) for file, _ in files]
    mode = "L" if all(image.mode == "L" for image in opened) else "RGB"
    pixels = [_pixels(image, mode) for image in opened]
    for (file, _), tensor in zip(files, pixels, strict=True):
        if tensor.shape != pixels[0].shape:
            raise InvalidInput(
                f"{file} is {tuple(tensor.shape[1:])} and {files[0][0]} is {tuple(pixels[0].shape[1:])} "
                "(height, width); pass size to bring all images to one size"
            )
    labels = torch.tensor([label for _, label in files], device="cpu")
    called = tuple(file.relative_to(path).as_posix() for file, _ in files)
    return LabelledImages(normalised(torch.stack(pixels), mean, std), labels, names, called)


def _labelled_files(path: Path, classes: tuple[str, ...] | None) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    if not path.is_dir():
        raise InvalidInput(f"{path} is not a folder; expected one with a subfolder of images for each class")
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    names = classes or tuple(folder.name for folder in folders)
    strangers = [folder.name for folder in folders if folder.name not in names]
    if strangers:
        raise InvalidInput(f"{path} has the subfolders {strangers}, which are no classes; expected some of {names}")
    files = [
        (file, names.index(folder.name))
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in _ENDINGS and not file.name.startswith(".")
    ]
    if not files:
        raise InvalidInput(f"{path} has no images in its subfolders; expected files such as {path}/CLASS/1.png")
    return sorted(files, key=lambda file: (file[1], file[0])), names


def _opened(path: Path, size: int | None) -> "Image":
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtra(
            'reading image files needs Pillow, which is not installed: pip install "weightpatch[images]"'
        ) from error
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file)
            upright.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InvalidInput(f"{path} cannot be read as an image ({error}); repair or remove it") from error
    image = upright.convert("L" if upright.mode in ("L", "1", "LA") else "RGB")
    if size is None:
        return image
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def _pixels(image: "Image", mode: str) -> Tensor:
    array = np.array(image.convert(mode), dtype=np.uint8)
    return torch.from_numpy(array.reshape(image.height, image.width, -1)).permute(2, 0, 1)
