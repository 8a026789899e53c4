"""Image classification: data sets from files, altered copies of images, and the demonstration's small classifier."""

from weightpatch.tasks.images import models
from weightpatch.tasks.images._alterations import altered, noise, rotations, shifts
from weightpatch.tasks.images._augmentation import shifted_and_flipped
from weightpatch.tasks.images._cifar import cifar10
from weightpatch.tasks.images._fashion import (
    EDITED,
    download_fashion_mnist,
    fashion_classifier,
    fashion_editable,
    fashion_editor,
    fashion_mnist,
    fashion_test,
)
from weightpatch.tasks.images._folder import image_folder
from weightpatch.tasks.images._idx import idx
from weightpatch.tasks.images._labelled import LabelledImages
from weightpatch.tasks.images._load import load
from weightpatch.tasks.images._npz import npz

__all__ = [
    "EDITED",
    "LabelledImages",
    "altered",
    "cifar10",
    "download_fashion_mnist",
    "fashion_classifier",
    "fashion_editable",
    "fashion_editor",
    "fashion_mnist",
    "fashion_test",
    "idx",
    "image_folder",
    "load",
    "models",
    "noise",
    "npz",
    "rotations",
    "shifted_and_flipped",
    "shifts",
]
