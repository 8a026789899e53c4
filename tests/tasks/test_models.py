import pytest
import torch
from torch import nn

from weightpatch.tasks.images import models


def multiply_adds(model: nn.Module, images: torch.Tensor) -> int:
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    for module in model.modules():
        module.register_forward_hook(count)
    model.eval()(images)
    return total


def test_fashion_resnet_is_as_small_as_documented() -> None:
    model = models.FashionResNet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 96_314
    assert multiply_adds(model, torch.zeros(1, 1, 28, 28)) == 3_539_840


def test_resnet18_has_the_parameters_of_the_paper() -> None:
    # the usual CIFAR ResNet-18: torchvision's 11,689,512, less the 7x7 stem and the 1000 classes
    model = models.resnet18()
    stem, head = 64 * 3 * (49 - 9), 513 * (1000 - 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512 - stem - head
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc",
    }  # fmt: skip
    assert "layer2.0.downsample.0.weight" in dict(model.named_parameters())


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (4, 8)])
def test_resnet18_takes_small_images(channels: int, side: int) -> None:
    model = models.resnet18(width=8, channels=channels, classes=7).eval()
    assert model(torch.randn(2, channels, side, side)).shape == (2, 7)


@pytest.mark.parametrize(("channels", "width", "stride"), [(8, 8, 1), (8, 16, 2)])
def test_basic_block_is_its_formula(channels: int, width: int, stride: int) -> None:
    block = models.BasicBlock(channels, width, stride)
    x = torch.randn(3, channels, 6, 6)
    kept = x.clone()
    shortcut = x if block.downsample is None else block.downsample(x)
    inner = block.bn1(block.conv1(x)).clamp(min=0)
    expected = (block.bn2(block.conv2(inner)) + shortcut).clamp(min=0)
    assert torch.equal(block(x), expected)
    assert torch.equal(x, kept), "the in-place operations must not reach the caller's tensor"


def test_every_parameter_gets_a_gradient() -> None:
    model = models.FashionResNet()
    model(torch.randn(4, 1, 28, 28)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
