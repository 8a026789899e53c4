from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from weightpatch import Locality
from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.locality import divergence


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6))
def test_drift_is_the_true_kl_of_torch(seed: int):
    a, b = logits(seed, 4, 6), logits(seed + 1, 4, 6)
    expected = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)
    drift = Locality(torch.zeros(4, 1)).drift(lambda x: a, lambda x: b)
    assert torch.allclose(drift, expected, rtol=1e-10)
    assert float(drift) >= 0


def test_padding_counts_neither_in_the_sum_nor_in_the_mean():
    a, b = logits(0, 2, 3, 5), logits(1, 2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    full = divergence(a, b)
    drift = Locality(torch.zeros(2, 3), mask).drift(lambda x: a, lambda x: b)
    assert torch.allclose(drift, (full[0, 0] + full[0, 1] + full[1, 0]) / 3)


def test_impossible_classes_add_nothing_and_keep_the_gradient_finite():
    a = torch.tensor([[0.0, 1.0, -torch.inf]])
    b = torch.tensor([[1.0, 0.0, -torch.inf]], requires_grad=True)
    drift = Locality(torch.zeros(1, 1)).drift(lambda x: a, lambda x: b)
    expected = F.kl_div(b[:, :2].log_softmax(-1), a[:, :2].log_softmax(-1), reduction="batchmean", log_target=True)
    assert torch.allclose(drift, expected)
    assert torch.autograd.grad(drift, b)[0].isfinite().all()


def test_no_gradient_flows_to_the_reference():
    a, b = logits(0, 2, 3).requires_grad_(), logits(1, 2, 3).requires_grad_()
    Locality(torch.zeros(2, 1)).drift(lambda x: a, lambda x: b).backward()
    assert a.grad is None
    assert b.grad is not None


def test_bad_arguments_are_refused():
    with pytest.raises(InvalidInput, match="empty"):
        Locality(torch.zeros(0, 2))
    with pytest.raises(ShapeMismatch, match="False everywhere"):
        Locality(torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ShapeMismatch, match="mask"):
        Locality(torch.zeros(2, 1), torch.ones(3, dtype=torch.bool)).drift(
            lambda x: logits(0, 2, 3), lambda x: logits(1, 2, 3)
        )
    with pytest.raises(ShapeMismatch, match="at least 2 classes"):
        Locality(torch.zeros(2, 1)).drift(lambda x: logits(0, 2, 1), lambda x: logits(1, 2, 1))
