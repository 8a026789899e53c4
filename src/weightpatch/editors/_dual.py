"""The dual of a least-norm problem with inequalities and balls: non-negative least squares on its Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_TOLERANCE = 1e-10
_PATIENCE = 5  # rounds in which the active set gets no better
_SINGULAR = 1e-7  # on the diagonal of a Cholesky factor
_ROUNDS = 100  # in which multipliers of balls settle
_ABSURD = 1e4  # times what the farthest demand alone takes: an answer of such a norm is none


class Dual(NamedTuple):
    """Multipliers of ``min ½ ||Δ||² s.t. J Δ ≤ -b``, and ``||J_g Δ + b_g|| ≤ ρ_g`` for balls g.

    Attributes:
        multipliers: λ, (m,), at least 0 but for those of balls; of a contradiction, scaled to ``bᵀ λ = 1``, where there
            is no answer.
        feasible: whether there is an answer: ``Δ = -C⁻¹ Jᵀ λ``.
    """

    multipliers: Tensor
    feasible: bool


class Ball(NamedTuple):
    """Rows that are met together: equations where the radius is 0.

    Attributes:
        places: which rows, (k,).
        radius: ρ.
    """

    places: Tensor
    radius: float


def least_norm(A: Tensor, b: Tensor, balls: Sequence[Ball] = ()) -> Dual:
    """Solve ``min_λ ½ λᵀ A λ - bᵀ λ + Σ_g ρ_g ||λ_g||``, the dual of `Dual`'s problem with ``A = J C⁻¹ Jᵀ``.

    λ is at least 0 in the rows of no ball, and free in the others, whose part of the problem is quadratic where the
    radius is 0. Elsewhere ``ρ ||λ_g||`` is replaced by the parabola that touches it from above, which goes down to the
    solution as the problem is convex (iterated reweighting), or by its tangent parabola (Newton) where that is better.

    Args:
        A: (m, m), symmetric, positive semidefinite, float64.
        b: (m,), float64.
        balls: of disjoint rows.
    """
    if not balls:
        return _inequalities(A, b)
    free = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    size = A.diagonal().clamp_min(0).sqrt()
    for places, _ in balls:
        free[places], size[places] = True, size[places].max()
    size = size.where(size > 0, torch.ones_like(size))  # a demand that no edit can change stays as it is
    A, b = A / (size[:, None] * size), b / size
    reach = b.abs().where(free, b.clamp_min(0)).max().clamp_min(torch.finfo(b.dtype).tiny)
    b = b / reach  # the farthest demand, alone, is met by a change of norm 1
    scaled = [Ball(places, radius / float(size[places[0]] * reach)) for places, radius in balls]
    found = _with_balls(A, b, free, scaled)
    scale = reach if found.feasible else 1 / reach
    return Dual(found.multipliers * scale / size, found.feasible)


def _with_balls(A: Tensor, b: Tensor, free: Tensor, balls: Sequence[Ball]) -> Dual:
    first = _with_equations(A, b, free)
    radii = b.new_tensor([radius for _, radius in balls])
    if not bool((radii > 0).any()):
        return first
    best, least = torch.zeros_like(b), math.inf
    lengths = _lengths(first.multipliers, balls) if first.feasible else torch.ones_like(radii)

    def value(part: Tensor) -> float:
        return float(part @ A @ part / 2 - b @ part + radii @ _lengths(part, balls))

    for _ in range(_ROUNDS):
        parabola = _with_equations(A + _curvature(b, balls, lengths), b, free)
        if not parabola.feasible:
            if _contradicts(A, b, balls, parabola.multipliers):
                return parabola
            break
        tried = [parabola.multipliers]
        if least < math.inf:
            tangent, slope = _tangent(best, balls)
            newton = _with_equations(A + tangent, b - slope, free)
            tried += [newton.multipliers] if newton.feasible else []
        best, before = min(tried, key=value), least
        least, lengths, norm = value(best), _lengths(best, balls), float(best @ A @ best)
        missed = _lengths(b - A @ best, balls) > radii * (1 + 1e-9) + 1e-12
        gap = abs(norm - float(b @ best - radii @ lengths))
        if not bool(missed.any()) and (gap <= 1e-12 * norm or before - least <= 1e-15 * abs(least)):
            return Dual(best, feasible=True)
    if _contradicts(A, b, balls, best):
        return Dual(best / (b @ best), feasible=False)
    return Dual(best, feasible=True)


def _contradicts(A: Tensor, b: Tensor, balls: Sequence[Ball], multipliers: Tensor) -> bool:
    """Say whether multipliers show that there is no answer, but perhaps an absurd one.

    ``Σ λ (b + J Δ) - Σ ρ ||λ||`` is at least ``beyond - ||Jᵀ λ|| ||Δ||`` for any Δ, and where it is above 0 some demand
    is not met.
    """
    radii = b.new_tensor([radius for _, radius in balls])
    beyond = float(b @ multipliers - radii @ _lengths(multipliers, balls))
    return beyond > 0 and math.sqrt(max(0.0, float(multipliers @ A @ multipliers))) <= beyond / _ABSURD


def _lengths(multipliers: Tensor, balls: Sequence[Ball]) -> Tensor:
    return torch.stack([multipliers[places].norm() for places, _ in balls])


def _curvature(b: Tensor, balls: Sequence[Ball], lengths: Tensor) -> Tensor:
    """Return that of the parabolas which touch ``ρ ||λ_g||`` at the lengths and lie above it: ``ρ / ||λ_g||``."""
    ridge = torch.zeros_like(b)
    for (places, radius), length in zip(balls, lengths, strict=True):
        ridge[places] = radius / length.clamp_min(1e-150)
    return ridge.diag()


def _tangent(multipliers: Tensor, balls: Sequence[Ball]) -> tuple[Tensor, Tensor]:
    """Return the second derivative of ``Σ ρ ||λ_g||`` and the first."""
    second, first = multipliers.new_zeros(2 * multipliers.shape), torch.zeros_like(multipliers)
    for places, radius in balls:
        length = multipliers[places].norm().clamp_min(1e-150)
        unit = multipliers[places] / length
        first[places] = radius * unit
        eye = torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
        second[places[:, None], places] = radius / length * (eye - torch.outer(unit, unit))
    return second, first


def _with_equations(A: Tensor, b: Tensor, free: Tensor) -> Dual:
    """Eliminate the free multipliers, ``A_ee λ_e = b_e - A_ei λ_i``, and solve for the others."""
    size = A[free][:, free].diagonal().clamp_min(torch.finfo(b.dtype).tiny).sqrt()
    values, vectors = torch.linalg.eigh(A[free][:, free] / (size[:, None] * size))
    some, vectors = values > 1e-13 * values.max(), vectors / size[:, None]
    inverse = (vectors[:, some] / values[some]) @ vectors[:, some].mT
    multipliers = torch.zeros_like(b)
    unmet = vectors[:, ~some] @ (vectors[:, ~some].mT @ b[free])
    if float(unmet @ b[free]) > _TOLERANCE:  # equations that contradict each other
        multipliers[free] = unmet / (unmet @ b[free])
        return Dual(multipliers, feasible=False)
    feasible, rest = True, ~free
    if bool(rest.any()):
        cross = A[rest][:, free] @ inverse
        reduced = A[rest][:, rest] - cross @ A[free][:, rest]
        fixed = reduced.diagonal() <= 1e-12 * A[rest][:, rest].diagonal()  # by the equations, whatever rounding leaves
        reduced = (reduced + reduced.mT).masked_fill(fixed[:, None] | fixed, 0.0) / 2
        multipliers[rest], feasible = _inequalities(reduced, b[rest] - cross @ b[free])
    wanted = b[free] if feasible else torch.zeros_like(b[free])
    multipliers[free] = inverse @ (wanted - A[free][:, rest] @ multipliers[rest])
    return Dual(multipliers, feasible)


def _inequalities(A: Tensor, b: Tensor) -> Dual:
    """Solve for λ ≥ 0 alone.

    By the least-distance transformation: with ``u`` the non-negative least squares solution for the Gram matrix
    ``A + b bᵀ`` and the right side b, ``λ = u / (1 - bᵀ u)``, and ``bᵀ u = 1`` says that there is no answer. Source:
    Lawson and Hanson, *Solving Least Squares Problems*, 1974, chapters 23.3 and 23.4; on the Gram matrix, Bro and
    de Jong 1997. Mostly there is a faster way to the same u.
    """
    if not bool((b > 0).any()):
        return Dual(torch.zeros_like(b), feasible=True)
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
    found, reached = _many_at_once(gram, right)
    return found if reached else _one_by_one(gram, right, found.clamp_min(0))


def _many_at_once(gram: Tensor, right: Tensor) -> tuple[Tensor, bool]:
    """Look for the solution of `_nnls`; return how far that went, and whether it was reached.

    All rows whose multiplier is negative leave the active set at once, and all join that are not met. Source: block
    principal pivoting (Portugal, Júdice and Vicente 1994; Kim and Park 2011), without its slow way out of cycles.
    """
    u, passive = torch.zeros_like(right), torch.zeros_like(right, dtype=torch.bool)
    best, least, patience = u, len(right) + 1, _PATIENCE
    while patience:
        wrong = torch.where(passive, u <= 0, right - gram @ u > _TOLERANCE)
        count = int(wrong.sum())
        if not count:
            return u, True
        best, least, patience = (u, count, _PATIENCE) if count < least else (best, least, patience - 1)
        passive = passive ^ wrong
        factor, failed = torch.linalg.cholesky_ex(gram[passive][:, passive])
        if int(failed) or float(factor.diagonal().amin()) <= _SINGULAR:
            break
        u = torch.zeros_like(right)
        u[passive] = torch.cholesky_solve(right[passive, None], factor)[:, 0]
    return best, False


def _one_by_one(gram: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """Solve the problem of `_nnls` from a start of at least 0: surely, a row at a time."""
    u, passive = start, start > 0
    for number in range(10 * len(right) + 10):
        before, solved = u, u
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
        u = solved if bool(passive.any()) else torch.zeros_like(u)
        if number and torch.equal(u, before):  # the row that joined left again
            break
        slope = (right - gram @ u).masked_fill(passive, -torch.inf)
        best = int(slope.argmax())
        if float(slope[best]) <= _TOLERANCE:
            break
        passive[best] = True
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
    if int(failed) == 0 and float(factor.diagonal().min()) > _SINGULAR:
        return torch.cholesky_solve(right[:, None], factor)[:, 0]
    shortest: Tensor = torch.linalg.lstsq(matrix, right[:, None], rcond=1e-13, driver="gelsd").solution[:, 0]
    return shortest
