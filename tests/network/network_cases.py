"""Models with everything that makes a replay hard, and the slow oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


@dataclass(frozen=True)
class Net:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    parameters: str
    recorded: tuple[str, ...] | None = None  # names of the recorded calls, in order


def floats(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


class Repeated(nn.Module):
    """One module used twice, before and after the edited one."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.edited, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.act(self.edited(self.act(self.shared(x)) + x)))


class ArgmaxRoute(nn.Module):
    """Its second expert's input hangs on the edited router through an argmax alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.codes = nn.Linear(6, 6), nn.Linear(6, 4), nn.Embedding(4, 6)
        self.expert, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        chosen = self.router(h)
        code = self.expert(self.codes(chosen.argmax(-1)))
        return self.head(h + code) + chosen[:, :3]


class Detached(nn.Module):
    """Depends on the edited layer through detach, no_grad and an in-place write of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        z = self.b(h)
        with torch.no_grad():
            t = self.c(z)
        buffer = torch.zeros_like(x)
        buffer[:, :3] = z.detach()[:, :3]
        return self.d(buffer) + t + z


class Branching(nn.Module):
    """Which branch runs is decided by a value that depends on the edit; both branches hold independent calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.edited, self.left, self.right = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        z = self.edited(h)
        if z.sum() > 0:
            return z + self.left(h)
        return z + self.right(h)


class Glue(nn.Module):
    """In-place work between modules, views, dict and tuple values, a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 4)
        self.pair, self.relu = Pair(), nn.ReLU(inplace=True)

    def forward(self, batch: dict[str, Tensor], *, scale: float = 1.0) -> dict[str, Any]:
        h = self.a(batch["x"]) * scale
        h += batch["y"]
        parts = self.pair(h, keep=[h])
        left = self.relu(parts["left"])
        left -= 0.5
        z = self.b(parts["both"][0].flip(-1))
        z.mul_(2.0)
        return {"logits": self.c(torch.cat([left, z], -1)), "hidden": (left,)}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, h: Tensor, keep: list[Tensor]) -> dict[str, Any]:
        return {"left": self.lin(h), "both": (keep[0] * 2, 3)}


class IgnoredReturn(nn.Module):
    """Calls in-place modules for their effect, and reads the argument afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu, self.clamp = (
            nn.Linear(6, 6),
            nn.Linear(6, 3),
            nn.ReLU(inplace=True),
            nn.Hardtanh(-9, 9, True),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.relu(h)
        self.clamp(h)
        return self.b(h)


class ChangesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return self.b(torch.tanh(self.a(x)))


class SideChannel(nn.Module):
    """Hands features over through an attribute instead of a return value."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Remembering(), nn.Linear(6, 3)
        self.extra = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.body(x))
        return out + self.extra(self.body.features)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.features = nn.Linear(6, 6), torch.zeros(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        self.features = torch.tanh(self.lin(x))
        return self.features * 2


class LazyCache(nn.Module):
    """Builds a table on the first call, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head, self.table = nn.Linear(6, 6), nn.Linear(6, 3), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < len(x):
            self.table = torch.arange(len(x), dtype=x.dtype)[:, None]
        return self.head(self.lin(x) + self.table[: len(x)])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(6, 5), nn.LSTM(5, 4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, (hidden, _) = self.rnn(self.embed(x))
        return self.head(out[:, -1] + hidden[0])


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class CustomFunction(nn.Module):
    """Autograd functions are not seen by the modes that find what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Straight.apply(4 * self.a(x)))


class MaxNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6, max_norm=0.5), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1))


def normed() -> nn.Module:
    return nn.Sequential(
        spectral_norm(nn.Linear(6, 6)),
        nn.ReLU(inplace=True),
        torch.nn.utils.weight_norm(nn.Linear(6, 6)),
        weight_norm(nn.Linear(6, 3)),
    )


