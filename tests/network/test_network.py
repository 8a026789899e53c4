"""The view of a model: parameters in and out, changes behind its back, threads."""

from __future__ import annotations

import gc
import threading
import weakref

import network_cases as cases
import pytest
import torch
import zoo
from torch import nn

from weightpatch.errors import InvalidInput, NotEditable, ShapeMismatch
from weightpatch.network import Network


def test_start_is_a_detached_copy(case: zoo.Case):
    model = case.model()
    network = Network(model, case.parameters)
    weights = dict(model.named_parameters())
    assert tuple(network.start) == network.names
    for name, value in network.start.items():
        assert not value.requires_grad
        assert value.data_ptr() != weights[name].data_ptr()
        assert torch.equal(value.to(weights[name].dtype), weights[name])
        assert torch.equal(network.rounded(network.start)[name], weights[name])


def test_parameters_of_another_kind_are_refused():
    network = Network(zoo.mlp(), "3.*")
    with pytest.raises(InvalidInput, match=r"\['3.bias'\]"):
        network.at({"3.weight": network.start["3.weight"]})
    with pytest.raises(InvalidInput, match="0.weight"):
        network.at({**network.start, "0.weight": torch.zeros(24, 6)})
    with pytest.raises(ShapeMismatch, match=r"3\.bias has shape \(4,\); expected \(5,\)"):
        network.at({**network.start, "3.bias": torch.zeros(4)})


def test_a_model_that_was_trained_since_is_noticed():
    model = zoo.mlp()
    network = Network(model, "3.*")
    network.before(cases.floats(2, 6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(cases.floats(2, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(InvalidInput, match="changed since"):
        network.at(network.start)
    with pytest.raises(InvalidInput, match="changed since"):
        _ = network.before


def test_weights_that_passes_write_to_are_the_networks_own():
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.full((6,), 3.0)), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.scale.data.clamp_(-1, 1)
            return self.head(x * self.scale)

    model = Clamps()
    network = Network(model, "head.*")
    x = cases.floats(2, 6)
    for _ in range(3):
        torch.testing.assert_close(network.before(x), model.head(x))
    assert torch.equal(model.scale, torch.full((6,), 3.0))
    assert model.scale._version == 0
    with pytest.raises(NotEditable, match=r"scale is changed in place by every forward pass"):
        Network(model, "scale").before(x)
    assert torch.equal(model.scale, torch.full((6,), 3.0))


def test_max_norm_embeddings_keep_their_weight():
    model = cases.MaxNorm()
    before = model.embed.weight.detach().clone()
    network = Network(model, "head.*")
    network.before(torch.arange(8).reshape(2, 4))
    assert torch.equal(model.embed.weight, before)


def test_recordings_of_keyword_inputs():
    model = nn.Transformer(8, 2, 1, 2, 16, batch_first=True).eval()
    network = Network(model, "decoder.layers.1.*")
    inputs = {"src": cases.floats(2, 5, 8), "tgt": cases.floats(2, 3, 8, seed=1)}
    recording = network.record(inputs)
    params = cases.moved(network.start, 0, 0.1)
    torch.testing.assert_close(network.run(params, recording), network.full(params)(**inputs), rtol=0, atol=0)
    assert recording.nbytes == (2 * 5 + 2 * 3) * 8 * 4
    assert not recording.output.requires_grad


def test_answers_from_several_threads():
    model = zoo.TinyResNet().eval()
    network = Network(model, "layer2.*")
    batches = [cases.floats(2, 3, 8, 8, seed=seed) for seed in range(3)]
    params = [cases.moved(network.start, seed) for seed in range(3)]
    expected = [[cases.oracle(model, p, (x,), {}) for x in batches] for p in params]
    wrong: list[tuple[int, int]] = []

    def work(i: int) -> None:
        for _ in range(10):
            for j, x in enumerate(batches):
                with torch.no_grad():
                    if not torch.allclose(network.at(params[i])(x), expected[i][j], rtol=1e-4, atol=1e-5):
                        wrong.append((i, j))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_graph_is_kept_and_none_is_made_without_need():
    network = Network(zoo.TinyResNet(), "layer2.*")
    x = cases.floats(2, 3, 8, 8)
    assert not network.before(x).requires_grad
    assert not network.at(network.start)(x).requires_grad
    params = cases.moved(network.start, 0)
    output = network.at(params)(x)
    assert output.requires_grad
    with torch.no_grad():
        assert not network.at(params)(x).requires_grad
    ref = weakref.ref(output)
    del output
    gc.collect()
    assert ref() is None


def test_autocast_is_told_apart():
    model = zoo.mlp().eval()
    network = Network(model, "3.*")
    x = cases.floats(4, 6)
    plain = network.before(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = network.before(x)
        assert torch.equal(network.before(x), cast)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(network.before(x), plain)
