"""Moments of the outputs' gradients: against one backward pass an item, and against what they are said to mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.errors import InvalidInput, NonFinite
from weightpatch.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Of
from weightpatch.statistics import Moments, outputs, second_moments


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Own(Likelihood):
    """A likelihood that a user wrote, without chance, so that gradients can be compared one by one."""

    log_prob_of: Callable[[Tensor], Tensor] = lambda outputs: outputs.log_softmax(-1)[:, 1]

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        raise NotImplementedError

    def answer(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return outputs

    def log_prob(self, outputs: Tensor, answers: Tensor) -> Tensor:
        return self.log_prob_of(outputs)


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
    found = second_moments(model, x, batch_size=3, likelihood=Own())
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
    second_moments(model, x, likelihood=Categorical())
    assert zoo.digest(model) == untouched
    with torch.inference_mode():
        again = second_moments(model, x.clone(), likelihood=Categorical())  # a tensor without gradients
    assert zoo.digest(model) == untouched
    assert again.two_sided


def test_half_of_its_square_is_the_divergence():
    """KL(before || after) is ½ tr(G Δ C Δᵀ) to second order, where all inputs are one, so that both sides are exact."""
    model = nn.Linear(4, 3).double()
    x = double(1, 4).repeat(40000, 1)
    metric = second_moments(model, x, batch_size=10000, likelihood=Categorical()).metric(1e-9, output_shrinkage=1e-9)
    layer = metric.layers["weight"]
    weight, bias = model.weight.detach(), model.bias.detach()
    for seed in range(4):
        delta = 1e-3 * double(3, 5, seed=seed + 1)
        square = float((layer.fisher[0] @ delta @ layer.second[0] * delta).sum())
        before = F.linear(x[:1], weight, bias).log_softmax(1)
        after = F.linear(x[:1], weight + delta[:, :-1], bias + delta[:, -1]).log_softmax(1)
        assert 0.5 * square == pytest.approx(float((before.exp() * (before - after)).sum()), rel=0.03)


def fisher(
    likelihood: Likelihood, outputs: int, positions: tuple[int, ...] = (), seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return E[Σ g gᵀ] of a linear readout on many copies of one item, and its prediction, (*positions, outputs)."""
    torch.manual_seed(2)
    model, x = nn.Linear(4, outputs).double(), double(1, *positions, 4).repeat(40000, *[1] * (len(positions) + 1))
    found = second_moments(model, x, batch_size=20000, likelihood=likelihood, seed=seed)
    return found.layers["weight"].fisher[0] / len(x), model(x[0]).detach()


def test_of_a_softmax_it_is_the_covariance_of_the_class():
    found, z = fisher(Categorical(), 3)
    p = z.softmax(0)
    assert torch.allclose(found, p.diag() - p[:, None] * p, atol=0.01)
    sequences, z = fisher(Categorical(), 3, (5,))  # summed over the positions of an item
    p = z.softmax(1)
    assert torch.allclose(sequences, p.sum(0).diag() - p.T @ p, atol=0.02)
    assert torch.equal(fisher(Categorical(), 3, seed=1)[0], fisher(Categorical(), 3, seed=1)[0])
    assert not torch.equal(fisher(Categorical(), 3, seed=1)[0], found)


def test_of_tags_it_is_the_variance_of_each():
    found, z = fisher(Bernoulli(of=Of.logits), 3)
    p = z.sigmoid()
    assert torch.allclose(found, (p * (1 - p)).diag(), atol=0.01)


@pytest.mark.parametrize("scale", [0.5, (0.5, 2.0, 4.0)])
def test_of_numbers_it_is_one_over_the_variance(scale: float | tuple[float, ...]):
    found, _ = fisher(Gaussian(scale), 3)
    expected = torch.tensor(scale, dtype=torch.float64).expand(3) ** -2.0
    assert torch.allclose(found, expected.diag(), rtol=0.03, atol=0.03 * float(expected.max()))
    with pytest.raises(InvalidInput, match="Gaussian"):
        second_moments(nn.Linear(4, 3).double(), double(5, 4), likelihood=Gaussian())


def test_networks_that_end_in_a_softmax_are_asked_about_their_probabilities():
    torch.manual_seed(0)
    readout, x = nn.Linear(4, 3).double(), double(50, 4)
    found = [second_moments(m, x, likelihood=Categorical()) for m in (readout, nn.Sequential(readout, nn.Softmax(1)))]
    one, two = (next(iter(moments.layers.values())).fisher for moments in found)
    assert torch.allclose(one, two)


def test_shards_add_up_and_files_keep_every_bit(tmp_path: Path):
    torch.manual_seed(1)
    model, x = Net().double(), double(12, 4, 6, 5)
    whole = second_moments(model, x, likelihood=Own())
    parts = [second_moments(model, part, likelihood=Own()) for part in (x[:5], x[5:])]
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


def test_damaged_outputs_are_refused(tmp_path: Path):
    model, x = nn.Linear(3, 2).double(), double(5, 3)
    second_moments(model, x, likelihood=Own()).save(tmp_path / "m.safetensors")
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
    with pytest.raises(InvalidInput, match="one log-likelihood a position"):
        second_moments(model, x, likelihood=Own(lambda outputs: outputs.sum()))
    with pytest.raises(NonFinite, match="log-likelihood"):
        second_moments(model, x, likelihood=Own(lambda outputs: outputs[:, 0] / 0))
    with pytest.raises(InvalidInput, match="likelihood=weightpatch"):
        second_moments(model, x).metric(output_shrinkage=0.1)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidInput, match="output_shrinkage"):
            second_moments(model, x, likelihood=Own()).metric(output_shrinkage=bad)
    dead = second_moments(model, x, likelihood=Own(lambda outputs: outputs[:, 0] * 0))
    with pytest.raises(InvalidInput, match="do not depend on the outputs"):
        dead.metric(output_shrinkage=0.1)
    assert not dead.metric().two_sided
    assert second_moments(model, x, likelihood=Own()).metric().two_sided
    assert not second_moments(model, x, likelihood=Own()).metric(output_shrinkage=math.inf).two_sided
    monkeypatch.setattr(outputs, "_WIDEST", 1)
    with pytest.raises(InvalidInput, match="matrix of that side"):
        second_moments(model, x, likelihood=Own())


def test_the_output_that_is_kept_is_the_one_that_is_asked():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.first(x), "other": self.second(x)}

    model, x = Two().double(), double(50, 4)
    kept = wp.Locality(x, likelihood=Categorical(), output="other")
    layers = second_moments(model, kept, likelihood=Categorical()).layers
    assert not layers["first.weight"].fisher.any()
    assert layers["second.weight"].fisher.any()
