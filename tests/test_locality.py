from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from weightpatch import Locality
from weightpatch.constraints import Classified, Within
from weightpatch.errors import InvalidInput, NonFinite, ShapeMismatch
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


def test_the_output_that_is_meant_is_the_constraints_where_none_is_said():
    fix = Classified(inputs(1), torch.tensor([1]), output="b")
    for likelihood in (None, CLASSES):
        keep = Locality(inputs(3), likelihood=likelihood, judge=Locality(inputs(2), likelihood=likelihood))
        assert (keep.of(fix).output, keep.of(fix).judge.output) == ("b", "b")
    several = Locality(inputs(3), output="a", likelihood=CLASSES) & Locality(inputs(3), likelihood=CLASSES)
    assert [part.output for part in several.of(fix).parts] == ["a", "b"]
    assert several.of(fix).of(fix).parts[0].inputs is several.inputs
    done = keep.of(fix)
    assert done.of(fix) is done


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


def test_items_that_count_are_on_either_side_and_in_what_is_taken():
    x, mask = inputs(100), torch.zeros(100, 4, dtype=torch.bool)
    mask[[70, 80, 90]] = True
    keep = Locality(x, mask, likelihood=CLASSES)
    seen, judged = keep.split
    counted = [int(half.mask.any(1).sum()) for half in (seen, judged)]
    assert min(counted) >= 1
    assert sum(counted) == 3
    assert torch.equal(keep.take(2).inputs, x[[70, 80]])
    asked = Classified(x[[70, 80, 90]], torch.tensor([0, 0, 0]))
    assert keep.without(asked) is None
    only = torch.zeros(100, dtype=torch.bool)
    only[3] = True
    assert Locality(x, only, likelihood=CLASSES).split[1] is None
    both = keep & Locality(x, only, output="b", likelihood=CLASSES)
    assert all(bool(part.mask.any()) for half in both.split for part in half.parts)
    assert both.without(asked).parts[0].output == "b"


def test_those_that_judge_are_not_asked_either():
    x = inputs(30)
    keep = Locality(x[:10], judge=Locality(x[10:], likelihood=CLASSES), likelihood=CLASSES)
    left = keep.without(Classified(x[12:13].clone(), torch.tensor([0])))
    assert torch.equal(left.judge.inputs, torch.cat([x[10:12], x[13:]]))
    assert torch.equal(left.inputs, x[:10])
    assert Locality(x[:10], judge=Locality(x[12:13])).without(Classified(x[12:13], torch.tensor([0]))).judge is None


def test_a_batch_of_one_item_takes_the_halves_of_no_other():
    single = Locality(inputs(40), likelihood=CLASSES) & Locality(inputs(1, 1), likelihood=CLASSES)
    seen, judged = single.split
    assert len(seen.parts) == 2
    assert [len(judged.parts), seen.items + judged.items] == [1, 41]


def test_joined_localities_are_judged_on_what_any_of_them_names():
    x = inputs(40)
    first, second = (Locality(x[a:b], judge=Locality(x[b : b + 5])) for a, b in ((0, 10), (15, 30)))
    assert (Locality(x[:5]) & second).judge is second.judge
    both = first & second
    assert both.judge.items == 10
    assert all(part.judge is None for part in both.parts[1:])


def test_groups_may_have_names():
    x, names = inputs(60), [f"document {row % 7}" for row in range(60)]
    one, two = (Locality(x, groups=groups, likelihood=CLASSES) for groups in (names, torch.arange(60) % 7))
    assert torch.equal(one.split[1].inputs, two.split[1].inputs)


def test_the_output_is_that_of_the_demands_also_where_a_likelihood_is_given():
    fix = Classified(inputs(1), torch.tensor([1]), output=1)
    assert Locality(inputs(3), likelihood=CLASSES).of(fix).output == 1
    assert Locality(inputs(3), likelihood=CLASSES, output=0).of(fix).output == 0


def test_infinite_drifts_count_as_changed_and_answers_without_a_drift_are_refused():
    x, z = inputs(4), logits(0, 4, 3)
    keep = Locality(x, likelihood=Categorical(of=Of.logits)).bind(lambda x: z)
    gone = z.clone()
    gone[1, z[1].argmin()] = -torch.inf  # the answer is the same, and a class impossible that was not
    assert (keep.effect(lambda x: gone).changed, keep.effect(lambda x: gone).drift) == (1, math.inf)
    keep.check_finite(lambda x: gone)
    gone[2, 0] = torch.nan
    with pytest.raises(NonFinite, match="answers 1 of 4 kept items with NaN or infinity, the first of them in rows 2"):
        keep.check_finite(lambda x: gone)


def test_many_sequences_are_measured_in_parts_and_told_as_one():
    x = torch.randn(700, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.rand(700, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[256:512] = False  # a part in which nothing counts
    keep = Locality(x, mask, likelihood=CLASSES)
    sizes = []

    def before(x):
        sizes.append(len(x))
        return x

    def after(x):
        return x + 0.3 * x.flip(1)

    told, whole = keep.between(before, after), keep.bind(before).effect(after)
    assert keep.large and max(sizes[:-1]) <= 256
    assert (told.items, told.changed, told.positions, told.moved) == (
        whole.items, whole.changed, whole.positions, whole.moved
    )  # fmt: skip
    assert told.drift == pytest.approx(whole.drift, rel=1e-12)
