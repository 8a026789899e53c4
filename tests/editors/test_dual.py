from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from weightpatch.editors import _dual

TOLERANCE = 1e-7


def drawn(seed: int, m: int, rank: int, twice: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(m, rank, dtype=torch.float64, generator=generator)
    if twice:
        J = torch.cat([J, J[: m // 2]])  # demands that are asked twice
    J = J / J.norm(dim=1, keepdim=True)
    return J @ J.T, torch.randn(len(J), dtype=torch.float64, generator=generator)


def value(gram: torch.Tensor, right: torch.Tensor, u: torch.Tensor) -> float:
    return float(u @ gram @ u / 2 - right @ u)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_many_rows_at_once_come_to_what_one_by_one_does(seed, m, rank, twice):
    gram, right = drawn(seed, m, rank, twice)
    gram = gram + torch.outer(right, right)  # as least norms ask: there is always a solution
    found = _dual._nnls(gram, right)
    slow = _dual._one_by_one(gram, right, torch.zeros_like(right))
    assert bool((found >= 0).all())
    scale = max(1.0, abs(value(gram, right, slow)))
    assert abs(value(gram, right, found) - value(gram, right, slow)) <= TOLERANCE * scale
    slope = right - gram @ found
    assert float(slope.max()) <= TOLERANCE and float((slope * found).abs().max()) <= TOLERANCE * (
        1 + float(found.max())
    )


@given(st.integers(0, 10**6), st.integers(1, 20))
def test_one_by_one_may_start_anywhere(seed, m):
    gram, right = drawn(seed, m, m + 5, False)
    start = torch.rand(m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    found = _dual._one_by_one(gram, right, start)
    assert torch.allclose(found, _dual._one_by_one(gram, right, torch.zeros_like(right)), atol=1e-6)


def test_rows_are_solved_in_a_few_rounds_where_there_are_hundreds(monkeypatch):
    gram, right = drawn(3, 300, 600, False)
    calls = []
    solve = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(len(matrix)) or solve(matrix))
    found, reached = _dual._many_at_once(gram, right)
    assert reached and len(calls) < 20 and int((found > 0).sum()) > 100


def test_where_the_active_set_cannot_be_solved_for_rows_join_one_by_one():
    right = torch.ones(4, dtype=torch.float64)
    gram = torch.ones(4, 4, dtype=torch.float64)
    assert _dual._many_at_once(gram, right)[1] is False
    found = _dual._nnls(gram, right)
    assert torch.allclose(gram @ found, right) and bool((found >= 0).all())
