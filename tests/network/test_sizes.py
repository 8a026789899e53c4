"""Modules that are told sizes as plain numbers, as the position embeddings of translators are."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weightpatch.constraints import Classified
from weightpatch.editors import GradientDescent
from weightpatch.locality import Locality
from weightpatch.network import Network
from weightpatch.training import EditableObjective


class Positions(nn.Module):
    """Told (items, length), and a number that is no size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 6))
        self.calls = 0

    def forward(self, shape: tuple[int, int], start: int) -> torch.Tensor:
        self.calls += 1
        return self.table[start : start + shape[1]]


class Told(nn.Module):
    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.positions, self.out, self.start = Positions(), nn.Linear(6, 4), start

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = self.positions(tuple(x.shape[:2]), self.start)
        return self.out((x + at).mean(1))


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_one_plan_serves_batches_of_all_sizes():
    model = Told()
    network = Network(model, "out.*")
    params = {name: value + 1 for name, value in network.start.items()}
    for items, length in ((2, 3), (5, 3), (5, 7), (4, 4), (7, 5), (1, 1)):
        x = torch.randn(items, length, 6)
        for _ in range(2):
            torch.testing.assert_close(network.at(params)(x), network.full(params)(x))
    assert not network.full_passes_because
    assert network._replayer._learnt <= 2  # (4, 4) cannot tell its sizes apart; no other needs a plan of its own


def test_another_constant_is_another_call():
    model = Told()
    network = Network(model, "out.*")
    x = torch.randn(3, 4, 6)
    network.before(x)
    clone = network._replayer._model
    clone.start = 2  # no size of the inputs: what was recorded for 0 must not be handed back
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(network.before(torch.randn(3, 4, 6) * 0 + x), network.full(network.start)(x))


@pytest.mark.parametrize("length", [3, 8])
def test_parts_of_a_recorded_batch_replay(length):
    """Of 8 items of length 8 a number cannot tell which of both it is."""
    torch.manual_seed(0)
    model, x, y = Told().double(), torch.randn(8, length, 6, dtype=torch.float64), torch.randint(4, (8,))
    edits = [Classified(torch.randn(1, length, 6, dtype=torch.float64), torch.tensor([1])) for _ in range(2)]
    found = []
    for replay in (True, False):
        objective = EditableObjective(
            model, GradientDescent(lr=0.1, max_steps=3), parameters="out.*", base_loss=F.cross_entropy, replay=replay
        )
        model.zero_grad()
        objective(edits, Locality(x), batch=(x, y)).backward()
        assert not objective._network.full_passes_because or not replay
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
