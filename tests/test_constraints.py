from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightpatch.constraints import All, Classified, Constraint, Kept, Within, check_consistent
from weightpatch.errors import ConflictingConstraints, InvalidInput, NonFinite, ShapeMismatch

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def constant(*rows: list[float]):
    return lambda inputs: torch.tensor(rows)


def test_classified_is_the_log_probability_gap_of_the_paper():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 3, 4])
    logp = logits.log_softmax(1)
    others = logp.scatter(1, labels[:, None], -torch.inf).amax(1)
    expected = others - logp[range(3), labels] + 0.25
    assert torch.allclose(Classified(X, labels, 0.25).violation(lambda x: logits), expected, atol=1e-12)


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=6), st.data())
def test_classified_without_margin_is_met_exactly_when_the_label_is_the_strict_winner(
    values: list[float], data: st.DataObject
):
    label = data.draw(st.integers(0, len(values) - 1))
    fix = Classified(torch.zeros(1, 1), torch.tensor([label]))
    strict = all(values[label] > v for i, v in enumerate(values) if i != label)
    assert fix.satisfied(constant(values)) == strict


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tie_is_not_met_and_still_has_a_gradient(dtype: torch.dtype):
    logits = torch.tensor([[1.0, 1.0, 0.0]], dtype=dtype, requires_grad=True)
    violation = Classified(torch.zeros(1, 1), torch.tensor([0])).violation(lambda x: logits)
    assert violation.item() > 0
    assert torch.equal(torch.autograd.grad(violation.sum(), logits)[0].abs().sum(), torch.tensor(2.0, dtype=dtype))


def test_nan_is_not_met():
    assert not Classified(torch.zeros(1, 1), torch.tensor([0])).satisfied(constant([float("nan"), 1.0]))


def test_within_is_the_squared_distance_beyond_the_tolerance():
    targets = torch.zeros(3, 2)
    violation = Within(X, targets, 0.5).violation(lambda x: x[:, :2])
    assert torch.allclose(violation, X[:, :2].square().sum(1) - 0.5)
    assert torch.allclose(Within(X, torch.zeros(3), 0.5).violation(lambda x: x[:, 0]), X[:, 0].square() - 0.5)


def test_kept_asks_for_the_answers_at_binding():
    kept = Kept(X).bind(lambda x: x)
    assert isinstance(kept, Classified)
    assert torch.equal(kept.labels, X.argmax(1))
    assert kept.satisfied(lambda x: x)
    assert not kept.satisfied(lambda x: -x)
    with pytest.raises(InvalidInput, match="bind"):
        Kept(X).violation(lambda x: x)


def test_constraints_join_and_flatten():
    class Positive(Constraint):
        def violation(self, function) -> Tensor:
            return -function(X).sum(1)

    joined = Classified(X, X.argmax(1)) & Kept(X) & Positive()
    assert isinstance(joined, All)
    assert joined.kind == "Classified & Kept & Positive"
    assert joined.bind(lambda x: x).violation(lambda x: x).shape == (9,)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Classified(X[:0], torch.zeros(0, dtype=torch.int64)), InvalidInput, "empty"),
        (lambda: Classified(X, torch.zeros(2, dtype=torch.int64)), ShapeMismatch, r"expected \(3,\)"),
        (lambda: Classified(X, torch.zeros(3)), InvalidInput, "integers"),
        (lambda: Classified(X, torch.zeros(3, dtype=torch.bool)), InvalidInput, "integers"),
        (lambda: Classified(X, [0, 1, 2]), InvalidInput, "list"),
        (lambda: Classified(X / 0, torch.zeros(3, dtype=torch.int64)), NonFinite, "NaN or infinite"),
        (lambda: Classified(X, torch.zeros(3, dtype=torch.int64), margin=-1), InvalidInput, "at least 0"),
        (lambda: Classified(X, torch.zeros(3, dtype=torch.int64), margin=float("nan")), InvalidInput, "finite"),
        (lambda: Within(X, torch.full((3, 2), torch.nan), 1.0), NonFinite, "targets"),
        (lambda: Within(X, torch.zeros(2, 2), 1.0), ShapeMismatch, "one target per input"),
        (lambda: Within(X, torch.zeros(3, 2), -1.0), InvalidInput, "tolerance"),
        (lambda: Kept(X[:0]), InvalidInput, "empty"),
        (lambda: All(()), InvalidInput, "no constraint"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_given(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_names_the_range(label: int):
    with pytest.raises(InvalidInput, match="expected 0 to 3"):
        Classified(X, torch.tensor([0, label, 1])).violation(lambda x: x)


def test_one_input_asked_to_be_two_classes_is_a_conflict():
    same = Classified(X, torch.tensor([0, 1, 2]))
    check_consistent(same & Classified(X[1:2], torch.tensor([1])))
    with pytest.raises(ConflictingConstraints, match="demands 1 and 3 .* class 1 and class 3"):
        check_consistent(same & Classified(X[1:2].clone(), torch.tensor([3])))


def test_one_number_as_input_may_have_any_stride():
    column = torch.arange(10.0).reshape(2, 5)[:1, 3:4].T  # a row of one number whose stride is 5
    assert column[0].stride() == (5,)
    with pytest.raises(ConflictingConstraints, match="demands 0 and 1"):
        check_consistent(All((Classified(column, torch.tensor([0])), Classified(column, torch.tensor([1])))))
