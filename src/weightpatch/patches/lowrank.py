"""Factors of a difference of weights, where it has few; cheap where it has many."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .rounding import step

_RANK = 64  # looked for at most
_SMALL = 256  # up to this side a full SVD is cheap
_EXTRA = 8  # random directions beyond the rank
_TRIES = 3  # ranks tried, from the least possible one
_OWN_ERROR = 1e-14  # of a sum of squares in float64


def factors(base: Tensor, new: Tensor, *, below: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Candidates (left (o, r), right (r, i)) with left @ right ≈ new - base and fewer than `below` bytes, r rising.

    Those of float32 weights are given in float32 first and then in float64: where products cancel, weights are left
    that are smaller than the rounding of their float32 factors. The tensors are read as matrices (o, i). Nothing is
    yielded where no such rank can pass `within`. Large matrices go through a randomised range finder (Halko,
    Martinsson & Tropp 2011, algorithm 4.4, one power).
    """
    old, wanted = (t.reshape(len(t), -1) for t in (base, new))
    kinds = [torch.float64] if base.dtype == torch.float64 else [torch.float32]
    most = min(_RANK, *old.shape, (below - 1) // (sum(old.shape) * kinds[0].itemsize))
    if most < 1 or _hopeless(old, wanted, most):
        return
    delta = wanted.to(torch.float64) - old.to(torch.float64)
    left, sizes, right = _leading(delta, most)
    total = delta.square().sum()
    rests = total - sizes.square().cumsum(0)
    possible = (rests <= _allowed(old, wanted, _scale(wanted)) + _OWN_ERROR * total).nonzero()[:, 0]
    kinds += [torch.float64] if base.dtype == torch.float32 else []
    for kind in kinds:
        for rank in (possible[:_TRIES] + 1).tolist():
            root = sizes[:rank].sqrt()
            if rank * sum(old.shape) * kind.itemsize < below:
                yield (left[:, :rank] * root).to(kind), (root[:, None] * right[:rank]).to(kind)


def within(found: Tensor, base: Tensor, new: Tensor) -> bool:
    """Whether `found` is as good as `new`: nowhere more than a few rounding steps away, 1 for half types, otherwise 8.

    A step is counted at the largest of |old|, |new| and the tensor's root mean square: the error of a sum is one of its
    terms', and a factorisation's is that of the weights around. An editor of ten float32 steps rounds ten times itself,
    and so ends up to 5 such steps from any low rank.
    """
    difference = (found.to(torch.float64) - new.to(torch.float64)).abs()
    return bool((difference <= _tolerance(base, new, _scale(new))).all())


def _tolerance(old: Tensor, new: Tensor, scale: Tensor) -> Tensor:
    steps = 1 if new.element_size() == 2 else 8
    return steps * step(torch.maximum(torch.maximum(old.abs(), new.abs()), scale))


def _scale(new: Tensor) -> Tensor:
    return new.to(torch.float64).square().mean().sqrt().to(new.dtype)


def _allowed(old: Tensor, new: Tensor, scale: Tensor) -> Tensor:
    """The sum of squares of all that may be missed: the tolerance, and the half step that composing rounds away."""
    return (1.5 * _tolerance(old, new, scale)).square().sum()


def _hopeless(old: Tensor, new: Tensor, most: int) -> bool:
    """Whether some rows and columns alone already need a larger rank; a bound, not a guess (Eckart & Young)."""
    side = 2 * _RANK
    rows, columns = (slice(0, size // side * side or size, max(1, size // side)) for size in old.shape)
    part, wanted = old[rows, columns], new[rows, columns]
    sizes = torch.linalg.svdvals(wanted.to(torch.float64) - part.to(torch.float64))
    rest = sizes[most:].square().sum()
    return bool(rest > _allowed(part, wanted, _scale(new)) + _OWN_ERROR * sizes.square().sum())


def _leading(delta: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets, at most `most`, without those that are exactly zero."""
    if min(delta.shape) <= _SMALL:
        left, sizes, right = torch.linalg.svd(delta, full_matrices=False)
    else:
        own = torch.Generator(device="cpu").manual_seed(0)  # the caller's random numbers stay as they are
        count = min(most + _EXTRA, *delta.shape)
        start = torch.randn(delta.shape[1], count, dtype=torch.float64, device="cpu", generator=own)
        basis = torch.linalg.qr(delta @ start).Q
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
        left, sizes, right = torch.linalg.svd(basis.T @ delta, full_matrices=False)
        left = basis @ left
    count = min(most, int((sizes > 0).sum()))
    return left[:, :count], sizes[:count], right[:count]
