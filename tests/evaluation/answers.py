"""Small models of every kind of answer, with targets, and the figures of each by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from weightpatch.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Of

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """One kind of answer.

    Attributes:
        likelihood: what the outputs mean; None where that can be seen.
        inputs: of one item.
        build: makes a model.
        targets: makes targets for outputs, some of which count nowhere.
        wrong: the loss of each position by hand, of outputs and targets, NaN where nothing is asked.
        figure: of a mean loss.
        changed: which positions changed, of outputs before and after.
        divergence: of each position, of outputs before and after, in nats.
    """

    name: str
    likelihood: Likelihood | None
    inputs: tuple[int, ...]
    build: Callable[[], nn.Module]
    targets: Callable[[Tensor], Tensor]
    wrong: Callable[[Array, Array], Array]
    figure: Callable[[float], float]
    changed: Callable[[Array, Array], npt.NDArray[np.bool_]]
    divergence: Callable[[Array, Array], Array]

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().eval()

    def items(self, n: int) -> Tensor:
        return torch.randn(n, *self.inputs, generator=torch.Generator().manual_seed(n))


def positions(z: Array) -> Array:
    """Classes on the last dimension."""
    return np.moveaxis(z, 1, -1) if z.ndim == 4 else z


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def class_wrong(z: Array, y: Array) -> Array:
    return np.where(y == -100, np.nan, positions(z).argmax(-1) != y)


def class_changed(a: Array, b: Array) -> npt.NDArray[np.bool_]:
    return positions(a).argmax(-1) != positions(b).argmax(-1)


def class_kl(a: Array, b: Array) -> Array:
    p, q = softmax(positions(a)), softmax(positions(b))
    return (p * np.log(p / q)).sum(-1)


def wide(z: Array) -> Array:
    return z[:, None] if z.ndim == 1 else z


def tag_wrong(z: Array, y: Array) -> Array:
    on, y = wide(z) > 0, wide(y)
    asked = y >= 0
    found = np.full(len(z), np.nan)
    some = asked.any(-1)
    found[some] = ((on != (y == 1)) & asked).sum(-1)[some] / asked.sum(-1)[some]
    return found


def tag_kl(a: Array, b: Array) -> Array:
    p, q = (1 / (1 + np.exp(-wide(z))) for z in (a, b))
    return (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(-1)


def number_wrong(z: Array, y: Array) -> Array:
    return ((wide(z) - wide(y)) ** 2).mean(-1)


def far(a: Array, b: Array) -> npt.NDArray[np.bool_]:
    return (np.abs(wide(a - b)) > 0.1).any(-1)


def number_kl(a: Array, b: Array) -> Array:
    return (wide(a - b) ** 2 / (2 * 0.5**2)).sum(-1)


def mlp(out: int, *after: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, out), *after)


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def noisy_classes(z: Tensor) -> Tensor:
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    return (z + 0.3 * z.std() * noise).argmax(1 if z.ndim == 4 else -1)


def some_ignored(y: Tensor, value: float = -100) -> Tensor:
    y = y.clone()
    y[::5] = value
    return y


def ignored_pixels(z: Tensor) -> Tensor:
    y = noisy_classes(z)
    y[:, :2] = -100
    y[3] = -100
    return y


def noisy_tags(z: Tensor) -> Tensor:
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    y = (z + 0.3 * z.std() * noise > 0).float()
    y.view(len(y), -1)[::4, 0] = -100
    return y


def noisy_numbers(z: Tensor) -> Tensor:
    return some_ignored(z + 0.2 * torch.randn(z.shape, generator=torch.Generator().manual_seed(5)), float("nan"))


def percent(x: float) -> float:
    return 100 * x


CLASSES: tuple[Any, ...] = (class_wrong, percent, class_changed, class_kl)
TAGS: tuple[Any, ...] = (
    tag_wrong,
    percent,
    lambda a, b: ((wide(a) > 0) != (wide(b) > 0)).any(-1),
    tag_kl,
)
NUMBERS: tuple[Any, ...] = (number_wrong, np.sqrt, far, number_kl)
SCALED = Gaussian(scale=0.5, tolerance=0.1)

ANSWERS = (
    Answers("classes", None, (6,), mlp(5), lambda z: some_ignored(noisy_classes(z)), *CLASSES),
    Answers("tokens", Categorical(), (7, 6), mlp(5), lambda z: some_ignored(noisy_classes(z)), *CLASSES),
    Answers("pixels", None, (2, 6, 5), Pixels, ignored_pixels, *CLASSES),
    Answers("tags", Bernoulli(of=Of.logits), (6,), mlp(4), noisy_tags, *TAGS),
    Answers("one tag", Bernoulli(of=Of.logits), (6,), mlp(1, nn.Flatten(0)), noisy_tags, *TAGS),
    Answers("number", SCALED, (6,), mlp(1, nn.Flatten(0)), noisy_numbers, *NUMBERS),
    Answers("numbers", SCALED, (6,), mlp(3), noisy_numbers, *NUMBERS),
)
