from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from patch_cases import DTYPES, WIDTH, Net, dtypes, snapshot
from torch import nn

from weightpatch.errors import NotEditable
from weightpatch.patches import base_fingerprint, fingerprint, hashing


def test_a_model_and_its_state_dict_have_one_fingerprint():
    model = Net()
    assert fingerprint(model) == fingerprint(model.state_dict()) == base_fingerprint(model)
    assert fingerprint(model) == fingerprint(snapshot(model)) == fingerprint(copy.deepcopy(model))


@given(st.permutations(list(Net().state_dict())))
def test_order_does_not_matter(names):
    state = Net().state_dict()
    assert fingerprint({name: state[name] for name in names}) == fingerprint(state)


def test_memory_layout_does_not_matter(monkeypatch):
    monkeypatch.setattr(hashing, "_CHUNK", 64)  # several pieces even of a small tensor
    images = torch.randn(5, 4, 3, 3)
    expected = fingerprint({"w": images})
    assert fingerprint({"w": images.to(memory_format=torch.channels_last)}) == expected
    assert fingerprint({"w": torch.stack([images, images], -1)[..., 0]}) == expected
    assert fingerprint({"w": images.transpose(0, 1).contiguous().transpose(0, 1)}) == expected
    monkeypatch.undo()
    assert fingerprint({"w": images}) == expected


@settings(max_examples=100)
@given(dtypes, st.data())
def test_every_bit_matters(dtype, data):
    values = torch.randn(3, 4).to(dtype)
    other = values.clone()
    place = data.draw(st.integers(0, 11))
    bit = data.draw(st.integers(0, dtype.itemsize * 8 - 1))
    mask = torch.tensor([1], dtype=torch.int64).bitwise_left_shift(bit).to(WIDTH[dtype])
    other.view(-1)[place : place + 1].view(WIDTH[dtype])[:] ^= mask
    assert fingerprint({"w": values}) != fingerprint({"w": other})


def test_names_types_and_shapes_matter():
    values = torch.zeros(4, 4)
    variants = [
        {"w": values},
        {"v": values},
        {"w": values, "v": values},
        {"w": values.t().reshape(2, 8)},
        {"w": values.reshape(16)},
        {"w": values.double().reshape(-1)[:8].reshape(2, 4)},
        {"w": values.int()},
        {"w": values.bool()},
        {"w": values[:0]},
        {"w": values[0, 0]},
        {},
    ]
    assert len({fingerprint(v) for v in variants}) == len(variants)


def test_nothing_hides_in_how_names_are_joined():
    a, b = torch.zeros(1), torch.ones(1)
    assert fingerprint({"a\n": a, "b": b}) != fingerprint({"a": a, "\nb": b})
    assert fingerprint({'a"': a}) != fingerprint({"a": a})


def test_buffers_count_where_they_persist():
    model = Net()
    before = fingerprint(model)
    model.scratch.add_(1)
    assert fingerprint(model) == before
    model.norm.num_batches_tracked.add_(1)
    assert fingerprint(model) != before


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.bool, torch.complex64])
def test_every_type_can_be_hashed(dtype):
    assert len(fingerprint({"w": torch.ones(3, 2).to(dtype)})) == 64


def test_conjugated_views_are_read_as_their_values():
    values = torch.randn(4, dtype=torch.complex64)
    assert fingerprint({"w": values.conj()}) == fingerprint({"w": values.conj().resolve_conj()})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
)
def test_tensors_without_plain_values_are_refused(tensor):
    with pytest.raises(NotEditable, match="'w'"):
        fingerprint({"w": tensor})


def test_uninitialised_modules_are_refused():
    with pytest.raises(NotEditable, match="weight"):
        fingerprint(nn.LazyLinear(3))


def test_modules_used_twice_count_under_both_names():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert fingerprint(model) == fingerprint(model.state_dict())
