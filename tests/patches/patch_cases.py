"""Models, weights and patches that the tests of this folder share."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import hypothesis.strategies as st
import torch
from torch import Tensor, nn

from weightpatch.patches import Patch, applied, base_fingerprint

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDTH = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


class Net(nn.Module):
    """A little of everything: a matrix, a tied matrix, a vector, a scalar, 3 dimensions, buffers of both sorts."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.table.weight
        self.gain = nn.Parameter(torch.zeros(()))
        self.cube = nn.Parameter(torch.zeros(3, 4, 2))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.norm = nn.BatchNorm1d(3)
        with torch.no_grad():
            for tensor in (*self.parameters(), self.mean):
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
        self.to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(WIDTH[a.dtype]), b.view(WIDTH[b.dtype]))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({name: tensor.detach() for name, tensor in model.state_dict().items()})  # tied stay tied


def unchanged(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    now = model.state_dict()
    return (
        now.keys() == before.keys()
        and all(torch.equal(now[n], before[n]) for n in before)
        and all(same_bits(now[n], before[n]) for n in before if before[n].is_floating_point())
    )


def change(tensor: Tensor, seed: int, kind: str) -> Tensor:
    """The tensor with other values: a few numbers, a row, an outer product, or everything."""
    draw = torch.Generator().manual_seed(seed)
    new = tensor.detach().clone()
    noise = torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
    if kind == "all" or tensor.ndim == 0:
        return new + noise
    if kind == "row":
        row = int(torch.randint(len(new), (), generator=draw))
        new[row] += noise[row]
    elif kind == "outer":
        flat = new.reshape(len(new), -1)
        left, right = torch.randn(len(flat), 1, generator=draw), torch.randn(1, flat.shape[1], generator=draw)
        new = (flat.double() + (left * right).double()).to(tensor.dtype).reshape(tensor.shape)
    else:
        where = torch.randint(new.numel(), (2,), generator=draw)
        new.view(-1)[where] += noise.reshape(-1)[where]
    return new


KINDS = ("few", "row", "outer", "all")
NAMES = ("table.weight", "head.bias", "gain", "cube", "mean")


def patch_for(model: nn.Module, seed: int, kinds: Mapping[str, str], *, exact: bool = False) -> Patch:
    """A patch of the model as it is now, after those applied to it."""
    own = dict(model.state_dict())
    new = {name: change(own[name], seed + number, kind) for number, (name, kind) in enumerate(kinds.items())}
    return Patch.between(
        own,
        new,
        fingerprint=base_fingerprint(model),
        requires=tuple(patch.id for patch in applied(model)),
        editor="Test()",
        metrics={"seed": seed},
        exact=exact,
    )


changes = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(KINDS), min_size=1, max_size=4)
dtypes = st.sampled_from(DTYPES)


def floats(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any finite bit patterns: huge, subnormal, both zeros."""
    limits = torch.iinfo(WIDTH[dtype])
    draw = torch.Generator().manual_seed(seed)
    raw = torch.randint(limits.min, limits.max, shape, generator=draw, dtype=WIDTH[dtype]).view(dtype)
    return torch.where(raw.isfinite(), raw, torch.full_like(raw, -0.0))
