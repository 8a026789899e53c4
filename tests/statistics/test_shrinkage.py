"""Estimates of the shrinkage against the best there is, which is known where the true moment is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightpatch import Locality
from weightpatch.errors import InvalidInput
from weightpatch.statistics import Moments, second_moments, shrinkage
from weightpatch.statistics.shrinkage import held_out, ledoit_wolf

WIDTH = 40


def drawn(n: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Items whose moment has eigenvalues from 1 down to 0.001."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=draw, dtype=torch.float64) * torch.logspace(0, -1.5, width)


def spent(moment: Tensor, s: float, width: int = WIDTH) -> float:
    """Return what least-norm edits for other items cost in truth, against the least that they could, in nats."""
    truth = torch.logspace(0, -3, width, dtype=torch.float64)
    inverse = torch.linalg.inv(moment + s * moment.diagonal().mean() * torch.eye(width, dtype=torch.float64))
    costs = []
    for key in drawn(50, seed=99, width=width):
        move = inverse @ key / (key @ inverse @ key)
        costs.append(float((move.square() * truth).sum() * (key.square() / truth).sum()))
    return sum(math.log(cost) for cost in costs) / len(costs)


@pytest.mark.parametrize("n", [12, 30, 100, 1000, 30000])
def test_the_estimate_costs_hardly_more_than_the_best(n: int):
    layer = nn.Linear(WIDTH, 2, bias=False).double()
    moments = second_moments(layer, drawn(n))
    second = (moments.layers["weight"].total[0] / n)[:-1, :-1]
    chosen = moments.metric().layers["weight"].shrinkage
    best = min(spent(second, s) for s in torch.logspace(-5, 1, 25).tolist())
    assert spent(second, chosen) <= best + 0.15
    if n == 12:
        assert spent(second, 0.001) > spent(second, chosen) + 0.2  # what was used whatever the data


def test_little_data_make_a_careful_metric_and_more_a_sharper_one():
    layer = nn.Linear(WIDTH, 2).double()
    found = [second_moments(layer, drawn(n)).metric().layers["weight"].shrinkage for n in (10, 100, 1000, 100000)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.05
    assert found[-1] < 0.001
    assert second_moments(layer, drawn(1)).metric().layers["weight"].shrinkage == 1.0  # nothing to hold out


def test_it_is_the_same_of_shards_batches_and_orders(tmp_path: Path):
    layer, x = nn.Linear(WIDTH, 2).double(), drawn(101)
    whole = second_moments(layer, x)
    shards = second_moments(layer, x[:37]) + second_moments(layer, [x[37:60], x[60:]], batch_size=7)
    turned = second_moments(layer, x.flip(0), batch_size=10)
    whole.save(tmp_path / "m.safetensors")
    for other in (shards, turned, Moments.load(tmp_path / "m.safetensors", layer)):
        one, two = (moments.layers["weight"] for moments in (whole, other))
        assert two.half.count == one.half.count
        assert torch.allclose(two.half.total, one.half.total, rtol=1e-10, atol=1e-12)
        assert repr(other.metric()) == repr(whole.metric())
    assert 30 < whole.layers["weight"].half.count < 71


def test_the_same_items_again_are_no_more_data():
    layer, x = nn.Linear(WIDTH, 2).double(), drawn(30)
    once, often = (second_moments(layer, items).metric().layers["weight"].shrinkage for items in (x, x.repeat(20, 1)))
    assert often == once


def test_positions_of_an_item_are_on_one_side_wherever_the_items_are():
    """Layers that hold the items on another dimension than the first are halved all the same."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.movedim(0, 1)).movedim(1, 0)

    torch.manual_seed(0)
    model, x = Turned().double(), drawn(20 * 6, width=4).view(20, 6, 4)
    turned, plain = second_moments(model, x).layers["inner.weight"], second_moments(model.inner, x).layers["weight"]
    assert torch.allclose(turned.half.total, plain.half.total)
    assert turned.half.count % 6 == 0
    mask = torch.arange(6).expand(20, 6) < 4
    half = second_moments(model.inner, Locality(x, mask)).layers["weight"].half
    assert half.count % 4 == 0
    assert 0 < half.count < 80


