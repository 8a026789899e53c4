"""Residual blocks in front of a network's head: room for edits that leaves today's answers as they are."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from typing import Any, ClassVar, TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._calling import Inputs
from ..errors import InvalidInput
from ..evaluation import predict
from ..locality import Locality
from .validation import answering

__all__ = ["ResidualBlock", "SparseBlock", "add_block"]

_TINY = 1e-12  # under the root of a squared norm: an item for which no unit is active has a code of 0, and a gradient


@final
class ResidualBlock(nn.Module):
    """``x + W₂ ELU(W₁ x + b₁) + b₂`` with W₂ and b₂ zero at first, so that a new block changes nothing.

    Source: the block of Sinitsin et al., Editable Neural Networks, ICLR 2020, for ImageNet: 512-4096-512.

    Args:
        width: of x, its last dimension.
        hidden: of the layer between.
    """

    edited: ClassVar[str] = "*"

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return x + self.outer(F.elu(self.inner(x)))  # type: ignore[no-any-return]


@final
class _Code(nn.Module):
    """``s / ||s||`` with ``s = relu(x)``: a module of its own, so that passes which move W₂ alone find it recorded."""

    def forward(self, x: Tensor) -> Tensor:
        s = x.relu()
        return s * (s.square().sum(-1, keepdim=True) + _TINY).rsqrt()


@final
class SparseBlock(nn.Module):
    """``x + W₂ s / ||s||`` with ``s = relu(W₁ x + b₁)``; W₂, which edits move, is zero at first: nothing changes.

    A gradient step on one item moves another in proportion to the cosine of their sparse codes s. `fit` chooses W₁ and
    b₁ so that codes of different items hardly overlap: random directions of the whitened input, in which a unit answers
    above one standard deviation. Whitening spreads items of one class, which lie close to each other in front of a
    trained head. Training changes W₁ and b₁ like any other weights.

    Args:
        width: of x, its last dimension.
        hidden: how many units the code has.
    """

    edited: ClassVar[str] = "outer.weight"

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.code, self.outer = nn.Linear(width, hidden), _Code(), nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return x + self.outer(self.code(self.inner(x)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, features: Tensor, threshold: float = 1.0, shrinkage: float = 0.01) -> None:
        """Choose W₁ and b₁ for inputs like these; the directions come from torch's global generator.

        Args:
            features: of reference items, (n, width).
            threshold: above how many standard deviations of its direction a unit answers; higher is more local, and
                less general.
            shrinkage: what is added to the covariance before it is inverted, relative to its mean eigenvalue; higher is
                more general, and less local.
        """
        x = features.flatten(0, -2).double()
        centre = x.mean(0)
        values, vectors = torch.linalg.eigh((x - centre).T @ (x - centre) / len(x))
        if not bool(values.isfinite().all()) or float(values[-1]) <= 0:
            raise InvalidInput(f"a block was fitted to {len(x)} features that do not vary, or are not finite")
        whiten = vectors * (values.clamp_min(0) + shrinkage * values.mean()).rsqrt() @ vectors.T
        spread = ((x - centre) @ whiten).square().mean().sqrt()
        directions = torch.randn(self.inner.weight.shape, dtype=torch.float64, device="cpu") / len(values) ** 0.5
        weight = directions.to(whiten.device) @ whiten / spread
        self.inner.weight.copy_(weight)
        self.inner.bias.copy_(-weight @ centre - threshold)


Block: TypeAlias = "type[ResidualBlock] | type[SparseBlock]"


def add_block(
    model: nn.Module,
    before: str,
    hidden: int = 4096,
    *,
    kind: Block = ResidualBlock,
    reference: Inputs | Locality | None = None,
) -> str:
    """Put a block before a linear layer of the model, in place; the model answers as before, bit for bit.

    The layer `before` becomes a sequence of `block` and `head`: its weight is from now on `{before}.head.weight`. To
    load such a model's weights, build the model and call this again first.

    Args:
        model: any module with that layer.
        before: the layer's name, such as "fc".
        hidden: the width of the block's inner layer.
        kind: the block.
        reference: inputs of the model, to whose features a `SparseBlock` is fitted; a few thousand are enough. Of a
            `Locality` only the positions that count are taken: of a sequence model, `kind.kept(texts, answers)`.

    Returns:
        What edits should move, as a glob for `parameters=`.

    Raises:
        InvalidInput: there is no such layer, it is not `torch.nn.Linear`, `hidden` is below 1, or the reference is for
            another kind of block.

    >>> add_block(model, "fc", hidden=1024, kind=SparseBlock, reference=images)
    'fc.block.outer.weight'
    >>> objective = wp.EditableObjective(model, wp.editors.GradientDescent(lr=0.5), parameters="fc.block.outer.weight")
    """
    head = _linear(model, before)
    if hidden < 1:
        raise InvalidInput(f"add_block was given hidden={hidden}; expected at least 1")
    block = kind(head.in_features, hidden).to(head.weight.device, head.weight.dtype).train(head.training)
    if reference is not None:
        if not isinstance(block, SparseBlock):
            raise InvalidInput(f"add_block was given a reference for a {kind.__name__}; only a SparseBlock is fitted")
        block.fit(_features(model, head, reference))
    where, _, name = before.rpartition(".")
    setattr(model.get_submodule(where), name, nn.Sequential(OrderedDict(block=block, head=head)))
    return f"{before}.block.{kind.edited}"


def _linear(model: nn.Module, before: str) -> nn.Linear:
    found = dict(model.named_modules()).get(before)
    if isinstance(found, nn.Linear) and found is not model:
        return found
    if found is not None and found is not model:
        raise InvalidInput(f"add_block was given before={before!r}, a {type(found).__name__}; expected torch.nn.Linear")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
    near = difflib.get_close_matches(before, linear, 3, 0.3) or linear[-3:]
    raise InvalidInput(f"add_block was given before={before!r}; the model's linear layers are {', '.join(near)}")


def _features(model: nn.Module, head: nn.Linear, reference: Inputs | Locality) -> Tensor:
    """Return what the head is given for these inputs, by the model in evaluation mode, (n, width)."""
    seen: list[Tensor] = []
    inputs, mask = (reference.inputs, reference.mask) if isinstance(reference, Locality) else (reference, None)

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().flatten(0, -2))

    handle = head.register_forward_pre_hook(note)
    try:
        with answering(model) as function:
            predict(function, inputs)
    finally:
        handle.remove()
    if not seen:
        raise InvalidInput("the model does not call the layer before which the block is to be put")
    found = torch.cat(seen)
    if mask is None:
        return found
    if mask.numel() != len(found):
        raise InvalidInput(
            f"add_block was given a mask of {tuple(mask.shape)}, and the layer has {len(found)} inputs; expected "
            "as many"
        )
    return found[mask.flatten()]
