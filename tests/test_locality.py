from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from weightpatch import Locality
from weightpatch.constraints import Classified, Within
from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.likelihoods import Bernoulli, Categorical, Gaussian, Of

CLASSES = Categorical()


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6))
def test_drift_is_the_true_kl_of_torch(seed: int):
    a, b = logits(seed, 4, 6), logits(seed + 1, 4, 6)
    expected = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)
    drift = Locality(torch.zeros(4, 1), likelihood=CLASSES).drift(lambda x: a, lambda x: b)
    assert torch.allclose(drift, expected, rtol=1e-10)
    assert float(drift) >= 0


def test_padding_counts_neither_in_the_sum_nor_in_the_mean():
    a, b = logits(0, 2, 3, 5), logits(1, 2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    full = CLASSES.divergence(a, b)
    drift = Locality(torch.zeros(2, 3), mask, likelihood=CLASSES).drift(lambda x: a, lambda x: b)
    assert torch.allclose(drift, (full[0, 0] + full[0, 1] + full[1, 0]) / 3)


def test_impossible_classes_add_nothing_and_keep_the_gradient_finite():
    a = torch.tensor([[0.0, 1.0, -torch.inf]])
    b = torch.tensor([[1.0, 0.0, -torch.inf]], requires_grad=True)
    drift = Locality(torch.zeros(1, 1), likelihood=CLASSES).drift(lambda x: a, lambda x: b)
    expected = F.kl_div(b[:, :2].log_softmax(-1), a[:, :2].log_softmax(-1), reduction="batchmean", log_target=True)
    assert torch.allclose(drift, expected)
    assert torch.autograd.grad(drift, b)[0].isfinite().all()


def test_no_gradient_flows_to_the_reference():
    a, b = logits(0, 2, 3).requires_grad_(), logits(1, 2, 3).requires_grad_()
    Locality(torch.zeros(2, 1), likelihood=CLASSES).drift(lambda x: a, lambda x: b).backward()
    assert a.grad is None
    assert b.grad is not None


def test_bad_arguments_are_refused():
    with pytest.raises(InvalidInput, match="empty"):
        Locality(torch.zeros(0, 2))
    with pytest.raises(ShapeMismatch, match="False everywhere"):
        Locality(torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ShapeMismatch, match="mask"):
        Locality(torch.zeros(2, 1), torch.ones(3, dtype=torch.bool), likelihood=CLASSES).drift(
            lambda x: logits(0, 2, 3), lambda x: logits(1, 2, 3)
        )
    with pytest.raises(ShapeMismatch, match="at least 2 classes"):
        Locality(torch.zeros(2, 1), likelihood=CLASSES).drift(lambda x: logits(0, 2, 1), lambda x: logits(1, 2, 1))


def inputs(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_halves_are_disjoint_cover_all_and_follow_the_items():
    x = inputs(400)
    seen, judged = Locality(x, likelihood=CLASSES).split
    assert 150 < len(judged.inputs) < 250
    assert sorted(map(tuple, torch.cat([seen.inputs, judged.inputs]).tolist())) == sorted(map(tuple, x.tolist()))
    half = {tuple(row) for row in judged.inputs.tolist()}
    other = torch.cat([inputs(100, 1), x[torch.randperm(400)[:200]]])  # other items beside, in another order
    again = {tuple(row) for row in Locality(other, likelihood=CLASSES).split[1].inputs.tolist()}
    assert all((tuple(row) in again) == (tuple(row) in half) for row in other[100:].tolist())


@given(st.integers(2, 40), st.integers(0, 1000))
def test_there_is_an_item_on_either_side(n: int, seed: int):
    seen, judged = Locality(inputs(n, seed), likelihood=CLASSES).split
    assert len(seen.inputs) >= 1
    assert len(judged.inputs) >= 1
    assert len(seen.inputs) + len(judged.inputs) == n


def test_a_single_item_or_copies_of_it_cannot_judge():
    assert Locality(inputs(1)).split[1] is None
    assert Locality(inputs(1).repeat(5, 1)).split[1] is None


def test_groups_stay_together_and_what_belongs_to_items_goes_with_them():
    x, groups = inputs(60), torch.arange(60) // 6
    keep = Locality(x, mask=x > -9, answers=x * 2, likelihood=CLASSES, groups=groups)
    seen, judged = keep.split
    assert not set(seen.groups.tolist()) & set(judged.groups.tolist())
    for half in (seen, judged):
        assert torch.equal(half.answers, half.inputs * 2)
        assert len(half.mask) == len(half.inputs)
    own = Locality(inputs(5, 9), likelihood=CLASSES)
    assert Locality(x, judge=own).split[1] is own


def test_several_outputs_add_up_and_share_a_pass():
    calls = []

    def model(x):
        calls.append(1)
        return {"a": x, "b": x[:, :1] * 10}

    x = inputs(50)
    keep = Locality(x, output="a", likelihood=CLASSES) & Locality(x, output="b", likelihood=Gaussian(1.0, 0.5))
    bound = keep.bind(model)
    assert len(calls) == 1
    seen, judged = bound.split
    assert seen.parts[0].inputs is seen.parts[1].inputs

    def after(x):
        return {"a": x, "b": x[:, :1] * 10 + (x[:, :1] > 0)}

    found = judged.effect(after)
    assert found.changed == int((judged.parts[0].inputs[:, 0] > 0).sum())
    assert (found.items, found.positions) == (len(judged.parts[0].inputs), 2 * len(judged.parts[0].inputs))
    assert float(bound.drift(model, after)) == pytest.approx(0.5 * float((x[:, 0] > 0).double().mean()), rel=1e-4)


def test_an_item_changed_where_any_of_its_positions_did():
    x = torch.zeros(3, 4, 5)
    x[..., 0] = 1
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    keep = Locality(torch.arange(3)[:, None], mask, likelihood=CLASSES).bind(lambda _: x)
    other = x.clone()
    other[0, 2, 1] = other[1, 3, 1] = other[2, 0, 1] = 9  # the second and the third do not count there
    found = keep.effect(lambda _: other)
    assert (found.items, found.changed, found.positions, found.moved) == (2, 1, 6, 1)
    assert keep.effect(lambda _: x) == keep.unchanged()


def test_nobody_guesses_what_outputs_mean():
    with pytest.raises(InvalidInput, match=r"does not know .*Categorical\(\)\) for classes"):
        Locality(inputs(3)).bind(lambda x: x)
    fix = Classified(inputs(1), torch.tensor([1]))
    assert Locality(inputs(3)).of(fix).likelihood == Categorical()
    both = fix & Within(inputs(1), torch.zeros(1, 3), 0.1)
    with pytest.raises(InvalidInput, match=r"different kinds: .* joined by &"):
        Locality(inputs(3)).of(both)
    own = Locality(inputs(3), likelihood=Bernoulli(Of.logits))
    assert own.of(both) is own
    heads = Classified(inputs(1), torch.tensor([1]), output="a") & Classified(inputs(1), torch.tensor([1]), output="b")
    with pytest.raises(InvalidInput, match="different kinds"):
        Locality(inputs(3)).of(heads)


def test_the_spread_is_that_of_all_that_is_kept():
    x = inputs(300) * torch.tensor([1.0, 5.0, 0.2])
    keep = Locality(x, likelihood=Gaussian()).fitted(lambda x: x)
    assert torch.allclose(torch.tensor(keep.likelihood.scale), x.std(0, correction=0), rtol=1e-4)
    assert all(half.likelihood == keep.likelihood for half in keep.split)
    assert keep.fitted(lambda x: x / 0) is keep


def test_what_is_asked_cannot_be_kept():
    x = inputs(10)
    keep = Locality(x, mask=torch.ones(10, dtype=torch.bool), likelihood=CLASSES)
    left = keep.without(Classified(x[3:5].clone(), torch.tensor([0, 1])))
    assert torch.equal(left.inputs, torch.cat([x[:3], x[5:]]))
    assert keep.without(Classified(inputs(1, 7), torch.tensor([0]))) is keep
    assert Locality(x[:1], likelihood=CLASSES).without(Classified(x[:2], torch.tensor([0, 1]))) is None
