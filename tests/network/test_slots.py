"""Room for gates in a copy of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from weightpatch.errors import InvalidInput
from weightpatch.evaluation.predictor import FastPredictor, SlowPredictor
from weightpatch.gates import gated
from weightpatch.network import Network, noted, with_slots
from weightpatch.tasks import images


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 6))
def test_the_nearest_key_whose_ball_holds_an_input_counts(seed: int, n: int, m: int):
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, generator=draw), torch.randn(n, 2, generator=draw)
    keys, values = torch.randn(m, 3, generator=draw), torch.randn(m, 2, generator=draw)
    radii = torch.rand(m, generator=draw) * 3 - 0.5
    found = gated(x, y, keys, radii, values)
    for i in range(n):
        inside = [(float((x[i] - keys[j]).norm()), j) for j in range(m) if (x[i] - keys[j]).norm() <= radii[j]]
        expected = y[i] + values[min(inside)[1]] if inside else y[i]
        assert torch.equal(found[i], expected)


def test_a_copy_with_slots_answers_bit_for_bit_and_the_model_stays():
    model, x = images.fashion_classifier(), images.fashion_test().images[:20]
    model.train()
    wide = with_slots(model, "fc", 3)
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in wide.named_parameters() if "gate" not in n]
    assert type(model.fc) is nn.Linear
    assert torch.equal(wide(x), model.eval()(x))
    assert torch.equal(copy.deepcopy(wide)(x), model(x))
    with noted("fc") as seen, noted("layer3") as other:
        wide(x)
    assert (len(seen), len(other)) == (0, 0)  # the inner block alone listens, to its own layer
    with noted("fc") as seen:
        wide(x)
    assert [part.shape for part in seen] == [(20, 64)]


def test_what_a_layer_is_given_is_that_of_each_batch():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, 2)

        def forward(self, x, negative=False):
            x = torch.as_tensor(x)
            return self.out(-x if negative else x)

    network, x = Network(with_slots(Sum(), "out", 1), ["out.gate.*"]), torch.randn(4, 3)
    batches = ((x,), (x, True), (x + 1,), {"x": x.numpy()}, {"x": x.numpy() + 1}, x.numpy(), [[1.0, 2.0, 3.0]])
    for _ in range(2):
        given = [network.given("out", batch) for batch in batches]
        for found, expected in zip(given, (x, -x, x + 1, x, x + 1, x, torch.tensor([[1.0, 2, 3]])), strict=True):
            assert torch.equal(found, expected)
    assert network.given("out", batches[0]) is given[0]


def test_edited_gates_are_judged_as_by_full_passes():
    model, test = images.fashion_classifier(), images.fashion_test()[slice(600)]
    wide = with_slots(model, "fc", 4)
    network = Network(wide, ["fc.gate.*"])
    with noted("fc") as seen:
        network.full(network.start)(test.images)
    params = {name: value.clone() for name, value in network.start.items()}
    params["fc.gate.keys"][:2] = seen[0][:2]
    params["fc.gate.radii"][:2] = torch.tensor([3.0, 0.01])
    params["fc.gate.values"][[0, 1], [3, 4]] = 99.0
    fast = FastPredictor(wide, network, test.images, 250)
    slow = SlowPredictor(wide, network, test.images, 250)
    assert fast.untraced_because == ""
    found, expected = fast.predict(params).outputs.argmax(1), slow.predict(params).outputs.argmax(1)
    assert torch.equal(found, expected)
    assert (found != fast.base.argmax(1)).sum() > 1


@pytest.mark.parametrize("layer", ["nowhere", "", "layer1", "conv1"])
def test_a_layer_that_cannot_have_a_gate_is_refused(layer: str):
    with pytest.raises(InvalidInput, match="a gate was asked for at layer=.*linear layers are fc"):
        with_slots(images.fashion_classifier(), layer, 3)
