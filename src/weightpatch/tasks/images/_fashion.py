"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), and the classifier and test images that come with weightpatch."""

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from safetensors.torch import load
from torch import nn

from weightpatch.editors import GradientDescent
from weightpatch.errors import InvalidInput
from weightpatch.tasks.images._idx import find_idx, idx
from weightpatch.tasks.images._labelled import LabelledImages
from weightpatch.tasks.images.models import FashionResNet
from weightpatch.training import SparseBlock, add_block

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MEAN, STD = 0.2860, 0.3530
EDITED, LEARNED_RATE = "fc.block.outer.weight", 1.4760
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_SHIPPED = files("weightpatch.tasks.images") / "shipped"


@dataclass(frozen=True)
class _Official:
    name: str
    size: int
    sha256: str


_FILES = (
    _Official(
        "train-images-idx3-ubyte.gz", 26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    _Official("train-labels-idx1-ubyte.gz", 29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    _Official(
        "t10k-images-idx3-ubyte.gz", 4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    _Official("t10k-labels-idx1-ubyte.gz", 5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
)
_ORIGINS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)


def fashion_mnist(split: Literal["train", "test"], folder: str | Path | None = None) -> LabelledImages:
    """Fashion-MNIST: 60,000 (train) or 10,000 (test) grey images (n, 1, 28, 28), (pixel / 255 - 0.2860) / 0.3530.

    Looks in `folder` if given, else where the Debian package dataset-fashion-mnist puts it, else (test only) at the
    copy that comes with weightpatch. Raises InvalidInput, which says how to get the files, where they are missing.
    """
    found = find_idx(DEBIAN_FOLDER if folder is None else Path(folder), split)
    if found:
        return idx(*found, mean=MEAN, std=STD, classes=CLASSES)
    if folder is None and split == "test":
        return fashion_test()
    raise InvalidInput(
        f"no {split} images of Fashion-MNIST in {folder or DEBIAN_FOLDER}; install the Debian package "
        "dataset-fashion-mnist, or call weightpatch.tasks.images.download_fashion_mnist(folder) and pass that folder"
    )


def fashion_test() -> LabelledImages:
    """The 10,000 test images of Fashion-MNIST that come with weightpatch, normalised as in `fashion_mnist`."""
    with as_file(_SHIPPED) as folder:
        found = find_idx(folder, "test")
        assert found is not None, "the package is incomplete"
        return idx(*found, mean=MEAN, std=STD, classes=CLASSES)


def fashion_classifier() -> FashionResNet:
    """The trained classifier that comes with weightpatch, in evaluation mode; see `fashion_mnist` for its inputs."""
    model = FashionResNet()
    model.load_state_dict(load((_SHIPPED / "fashion-resnet.safetensors").read_bytes()))
    return model.eval()


def fashion_editable() -> nn.Module:
    """The same classifier after Editable Training (examples/fashion-editable.toml), in evaluation mode.

    Edits move `EDITED`, one matrix of a `SparseBlock`, by `fashion_editor`.
    """
    model = FashionResNet()
    add_block(model, "fc", hidden=1024, kind=SparseBlock)
    model.load_state_dict(load((_SHIPPED / "fashion-editable.safetensors").read_bytes()))
    return model.eval()


def fashion_editor() -> GradientDescent:
    """The editor through which `fashion_editable` was trained, with the rate that it learned."""
    return GradientDescent(lr=LEARNED_RATE)


def download_fashion_mnist(folder: str | Path, origins: Sequence[str] = _ORIGINS) -> Path:
    """Put the four official files (31 MB) into `folder` and return it; a file that is there already is not fetched.

    Each comes from the first of `origins` that has it, is checked by SHA-256, and appears in the folder only whole.
    Raises InvalidInput where no origin has the right file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for official in _FILES:
        target = folder / official.name
        if not (target.is_file() and _right(target.read_bytes(), official)):
            _put(target, _fetched(official, origins))
    return folder


def _right(content: bytes, official: _Official) -> bool:
    return len(content) == official.size and hashlib.sha256(content).hexdigest() == official.sha256


def _fetched(official: _Official, origins: Sequence[str]) -> bytes:
    failures = []
    for origin in origins:
        try:
            with urllib.request.urlopen(origin + official.name, timeout=60) as answer:
                content: bytes = answer.read(official.size + 1)
        except OSError as error:
            failures.append(f"{origin}: {error}")
            continue
        if _right(content, official):
            return content
        failures.append(f"{origin}: not the official file (wrong size or SHA-256)")
    raise InvalidInput(
        f"could not fetch {official.name} ({'; '.join(failures)}); check the network, or fetch it by hand "
        f"and pass its folder (SHA-256 {official.sha256})"
    )


def _put(target: Path, content: bytes) -> None:
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
