"""Small residual networks with batch normalisation, with torchvision's attribute names and nothing of torchvision."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: `relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))` (He et al. 2016).

    The additions and activations work in place, as in torchvision: a hard case for whoever records activations.
    """

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(_conv(channels, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, channels, h, w) to (n, width, h / stride, w / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


def _layer(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class FashionResNet(nn.Module):
    """The demo classifier: 28×28 grey images to 10 logits, 3.5 million multiply-adds, 96,314 parameters.

    Stem (3×3, 16 channels, then a 2×2 maximum), `layer1` (16 channels, 14×14), `layer2` (32 channels, 7×7), `layer3`
    (64 channels, 4×4), mean over the image, `fc`. Its forward pass is cheap on purpose: judging an edit means running
    the edited network on a whole test set.
    """

    def __init__(self, classes: int = 10, blocks: Sequence[int] = (1, 2, 1)) -> None:
        super().__init__()
        self.conv1 = _conv(1, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = _layer(16, 16, blocks[0], stride=1)
        self.layer2 = _layer(16, 32, blocks[1], stride=2)
        self.layer3 = _layer(32, 64, blocks[2], stride=2)
        self.fc = nn.Linear(64, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (n, 1, 28, 28) to logits (n, classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class ResNet18(nn.Module):
    """ResNet-18 with the stem for small images: a 3×3 convolution, no maximum; built by `resnet18`."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _layer(width, width, 2, stride=1)
        self.layer2 = _layer(width, 2 * width, 2, stride=2)
        self.layer3 = _layer(2 * width, 4 * width, 2, stride=2)
        self.layer4 = _layer(4 * width, 8 * width, 2, stride=2)
        self.fc = nn.Linear(8 * width, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, channels, h, w), h and w at least 8, to logits (n, classes)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def resnet18(width: int = 64, channels: int = 3, classes: int = 10) -> ResNet18:
    """An untrained ResNet-18 for small images: four layers of two blocks, `width` to 8·`width` channels."""
    return ResNet18(width, channels, classes)
