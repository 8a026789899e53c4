"""Gates as functions, values and hooks; as the content of patches they are tested in patches/test_gates.py."""

from __future__ import annotations

import copy
import io
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

from weightpatch.errors import InvalidInput, NonFinite, ShapeMismatch
from weightpatch.gates import Gate, GateHook, gated, sizes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def slowly(x, y, gate):
    """Slow oracle: one input and one key after the other."""
    found = y.clone()
    for place in range(len(x)):
        best = None
        for key, radius, value in zip(*(part.double() for part in gate.parts.values()), strict=True):
            distance = float((x[place].double() - key).norm())
            if distance <= float(radius) and (best is None or distance < best[0]):
                best = distance, value
        if best is not None:
            found[place] = y[place] + best[1].to(y.dtype)
    return found


@settings(max_examples=100)
@given(st.sampled_from(DTYPES), st.integers(1, 5), st.integers(0, 7), st.integers(0, 2**20))
def test_the_nearest_key_whose_ball_holds_the_input_counts(dtype, keys, inputs, seed):
    draw = torch.Generator().manual_seed(seed)
    # Whole numbers, and radii between the distances that they can have: no rounding decides
    x = torch.randint(-2, 3, (inputs, 3), generator=draw).to(dtype)
    centres = torch.randint(-2, 3, (keys, 3), generator=draw).to(dtype)
    radii = (torch.randint(0, 9, (keys,), generator=draw) + 0.5).sqrt().to(dtype)
    gate = Gate(centres, radii, torch.randn(keys, 2, generator=draw).to(dtype))
    y = torch.randn(inputs, 2, generator=draw).to(dtype)
    found = gated(x, y, *gate.parts.values())
    assert found.dtype == dtype
    assert torch.equal(found, slowly(x, y, gate))


def test_inputs_without_a_place_are_outside():
    gate = Gate(torch.zeros(1, 2), torch.tensor([1e30]), torch.ones(1, 3))
    x = torch.tensor([[torch.nan, 0], [torch.inf, 0], [0, 0]])
    y = torch.tensor([[1.0, torch.nan, -0.0], [torch.inf, 2, 3], [1, 2, 3]])
    found = gated(x, y, *gate.parts.values())
    assert torch.equal(found[:2].view(torch.int32), y[:2].view(torch.int32))
    assert found[2].tolist() == [2, 3, 4]


def test_gradients_pass_to_output_and_values_and_not_by_way_of_the_distance():
    x, y = torch.zeros(2, 2, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    keys, values = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    gated(x, y, keys, torch.ones(1), values).sum().backward()
    assert torch.equal(y.grad, torch.ones(2, 3))
    assert torch.equal(values.grad, torch.full((1, 3), 2.0))
    assert x.grad is None
    assert keys.grad is None


def gate(**parts):
    return Gate(**{"keys": torch.zeros(2, 4), "radii": torch.ones(2), "values": torch.ones(2, 3)} | parts)


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ({"keys": torch.zeros(2, 4, 1)}, ShapeMismatch, r"\(2, 4, 1\)"),
        ({"keys": torch.zeros(4)}, ShapeMismatch, "expected"),
        ({"keys": torch.zeros(3, 4)}, ShapeMismatch, "expected"),
        ({"keys": torch.zeros(2, 0)}, ShapeMismatch, "expected"),
        ({"values": torch.ones(3, 3)}, ShapeMismatch, "expected"),
        ({"values": torch.ones(2, 0)}, ShapeMismatch, "expected"),
        ({"values": torch.ones(2)}, ShapeMismatch, "expected"),
        ({"radii": torch.tensor(1.0)}, ShapeMismatch, "expected"),
        ({"radii": torch.ones(2, 1)}, ShapeMismatch, "expected"),
        ({"keys": torch.zeros(0, 4), "radii": torch.ones(0), "values": torch.ones(0, 3)}, ShapeMismatch, "at least"),
        ({"radii": torch.tensor([1, -0.5])}, InvalidInput, "-0.5"),
        ({"radii": torch.tensor([1, torch.inf])}, NonFinite, "radii"),
        ({"keys": torch.full((2, 4), torch.nan)}, NonFinite, "keys"),
        ({"values": torch.full((2, 3), -torch.inf)}, NonFinite, "values"),
        ({"keys": torch.zeros(2, 4, dtype=torch.int64)}, InvalidInput, "int64"),
        ({"values": torch.zeros(2, 3, dtype=torch.complex64)}, InvalidInput, "complex64"),
        ({"values": torch.zeros(2, 3).to_sparse()}, InvalidInput, "sparse"),
        ({"values": torch.zeros(2, 3).to(torch.float8_e5m2)}, InvalidInput, "float8"),
        ({"radii": [1.0, 1.0]}, InvalidInput, "list"),
    ],
)
def test_what_is_no_gate_is_refused(parts, error, words):
    with pytest.raises(error, match=words):
        gate(**parts)


