"""Batches that are recorded together."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from weightpatch.training.views import joined


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def numbers(start: int, n: int = 2) -> Tensor:
    return torch.arange(start, start + n)


def test_batches_are_joined_as_they_are_nested():
    for make in (
        lambda a: a,
        lambda a: (a, a + 10),
        lambda a: [a, a + 10],
        lambda a: {"a": a, "b": {"c": (a + 10, [a])}},
        lambda a: (Pair(a, a + 10),),
    ):
        found, expected = joined([make(numbers(0)), make(numbers(2, 3))]), make(numbers(0, 5))
        assert type(found) is type(expected)
        assert str(found) == str(expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (numbers(0), numbers(0).float()),
        (numbers(0), numbers(0)[:, None]),
        ((numbers(0),), [numbers(0)]),
        ({"a": numbers(0)}, {"b": numbers(0)}),
        ((numbers(0), (numbers(0),)), (numbers(0), numbers(0))),
        ((numbers(0), True), (numbers(2), True)),
        ((numbers(0), numbers(0, 1)), (numbers(2), numbers(0, 1))),
        (numbers(0).numpy(), numbers(0).numpy()),
    ],
)
def test_what_differs_or_does_not_belong_to_items_is_not_joined(one: object, other: object):
    assert joined([one, other]) is None
