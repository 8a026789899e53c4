"""Small models of every kind an editor must cope with, each with inputs and what may move."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    parameters: str

    def model(self) -> nn.Module:
        return copy.deepcopy(_built(self))


@cache
def _built(case: Case) -> nn.Module:
    seed()
    model = case.build()
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        for _ in range(3):
            model(case.inputs(16))
    return model


def seed() -> None:
    """Seed torch, and no accelerator that is not there: torch would note a stack for each kind, which takes 1 ms."""
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        same = channels == out and stride == 1
        self.downsample = (
            None if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class TinyResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens)).mean(1))


class Tied(nn.Module):
    """A language-model-like net whose output weight is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.hidden = nn.Linear(12, 12)
        self.head = nn.Linear(12, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(tokens).mean(1))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Dropout(0.5), nn.Linear(24, 5))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), weight_norm(nn.Linear(24, 5)))


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def _tokens(high: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(0, high, (n, 6), generator=torch.Generator().manual_seed(n))


CASES = (
    Case("mlp", mlp, _floats(6), "3.*"),
    Case("resnet", TinyResNet, _floats(3, 8, 8), "layer2.*"),
    Case("encoder", Encoder, _tokens(20), "layers.layers.1.*"),
    Case("tied", Tied, _tokens(7), "*"),
    Case("bf16", lambda: mlp().to(torch.bfloat16), lambda n: _floats(6)(n).to(torch.bfloat16), "3.*"),
    Case("weight-normed", normed, _floats(6), "2.*"),
)


def digest(model: nn.Module) -> str:
    """Everything about a model, and about the random generators, that an edit must not change."""
    seen = hashlib.sha256()

    def note(value: object) -> None:
        seen.update(repr(value).encode())

    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        note((name, tensor.dtype, tuple(tensor.shape), tensor.requires_grad, tensor.data_ptr(), tensor.grad is None))
        if tensor.device.type != "meta":
            seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [
            sorted(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks") and getattr(module, kind)
        ]
        note((name, id(module), module.training, hooks, "forward" in vars(module), sorted(vars(module))))
    note(
        (torch.get_rng_state().sum(), hash(random.getstate()), np.random.get_state()[1].sum(), torch.is_grad_enabled())
    )
    return seen.hexdigest()
