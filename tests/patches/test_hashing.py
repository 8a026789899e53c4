from __future__ import annotations

import copy
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from patch_cases import DTYPES, WIDTH, Net, dtypes, snapshot
from torch import nn

from weightpatch.errors import NotEditable
from weightpatch.patches import base_fingerprint, fingerprint, hashing
from weightpatch.patches.hashing import named_tensors


def test_a_model_and_its_state_dict_have_one_fingerprint():
    model = Net()
    assert fingerprint(model) == fingerprint(model.state_dict()) == base_fingerprint(model)
    assert fingerprint(model) == fingerprint(snapshot(model)) == fingerprint(copy.deepcopy(model))


@given(st.permutations(list(Net().state_dict())))
def test_order_does_not_matter(names):
    state = Net().state_dict()
    assert fingerprint({name: state[name] for name in names}) == fingerprint(state)


def test_the_stride_of_a_single_number_does_not_matter():
    column = torch.arange(5)[None][:, 3]  # as of the second best class of one item
    assert column.is_contiguous()
    assert column.stride() == (5,)
    assert fingerprint({"w": column}) == fingerprint({"w": torch.tensor([3])})


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


def quantised(layer: nn.Module, kinds: set[type]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), kinds, dtype=torch.qint8)


KINDS = {
    "linear": (lambda: nn.Linear(3, 4), {nn.Linear}),
    "cell": (lambda: nn.GRUCell(3, 4), {nn.GRUCell}),
    "lstm": (lambda: nn.LSTM(3, 4), {nn.LSTM}),
    "embedding": (
        lambda: nn.EmbeddingBag(3, 4),
        {nn.EmbeddingBag: torch.ao.quantization.float_qparams_weight_only_qconfig},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_count(kind):
    make, kinds = KINDS[kind]

    def mark(change) -> str:
        torch.manual_seed(0)
        layer = make()
        with torch.no_grad():
            change(next(layer.parameters()))
        model = quantised(layer, kinds)
        assert fingerprint(model) == fingerprint(copy.deepcopy(model))
        return fingerprint(model)

    marks = [mark(change) for change in (lambda w: w, lambda w: w[0, 0].add_(0.5), lambda w: w.mul_(2))]
    assert len(set(marks)) == 3
    assert marks[0] == mark(lambda w: w)


def test_every_part_of_packed_weights_counts():
    def mark(values=1.0, scale=0.5, zero=0, bias=0.0, channels=None) -> str:
        layer = torch.ao.nn.quantized.Linear(2, 2)
        weight = torch.full((2, 2), values)
        if channels is None:
            packed = torch.quantize_per_tensor(weight, scale, zero, torch.qint8)
        else:
            packed = torch.quantize_per_channel(
                weight, torch.tensor([scale, channels]), torch.zeros(2).int(), 0, torch.qint8
            )
        layer.set_weight_bias(packed, torch.full((2,), bias))
        return fingerprint(layer)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [
            mark(),
            mark(values=1.5),
            mark(values=2.0, scale=1.0),
            mark(values=0.5, zero=1),
            mark(bias=1e-6),
            mark(channels=0.5),
            mark(channels=0.25),
        ]
        assert found[0] == mark()
    assert len(set(found)) == len(found)


def test_no_patch_can_name_packed_weights():
    tensors = named_tensors(quantised(nn.Linear(3, 4), {nn.Linear}))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "0._packed_params._packed_params": (torch.uint8, (32,))
    }


def test_what_is_compiled_counts_as_what_is_inside():
    model = Net()
    mark = fingerprint(model)
    model.head = torch.compile(model.head, backend="eager")
    assert fingerprint(model) == fingerprint(torch.compile(model, backend="eager")) == mark
