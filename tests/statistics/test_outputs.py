"""Moments of the outputs' gradients: against one backward pass an item, and against what they are said to mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightpatch.errors import InvalidInput, NonFinite
from weightpatch.statistics import Moments, categorical, gaussian, outputs, second_moments


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_class(answers: Tensor, generator: torch.Generator) -> Tensor:
    """A likelihood without chance, so that gradients can be compared one by one."""
    return answers.log_softmax(-1)[:, 1]


class Net(nn.Module):
    """Groups, strides, in-place activations and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.flat = nn.Conv1d(6, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x)).flatten(2)
        y = self.relu(self.flat(y)).mean(2)
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(y)))))


def by_item(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return Σ g gᵀ by one backward pass an item, through outputs that are leaves of their own graph."""
    sums: dict[str, Tensor] = {}
    for item in x.split(1):
        seen: list[tuple[str, nn.Module, Tensor]] = []

        def keep(module: nn.Module, args: object, output: Tensor, seen: list = seen) -> None:
            output.retain_grad()
            seen.append((next(n for n, m in model.named_modules() if m is module), module, output))

        layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))]
        handles = [layer.register_forward_hook(keep) for layer in layers]
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # else the gradient is that of what replaces the output
        model(item).log_softmax(-1)[0, 1].backward()
        for handle in handles:
            handle.remove()
        for name, module, output in seen:
            groups = getattr(module, "groups", 1)
            grad = output.grad[0].reshape(len(module.weight), -1)  # (channels, positions) of one item
            for position in grad.T:
                parts = position.view(groups, -1)
                square = parts[:, :, None] * parts[:, None, :]
                sums[f"{name}.weight"] = sums.get(f"{name}.weight", 0) + square
    return sums


def test_they_are_the_sums_over_items_and_positions():
    torch.manual_seed(1)
    model, x = Net().double(), double(7, 4, 6, 5)
    found = second_moments(model, x, batch_size=3, likelihood=second_class)
    plain = second_moments(model, x, batch_size=3)
    expected = by_item(model, x)
    assert found.layers.keys() == expected.keys() == plain.layers.keys()
    for name, layer in found.layers.items():
        assert float(expected[name].abs().max()) > 0
        assert torch.allclose(layer.fisher, expected[name], rtol=1e-10, atol=1e-16), name
        assert torch.equal(layer.total, plain.layers[name].total)  # the inputs are those of a pass without gradients
        assert (layer.power, layer.count) == (plain.layers[name].power, plain.layers[name].count)
    assert (found.two_sided, plain.two_sided) == (True, False)


def test_the_model_is_left_as_it_is():
    case = next(case for case in zoo.CASES if case.name == "resnet")
    model, x = case.model(), case.inputs(9)
    untouched = zoo.digest(model)
    second_moments(model, x, likelihood=categorical)
    assert zoo.digest(model) == untouched
    with torch.inference_mode():
        again = second_moments(model, x.clone(), likelihood=categorical)  # a tensor without gradients
    assert zoo.digest(model) == untouched
    assert again.two_sided


def test_half_of_its_square_is_the_divergence():
    """KL(before || after) is ½ tr(G Δ C Δᵀ) to second order, where all inputs are one, so that both sides are exact."""
    model = nn.Linear(4, 3).double()
    x = double(1, 4).repeat(40000, 1)
    metric = second_moments(model, x, batch_size=10000, likelihood=categorical).metric(1e-9, output_shrinkage=1e-9)
    layer = metric.layers["weight"]
    weight, bias = model.weight.detach(), model.bias.detach()
    for seed in range(4):
        delta = 1e-3 * double(3, 5, seed=seed + 1)
        square = float((layer.fisher[0] @ delta @ layer.second[0] * delta).sum())
        before = F.linear(x[:1], weight, bias).log_softmax(1)
        after = F.linear(x[:1], weight + delta[:, :-1], bias + delta[:, -1]).log_softmax(1)
        assert 0.5 * square == pytest.approx(float((before.exp() * (before - after)).sum()), rel=0.03)


def test_a_sampled_class_is_drawn_from_the_prediction_and_by_the_seed():
    logits = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64).repeat(30000, 1).requires_grad_()
    values = categorical(logits, torch.Generator().manual_seed(3))
    (slope,) = torch.autograd.grad(values.sum(), logits)
    drawn = slope + logits.detach().softmax(1)  # ∂ log p(y) / ∂z is 1 at y, less p
    assert torch.allclose(drawn.mean(0), logits[0].detach().softmax(0), atol=0.01)
    assert torch.equal(drawn.round(), F.one_hot(drawn.argmax(1), 3).double())
    assert torch.equal(values, categorical(logits, torch.Generator().manual_seed(3)))
    assert not torch.equal(values, categorical(logits, torch.Generator().manual_seed(4)))
    sequences = categorical(torch.zeros(2, 5, 7), torch.Generator())
    assert torch.allclose(sequences, torch.full((2,), -5 * torch.tensor(7.0).log()))


def test_of_a_regression_the_noise_is_what_is_seen():
    model, x = nn.Linear(4, 3).double(), double(20000, 4)
    found = second_moments(model, x, batch_size=5000, likelihood=gaussian).layers["weight"].fisher[0] / len(x)
    assert torch.allclose(found, torch.eye(3, dtype=torch.float64), atol=0.03)  # of unit variance in every direction


def test_shards_add_up_and_files_keep_every_bit(tmp_path: Path):
    torch.manual_seed(1)
    model, x = Net().double(), double(12, 4, 6, 5)
    whole = second_moments(model, x, likelihood=second_class)
    parts = [second_moments(model, part, likelihood=second_class) for part in (x[:5], x[5:])]
    together = parts[0] + parts[1]
    whole.save(tmp_path / "m.safetensors")
    again = Moments.load(tmp_path / "m.safetensors", model)
    assert again.two_sided
    for name, layer in whole.layers.items():
        assert torch.allclose(together.layers[name].fisher, layer.fisher, rtol=1e-10, atol=1e-16)
        assert torch.equal(again.layers[name].fisher, layer.fisher)
        assert torch.equal(again.layers[name].total, layer.total)
    with pytest.raises(InvalidInput, match="likelihood for both"):
        whole + second_moments(model, x)


def test_files_of_inputs_alone_are_what_they_were(tmp_path: Path):
    """Byte for byte the format before outputs were measured: two tensors' worth of facts, and no more."""
    model, x = nn.Linear(3, 2).double(), double(5, 3)
    moments = second_moments(model, x)
    moments.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        facts, names = file.metadata(), list(file.keys())
    assert names == ["weight"]
    power = moments.layers["weight"].power
    assert json.loads(facts["layers"]) == {"weight": {"bias": "bias", "power": power, "count": 5}}
    old = {
        "format": "weightpatch moments 1",
        "fingerprint": moments.fingerprint,
        "items": "5",
        "layers": json.dumps({"weight": {"bias": "bias", "power": 1.5, "count": 5}}),
    }
    save_file({"weight": moments.layers["weight"].total}, tmp_path / "old.safetensors", old)
    read = Moments.load(tmp_path / "old.safetensors", model)
    assert (read.two_sided, read.layers["weight"].power) == (False, 1.5)
    assert read.metric().two_sided is False


def test_damaged_outputs_are_refused(tmp_path: Path):
    model, x = nn.Linear(3, 2).double(), double(5, 3)
    second_moments(model, x, likelihood=second_class).save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        facts = file.metadata()
    tensors = load_file(tmp_path / "m.safetensors")
    for bad in (
        tensors["weight.fisher"][:, :1],
        tensors["weight.fisher"].float(),
        tensors["weight.fisher"] * torch.nan,
    ):
        save_file({**tensors, "weight.fisher": bad.contiguous()}, tmp_path / "bad.safetensors", facts)
        with pytest.raises(InvalidInput, match="cannot be read"):
            Moments.load(tmp_path / "bad.safetensors")


def test_bad_input_is_said(monkeypatch: pytest.MonkeyPatch):
    model, x = nn.Linear(3, 2).double(), double(5, 3)
    with pytest.raises(InvalidInput, match="one log-likelihood an item"):
        second_moments(model, x, likelihood=lambda answers, generator: answers)
    with pytest.raises(NonFinite, match="log-likelihood"):
        second_moments(model, x, likelihood=lambda answers, generator: answers[:, 0] / 0)
    with pytest.raises(InvalidInput, match="likelihood=weightpatch"):
        second_moments(model, x).metric(output_shrinkage=0.1)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="output_shrinkage"):
            second_moments(model, x, likelihood=second_class).metric(output_shrinkage=bad)
    with pytest.raises(InvalidInput, match="do not depend on the outputs"):
        second_moments(model, x, likelihood=lambda answers, generator: answers[:, 0] * 0).metric(output_shrinkage=0.1)
    monkeypatch.setattr(outputs, "_WIDEST", 1)
    with pytest.raises(InvalidInput, match="matrix of that side"):
        second_moments(model, x, likelihood=second_class)