def test_a_gate_knows_its_sizes():
    assert gate().sizes == (4, 3)
    assert gate(keys=torch.zeros(2, 4).half()).nbytes == 2 * 4 * 2 + 2 * 4 + 2 * 3 * 4
    twin = gate(keys=nn.Parameter(torch.zeros(4, 2)).t()).copy()
    assert twin.keys.is_contiguous()
    assert not twin.keys.requires_grad


class Odd(nn.Module):
    """Takes its input under a name of its own, and something before it as a keyword."""

    def forward(self, given, scale=1):
        return given[..., :3] * scale


def test_the_first_argument_is_found_under_its_name():
    module = Odd()
    module.register_forward_hook(GateHook("odd", module, [gate()]), with_kwargs=True)
    x = torch.zeros(1, 4)
    for answer in (module(x), module(given=x), module(scale=2, given=x)):
        assert answer.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    "call",
    [
        lambda module: module(torch.zeros(2, 5)),
        lambda module: module(torch.zeros(2, 4, dtype=torch.int64)),
        lambda module: module(torch.zeros(2, 4), scale=torch.ones(5, 1, 1)),
        lambda module: module(torch.zeros(4)[None, :3]),
        lambda module: nn.Module.__call__(module, scale=1, given=torch.zeros(2, 5)),
    ],
)
def test_other_shapes_and_types_are_refused_at_the_first_call(call):
    module = Odd()
    module.register_forward_hook(GateHook("odd", module, [gate()]), with_kwargs=True)
    with pytest.raises(ShapeMismatch, match=r"'odd' needs .*\(\.\.\., 4\).*\(\.\.\., 3\).*got torch\."):
        call(module)


def test_an_answer_that_is_no_tensor_is_refused():
    module = nn.LSTM(4, 3)
    module.register_forward_hook(GateHook("rnn", module, [gate()]), with_kwargs=True)
    with pytest.raises(ShapeMismatch, match="got torch.float32 .* and tuple"):
        module(torch.zeros(2, 4))


def hooked():
    module = nn.Linear(4, 3)
    hook = GateHook("fc", module, [gate()])
    module.register_forward_hook(hook, with_kwargs=True)
    return module, hook


def test_no_inputs_give_no_answers():
    module, _ = hooked()
    assert module(torch.zeros(0, 4)).shape == (0, 3)
    assert module(torch.zeros(2, 0, 4)).shape == (2, 0, 3)
    assert module(torch.zeros(4)).shape == (3,)


def test_tensors_are_moved_once_a_device_and_fake_ones_are_not_kept():
    module, hook = hooked()
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert list(hook._placed) == [cpu]
    first = hook._on(cpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(hook._on(meta)[0], FakeTensor)
    assert type(hook._on(meta)[0]) is torch.Tensor
    assert hook._on(meta) is hook._on(meta)
    assert copy.deepcopy(module).to("meta")(torch.zeros(2, 4, device="meta")).shape == (2, 3)
    assert hook._on(cpu) is first


def test_what_a_compiled_graph_owns_is_not_kept():
    module, _ = hooked()
    twin = copy.deepcopy(module)
    (hook,) = twin._forward_hooks.values()
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(1, 4)), module(torch.zeros(1, 4)))
    assert hook._placed == {}


def test_what_was_placed_in_inference_mode_can_be_trained_with():
    module, hook = hooked()
    with torch.inference_mode():
        hook._placed.clear()
        module(torch.zeros(1, 4))
        made = GateHook("fc", module, [gate()])
    module.register_forward_hook(made, with_kwargs=True)
    module(torch.zeros(1, 4, requires_grad=True)).sum().backward()
    assert module.weight.grad is not None


def test_autocast_is_followed():
    module, _ = hooked()
    with torch.autocast("cpu", torch.bfloat16):
        inside, outside = module(torch.zeros(1, 4)), module(torch.full((1, 4), 9.0))
    assert inside.dtype == outside.dtype == torch.bfloat16


def test_hooks_travel_without_what_they_placed():
    _, hook = hooked()
    for twin in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert twin._placed == {}
        assert all(torch.equal(a, b) for a, b in zip(twin.gate.parts.values(), hook.gate.parts.values(), strict=True))
    torch.save(hook, buffer := io.BytesIO())
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False, map_location="meta")._on(torch.device("meta"))[0].is_meta


def test_sizes_of_modules():
    assert sizes(nn.Linear(4, 3)) == {(4, 3)}
    assert sizes(nn.Bilinear(4, 4, 3)) == set()
    assert sizes(nn.LayerNorm(4)) == set()
    assert sizes(nn.ReLU()) == set()
    conv1d = nn.Module()
    conv1d.weight = nn.Parameter(torch.zeros(4, 3))
    assert sizes(conv1d) == {(4, 3), (3, 4)}
