"""The dual of a least-norm problem with inequalities: non-negative least squares on its Gram matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TOLERANCE = 1e-10


class Dual(NamedTuple):
    """Multipliers of ``min ½ ||Δ||² s.t. J Δ ≤ -b``.

    Attributes:
        multipliers: λ ≥ 0, (m,); of a contradiction, scaled to ``bᵀ λ = 1``, where there is no answer.
        feasible: whether there is an answer: ``Δ = -C⁻¹ Jᵀ λ``.
    """

    multipliers: Tensor
    feasible: bool


def least_norm(A: Tensor, b: Tensor) -> Dual:
    """Solve ``min_λ ½ λᵀ A λ - bᵀ λ`` over λ ≥ 0, the dual of ``min ½ ||Δ||² s.t. J Δ ≤ -b`` with ``A = J C⁻¹ Jᵀ``.

    By the least-distance transformation: with ``u`` the non-negative least squares solution for the Gram matrix
    ``A + b bᵀ`` and the right side b, ``λ = u / (1 - bᵀ u)``, and ``bᵀ u = 1`` says that there is no answer. Source:
    Lawson and Hanson, *Solving Least Squares Problems*, 1974, chapters 23.3 and 23.4; on the Gram matrix, Bro and
    de Jong 1997.

    Args:
        A: (m, m), symmetric, positive semidefinite, float64.
        b: (m,), float64.
    """
    size = A.diagonal().clamp_min(0).sqrt()
    size = size.where(size > 0, torch.ones_like(size))  # a demand that no edit can change stays as it is
    A, b = A / (size[:, None] * size), b / size
    reach = b.clamp_min(0).max().clamp_min(torch.finfo(b.dtype).tiny)
    b = b / reach  # the farthest demand, alone, is met by a change of norm 1
    u = _nnls(A + torch.outer(b, b), b)
    slack = float(1 - b @ u)
    if slack < _TOLERANCE:
        return Dual(u / size / reach, feasible=False)
    return Dual(_polished(A, b, u / slack) * reach / size, feasible=True)


def _nnls(gram: Tensor, right: Tensor) -> Tensor:
    """Minimise ``½ uᵀ G u - rᵀ u`` over u ≥ 0."""
    m = len(right)
    u, passive = torch.zeros_like(right), torch.zeros(m, dtype=torch.bool, device=right.device)
    for _ in range(10 * m + 10):
        slope = (right - gram @ u).masked_fill(passive, -torch.inf)
        best = int(slope.argmax())
        if float(slope[best]) <= _TOLERANCE:
            break
        passive[best] = True
        while bool(passive.any()):
            solved = torch.zeros_like(u)
            solved[passive] = _solve(gram[passive][:, passive], right[passive])
            below = passive & (solved <= 0)
            if not bool(below.any()):
                break
            ways = (u / (u - solved)).where(below & (u > 0), 0.0).masked_fill(~below, torch.inf)
            u = u + ways.min() * (solved - u)
            out = passive & (u <= _TOLERANCE * u.max())
            out[ways.argmin()] = True
            passive, u = passive & ~out, u.masked_fill(out, 0)
        if not bool(passive.any()) or torch.equal(solved, u):
            break
        u = solved
    return u


def _polished(A: Tensor, b: Tensor, multipliers: Tensor) -> Tensor:
    """Solve for the demands that are active again, without b bᵀ, which costs digits."""
    active = multipliers > 0
    found = torch.zeros_like(multipliers)
    if bool(active.any()):
        found[active] = _solve(A[active][:, active], b[active])
    return found if bool((found >= 0).all()) else multipliers


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a positive semidefinite system; the shortest solution where it is singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) == 0 and float(factor.diagonal().min()) > 1e-7:
        return torch.cholesky_solve(right[:, None], factor)[:, 0]
    shortest: Tensor = torch.linalg.lstsq(matrix, right[:, None], rcond=1e-13, driver="gelsd").solution[:, 0]
    return shortest
