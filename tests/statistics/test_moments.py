"""Moments against their meaning: ``tr(Δ C Δᵀ)`` is the mean square of what Δ adds to a layer's outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn

from weightpatch import Locality
from weightpatch.constraints import Classified
from weightpatch.editors import Metric
from weightpatch.errors import InvalidInput
from weightpatch.likelihoods import Categorical
from weightpatch.statistics import Moments, second_moments
from weightpatch.statistics.measuring import called, on_path

LAYERS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear of sequences": (nn.Linear(5, 3, bias=False), (4, 6, 5)),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 7, 6)),
    "dilated": (nn.Conv2d(2, 3, (3, 2), dilation=(2, 1), padding=(2, 0), bias=False), (3, 2, 8, 5)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2), (3, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (3, 4, 5, 5)),
    "reflected": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (3, 2, 5, 5)),
    "same": (nn.Conv2d(2, 3, (2, 3), padding="same"), (3, 2, 5, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (3, 3, 11)),
}


def double(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_the_metric_is_the_mean_square_of_what_a_change_adds(name: str):
    layer, shape = LAYERS[name]
    layer, x = layer.double(), double(shape)
    moments = second_moments(layer, x, batch_size=2)
    found = moments.layers["weight"]
    y = layer(x).detach()
    channel = -1 if isinstance(layer, nn.Linear) else 1
    assert found.count == y.numel() // y.shape[channel]
    assert found.power == pytest.approx(float(y.square().sum()))

    changes = {n: double(tuple(p.shape), seed=1) for n, p in layer.named_parameters()}
    added = torch.func.functional_call(layer, changes, x)
    groups, rows = len(found.total), len(layer.weight)
    bias = changes.get("bias", torch.zeros(rows, dtype=torch.float64))
    delta = torch.cat([changes["weight"].reshape(groups, rows // groups, -1), bias.view(groups, -1, 1)], -1)
    square = (delta @ (found.total / found.count) * delta).sum()
    assert float(square) == pytest.approx(float(added.square().sum()) / found.count, rel=1e-10)


@pytest.mark.parametrize("name", ["linear", "groups", "conv1d"])
def test_the_inverse_is_one_of_the_shrunk_moments(name: str):
    layer, shape = LAYERS[name]
    metric = second_moments(layer.double(), double(shape)).metric(shrinkage=0.3)
    grads = {n: double(tuple(p.shape), seed=2) for n, p in layer.named_parameters()}
    moved, squares = metric.applied(grads)
    assert float(squares["weight"]) == pytest.approx(sum(float((grads[n] * moved[n]).sum()) for n in grads))
    second = metric.layers["weight"].second
    mean = second.diagonal(dim1=-2, dim2=-1).mean(-1)
    shrunk = second + 0.3 * mean[:, None, None] * torch.eye(second.shape[-1])
    groups, rows = len(second), len(layer.weight)

    def together(part: dict[str, Tensor]) -> Tensor:
        return torch.cat([part["weight"].reshape(groups, rows // groups, -1), part["bias"].view(groups, -1, 1)], -1)

    assert torch.allclose(together(moved) @ shrunk, together(grads), rtol=1e-9)
    alone, _ = metric.applied({"weight": grads["weight"]})
    inner = second[:, :-1, :-1]
    inner = inner + 0.3 * inner.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(inner.shape[-1])
    found = alone["weight"].reshape(groups, rows // groups, -1) @ inner
    assert torch.allclose(found, grads["weight"].reshape(groups, rows // groups, -1), rtol=1e-9)
    assert metric.applied({"bias": grads["bias"]})[0]["bias"] == pytest.approx(grads["bias"] / 1.3)


@pytest.mark.parametrize("rank", [0, 1, 5, 8, 13, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_low_rank_take_the_short_way(rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    layer = nn.Linear(50, 40, bias=False).double()
    metric = second_moments(layer, double((90, 50))).metric(0.1)
    gradient = (double((40, rank), seed=1) @ double((rank, 50), seed=2)).to(dtype)
    inverse = metric.layers["weight"].inverse(gradient, with_bias=False)[0]
    products: list[int] = []
    times = torch.Tensor.__matmul__

    def counted(a: Tensor, b: Tensor) -> Tensor:
        products.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
        return times(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    found = metric.applied({"weight": gradient})[0]["weight"]
    assert (40 * 50 * 50 in products) == (rank > 8)  # the whole product is made only where it has to be
    expected = times(gradient, inverse)
    assert float((found - expected).abs().max()) <= 50 * torch.finfo(dtype).eps * float(expected.abs().max())


def test_the_projector_leaves_the_energetic_directions_alone():
    x = double((50, 6)) * torch.tensor([10.0, 5.0, 1.0, 0.1, 0.1, 0.1])
    layer = nn.Linear(6, 2, bias=False).double()
    metric = second_moments(layer, x).metric(energy=0.99)
    moved, _ = metric.applied({"weight": double((2, 6), seed=3)})
    added = x @ moved["weight"].T
    assert float(added.square().sum()) < 0.01 * float(moved["weight"].square().sum()) * float(x.square().sum())
    again, _ = metric.applied(moved)
    assert torch.allclose(again["weight"], moved["weight"])
    assert float(moved["weight"].abs().max()) > 0


def test_shards_add_up_and_files_keep_every_bit(tmp_path: Path):
    case = next(case for case in zoo.CASES if case.name == "resnet")
    model, x = case.model(), case.inputs(30)
    untouched = zoo.digest(model)
    whole = second_moments(model, x)
    assert zoo.digest(model) == untouched
    assert all(not module._forward_hooks for module in model.modules())
    parts = second_moments(model, x[:11]) + second_moments(model, [x[11:20], x[20:]])
    assert (parts.items, parts.fingerprint) == (30, whole.fingerprint)
    for name, layer in whole.layers.items():
        assert parts.layers[name].count == layer.count
        assert torch.allclose(parts.layers[name].total, layer.total, rtol=1e-6)
    whole.save(tmp_path / "m.safetensors")
    again = Moments.load(tmp_path / "m.safetensors", model)
    assert again.layers.keys() == whole.layers.keys()
    for name, layer in whole.layers.items():
        other = again.layers[name]
        assert torch.equal(other.total, layer.total)
        assert torch.equal(other.half.total, layer.half.total)
        assert (other.half.weight, other.half.count) == (name, layer.half.count)
        assert (other.bias, other.power, other.count) == (layer.bias, layer.power, layer.count)
    assert isinstance(again.metric(), Metric)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(InvalidInput, match="other weights"):
        Moments.load(tmp_path / "m.safetensors", model)
    with pytest.raises(InvalidInput, match="cannot be added"):
        whole + second_moments(model, x)


def test_tied_layers_and_keyword_arguments_count():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(input=self.one(x))

    model, x = Twice().double(), double((9, 4))
    found = second_moments(model, x)
    assert list(found.layers) == ["one.weight"]
    both = torch.cat([x, model.one(x).detach()])
    assert torch.allclose(found.layers["one.weight"].total[0, :-1, :-1], both.T @ both)
    assert found.layers["one.weight"].count == 18


def test_in_float64_shards_are_exact_to_rounding():
    layer, x = nn.Linear(5, 3).double(), double((1000, 5))
    whole = second_moments(layer, x).layers["weight"].total
    parts = second_moments(layer, x[:333]) + second_moments(layer, x[333:])
    assert torch.allclose(parts.layers["weight"].total, whole, rtol=1e-13)


class Drawing(nn.Module):
    """Draws random numbers in evaluation mode too, and takes a list."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, given: list[Tensor]) -> Tensor:
        return self.out(nn.functional.dropout(given[0], 0.5) + given[1])


