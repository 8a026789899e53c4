"""Convolutions of recorded values, edited: by what they made before, and the few factors of the difference."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from .._calling import Params
from .steps import Convolution, Step, channels_last, convolve

__all__ = ["Corrected", "Shortcut", "factors"]

_GAIN = 0.8  # the share of the full convolution's time that the correction may take
_RANK = 64  # looked for at most
_EXTRA = 8  # random directions beyond the rank
_POSITIONS = 64  # of all outputs, for each rank looked for: the search stays cheap beside the convolution
_ROUNDING = 8 * 2.0**-24  # as many roundings of the weights in float32: what an editor's own steps leave
_TINY = 1e-30  # nothing beside a variance of 1, where some releases of torch refuse 0
_CANCELLED = 1e-5  # of a sum of squares, that float32 loses


@final
@dataclass(eq=False)
class Corrected(Step):
    """An edited convolution, by its product P with the unedited weights: ``y = s ⊙ (P + U (V * x)) + shift``.

    Attributes:
        conv: the same step in full.
    """

    conv: Convolution = field(default=None)  # type: ignore[assignment]

    def run(self, weights: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Correct the product, which is left as it is; U is given as ``s ⊙ U``, and s is in float32."""
        scale, shift, left, right = weights
        product, x = args[:2]
        y = F.batch_norm(product, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, eps=_TINY)
        if self.conv.adds:
            y.add_(args[2])
        if len(right):
            few = convolve(x, right, None, self.conv.conv)
            return convolve(few, left, None, relu=self.conv.relu, other=y)
        return y.relu_() if self.conv.relu else y


@final
class Shortcut:
    """How one convolution of recorded values takes the edits that it need not run in full for.

    Args:
        full: the convolution, of one group.
        x: what it reads of all n test items, in the dtype that it runs in.
        chunk: how many items run at once.

    Attributes:
        step: what runs in its place.
        nbytes: of the products of all items with the unedited weights.
    """

    def __init__(self, full: Convolution, x: Tensor, chunk: int) -> None:
        self.step = Corrected(full.node, (full.product, *full.args), {}, True, full)
        self._full, self._x, self._chunk = full, x, chunk
        self._own, self._affine = full.kernel({}).clone(), full.affine({})
        self._kernel = channels_last(self._own.to(x.dtype))
        one = self.product(slice(0, 1))
        self.nbytes, self._positions = len(x) * one.nbytes, len(x) * one[0, 0].numel()

    def product(self, index: slice) -> Tensor:
        """Return some items' product with the unedited weights, shape (n, out, ...)."""
        return channels_last(convolve(self._x[index], self._kernel, None, self._full.conv))

    def weights(self, params: Params) -> tuple[Tensor, ...] | None:
        """Return what `step` takes; None where nothing is edited, and where the convolution in full is faster."""
        kernel, affine = self._full.kernel(params), self._full.affine(params)
        if _equal((kernel, *affine), (self._own, *self._affine)) or self.most < 0:
            return None
        if not all(v is None or v.isfinite().all() for v in affine):
            return None
        found = factors(self._own.flatten(1), kernel.flatten(1), self.most)
        return None if found is None else self._folded(affine, *found)

    @cached_property
    def most(self) -> int:
        """The largest rank, to a quarter of the outputs, with which `step` is measured to be faster; -1 for none."""
        x, product = self._x[: self._chunk], self.product(slice(0, self._chunk))
        reads, full = (x, product)[: len(self._full.args)], self._full.weights({}, x.dtype)
        allowed = _GAIN * _seconds(partial(self._full.run, full, *reads))
        old = self._own.flatten(1)
        cap = min(_RANK, len(old) // 4, self._positions // _POSITIONS)
        for rank in sorted({cap, cap // 2, cap // 4, min(cap, 1), 0}, reverse=True):
            weights = self._folded(self._affine, old[:, :1].expand(-1, rank), old[:1].expand(rank, -1))
            if _seconds(partial(self.step.run, weights, product, *reads)) <= allowed:
                return rank
        return -1

    def _folded(self, affine: tuple[Tensor | None, Tensor | None], left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """Fold the scale into the left factor and lay all out as `step` takes them."""
        scale = left.new_ones(len(left)) if affine[0] is None else affine[0]
        shift = left.new_zeros(len(left)) if affine[1] is None else affine[1]
        wide = ((scale[:, None] * left)[:, :, None, None], right.reshape(-1, *self._kernel.shape[1:]))
        return scale, shift, *(channels_last(t.to(self._x.dtype)) for t in wide)


def _equal(ours: tuple[Tensor | None, ...], theirs: tuple[Tensor | None, ...]) -> bool:
    return all(a is None or b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def factors(old: Tensor, new: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Return left (o, r) and right (r, i) with ``left @ right = new - old`` to rounding, r least; None for r > `most`.

    No filter is off by more than `_ROUNDING` of what it is now. A randomised range finder (Halko, Martinsson & Tropp
    2011) finds few factors, and soon that there are many.
    """
    delta, allowed = new - old, _ROUNDING * _sizes(new)
    if not allowed.isfinite().all():
        return None
    if (_sizes(delta) <= allowed).all():
        return delta[:, :0], delta[:0]
    if most < 1:
        return None
    basis = torch.linalg.qr(delta @ _directions(delta, most + _EXTRA)).Q * delta.any(1, keepdim=True)  # 0, not nearly 0
    right = basis.T @ delta
    total, found = (_sizes(t).square().sum() for t in (delta, right))
    if not total - found <= allowed.square().sum() + _CANCELLED * total:
        return None
    squares, turns = (t.flip(-1) for t in torch.linalg.eigh(right.double() @ right.double().T))
    rests = ((basis.double() @ turns).square() * squares).flip(1).cumsum(1).flip(1)[:, 1:]
    ranks = (rests <= 0.25 * allowed[:, None].square()).all(0).nonzero()[:most]
    if not len(ranks) or ranks[0] >= most:
        return None
    rows = torch.linalg.qr(right.T @ turns[:, : int(ranks[0]) + 1].to(right.dtype)).Q.T
    left = delta @ rows.T
    return (left, rows) if bool((_sizes(delta - left @ rows) <= allowed).all()) else None


def _sizes(matrix: Tensor) -> Tensor:
    """Return the norms of the rows, in float64, which large weights do not overflow."""
    return matrix.to(torch.float64).square().sum(1).sqrt()


def _directions(delta: Tensor, count: int) -> Tensor:
    own = torch.Generator(device="cpu").manual_seed(0)  # the caller's random numbers stay as they are
    count = min(count, *delta.shape)
    return torch.randn(delta.shape[1], count, device="cpu", generator=own).to(delta)


def _seconds(run: Callable[[], object]) -> float:
    """Time the fastest of a few runs: the CPU time of this thread, which other work on the machine spares."""
    times = []
    for _ in range(4):
        started = time.thread_time()
        run()
        times.append(time.thread_time() - started)
    return min(times[1:])