def test_parts_that_are_no_rows_leave_a_batch_whole():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.inner(x + shift.sum())

    found = second_moments(Shifted().double(), [(drawn(20, width=4), drawn(3, width=4))]).layers["inner.weight"]
    assert found.count == 20
    assert found.half is None or found.half.count == 20


def test_directions_that_no_item_has_say_nothing():
    """A unit that is always 0 would else ask for no shrinkage at all, as would one that doubles another."""
    one, two = (drawn(20, seed=seed).T @ drawn(20, seed=seed) for seed in (0, 1))
    wider = nn.functional.pad(torch.stack([one, two]), (0, 8, 0, 8))
    turn = torch.linalg.qr(drawn(WIDTH + 8, width=WIDTH + 8)).Q
    share = (WIDTH + 8) / WIDTH  # the mean eigenvalue is over all directions
    for moments in (wider, turn @ wider @ turn.T):
        assert held_out(*moments[:, None]) == pytest.approx(share * held_out(one[None], two[None]), rel=0.3)
    assert 1e-6 < held_out(torch.zeros(1, 3, 3).double(), torch.zeros(1, 3, 3).double()) < 10


def test_of_wide_layers_the_squared_error_decides(monkeypatch: pytest.MonkeyPatch):
    """Against the ρ with the least true error, which takes the true moment to know."""
    monkeypatch.setattr(shrinkage, "_WIDEST", 0)
    truth, layer = torch.logspace(0, -3, WIDTH, dtype=torch.float64).diag(), nn.Linear(WIDTH, 2).double()
    found, best = [], []
    for seed in range(20):
        x = drawn(30, seed=seed)
        found.append(second_moments(layer, x).metric().layers["weight"].shrinkage)
        second = x.T @ x / len(x)
        away = second.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64) - second
        best.append(float((away * (truth - second)).sum() / away.square().sum()))
    rho = sum(s / (1 + s) for s in found) / 20
    assert rho == pytest.approx(sum(best) / 20, rel=0.5)
    same = torch.eye(3, dtype=torch.float64)[None]
    assert ledoit_wolf(same, same, 0.5) == pytest.approx(5e-6, rel=0.01)  # halves that agree


def test_the_estimate_is_told_and_a_number_overrides_it():
    model = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    moments = second_moments(model, drawn(60))
    metric = moments.metric()
    low, high = sorted(layer.shrinkage for layer in metric.layers.values())
    assert f"shrinkage={low:.2g} to {high:.2g}" in repr(metric)
    assert "shrinkage=0.3>" in repr(moments.metric(0.3))
    assert {layer.shrinkage for layer in moments.metric(0.3).layers.values()} == {0.3}


def test_halves_that_do_not_fit_are_refused(tmp_path: Path):
    moments = second_moments(nn.Linear(3, 2).double(), drawn(20, width=3))
    path, bad = tmp_path / "m.safetensors", tmp_path / "bad.safetensors"
    moments.save(path)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    tensors = load_file(path)
    for half in (tensors["weight.half"][:, :2, :2], tensors["weight.half"] * torch.nan):
        save_file({**tensors, "weight.half": half.contiguous()}, bad, facts)
        with pytest.raises(InvalidInput, match="cannot be read"):
            Moments.load(bad)


def test_positions_that_are_all_in_one_half_tell_nothing_whichever_half_it_is():
    model, x = nn.Sequential(nn.Linear(WIDTH, 3)).double(), drawn(8)
    for row in range(8):
        mask = torch.arange(8) == row
        moments = second_moments(model, Locality(x, mask=mask), parameters="*weight")
        assert shrinkage.estimated(moments.layers["0.weight"]) == shrinkage.UNKNOWN