def x6(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (floats(n, 6),), {}


def images(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (floats(n, 3, 8, 8),), {}


def sequences(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (floats(n, 5, 8), floats(n, 4, 8, seed=1)), {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(4)}


def transformer() -> nn.Module:
    return nn.Transformer(8, 2, 2, 3, 16, dropout=0.1, batch_first=True)


def tokens(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.arange(n * 4).reshape(n, 4) % 20,), {}


def glued(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ({"x": floats(n, 6), "y": floats(n, 6, seed=1)},), {"scale": 2.0}


NETS = (
    Net("resnet-late", zoo.TinyResNet, images, "layer2.*", ("conv1", "bn1", "relu", "layer1")),
    Net("resnet-inner", zoo.TinyResNet, images, "layer2.1.conv2.weight", None),
    Net("resnet-head", zoo.TinyResNet, images, "fc.*", ("conv1", "bn1", "relu", "layer1", "layer2")),
    Net("resnet-stem", zoo.TinyResNet, images, "conv1.*", ()),
    Net(
        "transformer-decoder", transformer, sequences, "decoder.layers.1.*", ("encoder", "decoder.layers.0"),
    ),
    Net(
        "transformer-encoder", transformer, sequences, "encoder.layers.1.*",
        ("encoder.layers.0", "decoder.layers.0.self_attn", "decoder.layers.0.dropout1", "decoder.layers.0.norm1"),
    ),
    Net("repeated", Repeated, x6, "edited.*", ("shared", "act")),
    Net("argmax", ArgmaxRoute, x6, "router.*", ("stem",)),
    Net("detached", Detached, x6, "b.*", ("a",)),
    Net("branching", Branching, x6, "edited.*", ("stem",)),
    Net("glue", Glue, glued, "b.*", ("a", "pair", "relu")),
    Net("ignored-return", IgnoredReturn, x6, "b.*", ("a",)),
    Net("changes-input", ChangesInput, x6, "b.*", ("a",)),
    Net("side-channel", SideChannel, x6, "head.*", ("body.lin", "extra")),
    Net("lazy-cache", LazyCache, x6, "head.*", ("lin",)),
    Net("lstm", Recurrent, lambda n: ((floats(n, 5, 6),), {}), "rnn.weight_hh_l1", ("embed",)),
    Net("after-lstm", Recurrent, lambda n: ((floats(n, 5, 6),), {}), "head.*", ("embed", "rnn")),
    Net("custom-function", CustomFunction, x6, "b.*", ("a",)),
    Net("max-norm", MaxNorm, tokens, "head.*", ()),
    Net("norms", normed, x6, "3.*", ("0", "1", "2")),
    Net("old-weight-norm", normed, x6, "2.*", ("0", "1", "3.parametrizations.weight")),
    Net("tied", zoo.Tied, tokens_of_tied := lambda n: ((torch.arange(n * 4).reshape(n, 4) % 7,), {}), "embed.*", ()),
    Net("tied-middle", zoo.Tied, tokens_of_tied, "hidden.*", ("embed",)),
)  # fmt: skip


def made(net: Net) -> nn.Module:
    torch.manual_seed(0)
    model = net.build()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        for _ in range(3):
            model(floats(8, 3, 8, 8))
    return model


def oracle(model: nn.Module, params: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A full pass of a deep copy, without a fused attention kernel, on copies of the inputs."""
    args, kwargs = copy.deepcopy((args, kwargs))
    loose = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    fresh = copy.deepcopy(model, {id(tensor): tensor.detach() for tensor in loose}).eval().requires_grad_(False)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return functional_call(fresh, params, args, kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def moved(start: dict[str, Tensor], seed: int, size: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value + size * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name, value in start.items()
    }


def loss(output: Any) -> Tensor:
    return sum(
        (leaf.float().sin() * (i + 1)).sum() for i, leaf in enumerate(tensors(output)) if leaf.is_floating_point()
    )


def gradients(output: Any, params: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(output), list(params.values()), allow_unused=True))
