"""Slices of a test set by columns of the user's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightpatch.errors import InvalidInput, ShapeMismatch
from weightpatch.evaluation import counted, slices
from weightpatch.verdict import Paired

VALUES = st.lists(st.one_of(st.integers(0, 3), st.sampled_from(["a", "b", ("c", 1), None, True])), min_size=1)


@given(VALUES)
def test_the_slices_of_a_column_are_its_parts(values):
    found = slices({"camera": values}, len(values))
    assert sum(mask.long() for mask in found.values()).eq(1).all()
    for mask in found.values():
        assert mask.dtype == torch.bool and mask.shape == (len(values),) and mask.any()
        rows = mask.nonzero().squeeze(1).tolist()
        assert all(values[row] == values[rows[0]] for row in rows)
    assert len(found) == len(set(values))


def test_tensors_and_lists_of_several_columns():
    found = slices({"month": torch.tensor([1, 2, 1]), "site": ["x", "x", "y"]}, 3)
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "month = 1": [True, False, True],
        "month = 2": [False, True, False],
        "site = x": [True, True, False],
        "site = y": [False, False, True],
    }


def test_what_looks_alike_stays_apart_and_nan_is_one_value():
    assert list(slices({"c": [1, "1", "1"]}, 3)) == ["c = 1", "c = 1'"]
    assert list(slices({"c": torch.tensor([float("nan"), 1.0, float("nan")])}, 3)) == ["c = nan", "c = 1.0"]
    assert len(slices({"c": range(20)}, 20)) == 20


@pytest.mark.parametrize(
    ("column", "told"),
    [(["a"], r"'site' has shape \(1,\)"), (torch.zeros(4, 2), r"\(4, 2\)"), (torch.tensor(1.0), r"has shape \(\)")],
)
def test_columns_of_other_lengths_are_refused(column, told):
    with pytest.raises(ShapeMismatch, match=told):
        slices({"site": column}, 4)


def test_columns_that_say_nothing_are_refused():
    with pytest.raises(InvalidInput, match=r"100 different values for 100 items.*bins"):
        slices({"weight": torch.rand(100, generator=torch.Generator().manual_seed(0))}, 100)
    with pytest.raises(InvalidInput, match=r"\['b'\] at item 1.*cannot be hashed"):
        slices({"tags": ["a", ["b"]]}, 2)


def test_answers_are_counted_as_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    before = torch.tensor([0, 1, 1, 0, 0, 2])
    after = torch.tensor([1, 0, 1, 2, 0, 2])
    assert counted("all items", before, after, labels) == Paired("all items", 6, 1, 1, wrong=3, other=1)
    assert counted("class 0", before, after, labels, labels == 0) == Paired("class 0", 2, 1, 1, wrong=1)
