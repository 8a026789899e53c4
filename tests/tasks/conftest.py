import imagenet
import pytest
from torch import nn


@pytest.fixture(scope="session")
def efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, in evaluation mode; loaded once for all tests, so do not change it."""
    return imagenet.load_efficientnet()


@pytest.fixture(scope="session")
def photos() -> imagenet.Photos:
    return imagenet.load_photos()
