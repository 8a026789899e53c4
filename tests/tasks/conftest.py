import pytest
from tasks import imagenet
from torch import nn


@pytest.fixture(scope="session")
def pretrained_efficientnet() -> nn.Module:
    return imagenet.load_efficientnet()


@pytest.fixture
def efficientnet(pretrained_efficientnet: nn.Module) -> nn.Module:
    """The network with ImageNet weights, in evaluation mode; loaded once, so do not change it."""
    return pretrained_efficientnet


@pytest.fixture(scope="session")
def photos() -> imagenet.Photos:
    return imagenet.load_photos()
