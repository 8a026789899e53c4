"""A linear layer whose weight is (width, out), as in GPT-2, against one of torch's own with the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tiny_text as tiny
import torch
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editors import Editor, Gate, GaussNewton, KeyValue, Metric, MinimumNorm, Preconditioned
from weightpatch.likelihoods import Categorical
from weightpatch.statistics import Moments, second_moments

WIDE = 300  # from where on factors of low rank are held


class Turned(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.empty(width, out, dtype=torch.float64))
        self.bias = nn.Parameter(torch.empty(out, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def pair(width: int = 6, hidden: int = 8, *, readout: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 5)).double()
    turned = nn.Sequential(Turned(width, hidden), nn.Tanh(), nn.Linear(hidden, 5)).double()
    if readout:
        turned[2] = Turned(hidden, 5)
    with torch.no_grad():
        for one, other in zip(turned, plain, strict=True):
            if isinstance(one, Turned):
                one.weight.copy_(other.weight.T)
                one.bias.copy_(other.bias)
            elif isinstance(one, nn.Linear):
                one.load_state_dict(other.state_dict())
    return plain, turned


def inputs(n: int, width: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(model: nn.Module, width: int, parameters: str) -> Moments:
    return second_moments(model, inputs(40, width), parameters=parameters, likelihood=Categorical())


EDITORS: dict[str, Callable[[Metric, str], Editor]] = {
    "least norm": lambda metric, layer: MinimumNorm(metric=metric),
    "preconditioned": lambda metric, layer: Preconditioned(metric=metric, max_steps=60),
    "Gauss-Newton": lambda metric, layer: GaussNewton(metric=metric),
    "ROME": lambda metric, layer: KeyValue.rome(layer, metric),
    "gate": lambda metric, layer: Gate(layer, 4),
}


@pytest.mark.parametrize("parts", ["weight", "*"])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize(("layer", "width"), [("0", 6), ("2", 6), ("0", WIDE)])
def test_an_edit_is_that_of_the_layer_the_right_way_round(
    layer: str, width: int, name: str, two_sided: bool, parts: str
) -> None:
    if name == "ROME" and parts != "weight":
        pytest.skip("it writes weights alone")
    hidden = WIDE if width == WIDE else 8
    moved, violations = [], []
    for model in pair(width, hidden, readout=layer == "2"):
        measured = moments(model, width, f"{layer}.*")
        metric = measured.metric(output_shrinkage=0.1 if two_sided else math.inf)
        x = inputs(1, width, seed=2)
        fix = Classified(x, model(x).argsort(1)[:, -2], margin=0.1)
        keep = wp.Locality(inputs(20, width))
        found = wp.edit(model, fix, EDITORS[name](metric, layer), keep=keep, parameters=f"{layer}.{parts}")
        assert found.result is wp.Result.satisfied
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with found.patch.applied(model):
            moved.append(model(inputs(20, width, seed=3)) - 0)
            if name != "gate":
                key = f"{layer}.weight"
                moved.append(model.state_dict()[key] - before[key])
        violations.append(found.violation)
    half = len(moved) // 2
    torch.testing.assert_close(moved[0], moved[half], rtol=1e-6, atol=1e-9)
    if name != "gate":
        torch.testing.assert_close(moved[1], moved[half + 1].T, rtol=1e-6, atol=1e-9)
    assert violations[0] == pytest.approx(violations[1], abs=1e-7)


def test_moments_are_those_of_the_layer_the_right_way_round(tmp_path) -> None:
    plain, turned = (moments(model, 6, "0.*") for model in pair())
    turned.save(tmp_path / "moments.safetensors")
    again = Moments.load(tmp_path / "moments.safetensors", pair()[1])
    for found in (turned, again, turned + turned):
        layer, wanted = found.layers["0.weight"], plain.layers["0.weight"]
        assert layer.transposed
        assert not wanted.transposed
        torch.testing.assert_close(layer.total / layer.count, wanted.total / wanted.count)
        torch.testing.assert_close(layer.fisher / layer.count, wanted.fisher / wanted.count)


def test_a_language_model_with_such_layers_is_edited_by_its_metric_and_by_the_ladder() -> None:
    text = pytest.importorskip("weightpatch.tasks.text")
    kind = text.CausalLM(tiny.gpt2(), tiny.Words(0), {"max_new_tokens": 7})
    keep, layer = kind.kept(["3 9 4", "7 7", "12 1 30 2", "5"]), "transformer.h.1.mlp.c_proj"
    metric = second_moments(kind.model, keep, parameters=f"{layer}.*").metric()
    fix = kind.says("3 4 5", "8 9")
    for editor in (
        MinimumNorm(metric=metric),
        Preconditioned(metric=metric, max_steps=100),
        KeyValue.rome(layer, metric),
    ):
        found = wp.edit(kind.model, fix, editor, parameters=f"{layer}.weight").raise_for_result()
        with found.patch.applied(kind.model):
            assert kind.answer("3 4 5").startswith("8 9")
    found = wp.edit(kind.model, fix, keep=keep, parameters="transformer.h.1.mlp.*")
    assert any(layer in attempt.name for attempt in found.attempts)