def test_random_generators_are_left_alone() -> None:
    model, x = Drawing(), torch.randn(20, 4)
    before = torch.get_rng_state()
    keep = Locality([x, x], likelihood=Categorical())
    for likelihood in (None, Categorical()):
        second_moments(model, keep, likelihood=likelihood)
    assert called(model, [x, x]) == ("out.weight",)
    assert on_path(model, Classified([x, x], torch.zeros(20, dtype=torch.int64))) == {"out.weight"}
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_made_in_inference_mode_is_measured_wherever_it_is() -> None:
    class Sum(Drawing):
        def forward(self, given: list[Tensor]) -> Tensor:
            return self.out(given[0] + given[1])

    model = Sum()
    with torch.inference_mode():
        x = torch.randn(20, 4)
    found, expected = (
        second_moments(model, keep, likelihood=Categorical()).layers["out.weight"]
        for keep in (Locality([x, x]), Locality([x.clone(), x.clone()]))
    )
    assert torch.equal(found.total, expected.total)
    assert found.fisher is not None
    assert torch.equal(found.fisher, expected.fisher)


def test_bad_input_is_said(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(InvalidInput, match="no linear or convolution layer"):
        second_moments(model, torch.randn(3, 4), parameters="1.*")
    with pytest.raises(InvalidInput, match="called none"):
        second_moments(model, [])
    with pytest.raises(InvalidInput, match="NaN"):
        second_moments(model, torch.full((3, 4), torch.nan))
    moments = second_moments(model, torch.randn(3, 4))
    for bad in ({"shrinkage": 0.0}, {"shrinkage": float("nan")}, {"energy": 1.0}):
        with pytest.raises(InvalidInput, match="expected a positive shrinkage"):
            moments.metric(**bad)
    with pytest.raises(InvalidInput, match=r"no statistics for 1\.weight"):
        moments.metric().applied({"1.weight": torch.ones(4)})
    (tmp_path / "other.safetensors").write_bytes(b"not a file of moments")
    for path in (tmp_path / "other.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(InvalidInput, match="cannot be read as moments"):
            Moments.load(path)
