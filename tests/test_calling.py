"""Batches of any nesting are taken apart item by item, or refused; one output of many is read."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightpatch._calling import leaves, length, outputs, rows, selected, unwatched
from weightpatch.errors import InvalidInput


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


LEAF = st.sampled_from(
    [
        torch.arange(12.0).reshape(4, 3),
        torch.arange(4),
        np.arange(8.0).reshape(4, 2),
        torch.ones(1, 3),
        torch.tensor(2.0),
        None,
        True,
        3,
        "text",
    ]
)
TREES = st.recursive(
    LEAF,
    lambda inner: (
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
        | st.lists(inner, min_size=1, max_size=2).map(tuple)
        | st.tuples(inner, inner).map(list)
    ),
    max_leaves=6,
)


def parts(tree) -> list:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in parts(value)]
    return [leaf for value in tree for leaf in parts(value)] if isinstance(tree, (tuple, list)) else [tree]


@given(TREES, st.integers(0, 3))
def test_every_leaf_with_a_row_for_each_item_is_taken_apart(tree, item: int):
    batch = (torch.zeros(4, 1), tree)
    for index in (slice(item, item + 1), torch.tensor([item])):
        for whole, some in zip(parts(batch), parts(rows(batch, index)), strict=True):
            if isinstance(whole, (Tensor, np.ndarray)) and whole.ndim and len(whole) == 4:
                assert np.array_equal(np.asarray(some), np.asarray(whole)[item : item + 1])
            else:
                assert some is whole
    assert length(batch) == 4


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_list_of_as_many_tensors_as_there_are_items_is_no_list_of_items(n: int):
    batch = [torch.arange(n) + 10 * place for place in range(n)]
    assert [leaf.tolist() for leaf in rows(batch, slice(0, 1))] == [[10 * place] for place in range(n)]


def test_named_tuples_and_mappings_of_any_kind_are_taken_apart():
    batch = {"pair": Pair(torch.arange(4), torch.arange(8).reshape(4, 2)), "more": UserDict(z=torch.arange(4))}
    some = rows(batch, slice(1, 3))
    assert isinstance(some["pair"], Pair)
    assert some["pair"].y.tolist() == [[2, 3], [4, 5]]
    assert some["more"]["z"].tolist() == [1, 2]
    assert len(list(leaves(batch))) == 3


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (torch.zeros(3, 2), r"holds \(3, 2\) float32; expected 4 rows"),
        (np.zeros((5, 1)), r"holds \(5, 1\) float64; expected 4 rows"),
        (object(), "object, which cannot be taken apart"),
        (["a", "b", "c", "d"], "a list of 4 values of str; expected a tensor"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused_wherever_it_lies(odd, says: str):
    for batch in ((torch.zeros(4, 1), odd), {"x": torch.zeros(4, 1), "more": {"deep": (odd,)}}):
        with pytest.raises(InvalidInput, match=says):
            rows(batch, slice(0, 1))


@dataclass
class Answer:
    logits: Tensor
    value: Tensor
    hidden_states: tuple[Tensor, ...] = ()


def test_one_output_of_many_is_read():
    one, two = torch.zeros(2, 3), torch.ones(2, 1)
    for answer, key in (((one, two), 1), ({"a": one, "b": two}, "b"), (Answer(one, two), "value")):
        assert selected(answer, key) is two
        assert selected(answer, lambda given, key=key: selected(given, key) * 2).tolist() == [[2.0], [2.0]]
    assert selected((one, two)) is one
    assert selected({"logits": two, "aux": one}) is two
    assert outputs(lambda x: {"a": x.half()}, one, "a").dtype == torch.float32
    with pytest.raises(InvalidInput, match=r"output='c' .* 'a', 'b'"):
        selected({"a": one, "b": two}, "c")
    with pytest.raises(InvalidInput, match=r"returned dict; .* 'a', 'b'"):
        selected({"a": one, "b": two})


def test_outputs_that_nobody_watches_are_named():
    one, two = torch.zeros(2, 3), torch.ones(2, 1)
    assert unwatched((one, two), None) == ["1"]
    assert unwatched((one, two), None, 1) == []
    assert unwatched({"a": one, "b": two, "n": torch.ones(2, dtype=torch.int64)}, "a") == ["b"]
    assert unwatched(Answer(one, two, (one,)), None) == ["value"]
    assert unwatched({"logits": one, "loss": two, "encoder_last_hidden_state": two}, None) == []
    assert unwatched(one, None) == []


def test_outputs_in_outputs_are_named_and_what_a_function_reads_is_watched():
    one, two = torch.ones(2, 3), torch.zeros(2)
    assert unwatched({"logits": one, "aux": {"boxes": two, "loss": two}}, None) == ["aux.boxes"]
    assert unwatched(SimpleNamespace(logits=one, boxes=two), None) == ["boxes"]
    assert unwatched((one, (two, two)), None) == []  # states, as of a recurrent network
    assert unwatched({"logits": one, "vision_model_output": {"pooler_output": two}}, None) == []
    assert unwatched({"z": one, "v": two}, lambda answer: answer["z"][:, :2]) == ["v"]
    assert unwatched({"z": one, "logits": one[:, :2]}, None) == ["z"]
