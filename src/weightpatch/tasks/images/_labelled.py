"""The noun of the image data module: images with their labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weightpatch.errors import InvalidInput, ShapeMismatch


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages:
    """Images as a classifier expects them, with their labels.

    `images` (n, channels, height, width) float32, already normalised: (pixel / 255 - mean) / std per channel, with the
    mean and std which the loader documents; `labels` (n,) int64, each an index into `classes`; `names` of the images
    where they came from, their rows or files, which a selection keeps: rows when not given.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.float32:
            raise ShapeMismatch(
                f"images are {_described(self.images)}; expected float32 of shape (n, channels, height, width)"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ShapeMismatch(
                f"labels are {_described(self.labels)}; expected int64 of shape ({len(self.images)},), one an image"
            )
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise InvalidInput(
                f"labels go from {int(self.labels.min())} to {int(self.labels.max())}; expected 0 to "
                f"{len(self.classes) - 1}, because there are {len(self.classes)} classes"
            )
        if not self.names:
            object.__setattr__(self, "names", tuple(range(len(self))))
        if len(self.names) != len(self):
            raise InvalidInput(f"there are {len(self.names)} names for {len(self)} images; expected one an image")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> "LabelledImages":
        chosen = torch.arange(len(self), device="cpu")[index if isinstance(index, slice) else index.cpu()].tolist()
        names = tuple(self.names[row] for row in chosen)
        return LabelledImages(self.images[index], self.labels[index], self.classes, names)

    def __repr__(self) -> str:
        return f"LabelledImages({_described(self.images)}, {len(self.classes)} classes)"


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"


def normalised(pixels: Tensor, mean: float | tuple[float, ...], std: float | tuple[float, ...]) -> Tensor:
    """Bytes (n, channels, height, width) as float32: (pixel / 255 - mean) / std, each a number or one a channel."""
    shift, scale = (
        torch.tensor(value, dtype=torch.float32, device=pixels.device).reshape(1, -1, 1, 1) for value in (mean, std)
    )
    if {shift.numel(), scale.numel()} - {1, pixels.shape[1]}:
        raise ShapeMismatch(
            f"mean {mean} and std {std} do not fit images of {pixels.shape[1]} channels; "
            "expected one number, or one a channel"
        )
    if not bool((scale > 0).all()):
        raise InvalidInput(f"std is {std}; expected positive numbers")
    images = pixels.to(torch.float32, copy=True)
    return images.div_(255).sub_(shift).div_(scale)
