"""What an edit says of the rest is true in the corners too: the demand's own input, masks, halves, rare randomness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import weightpatch as wp
from weightpatch import Locality, Result
from weightpatch.constraints import Classified, Kept, Tagged, restored
from weightpatch.editors import Auto, Budget, MinimumNorm, RMSProp
from weightpatch.errors import InvalidInput, NonFinite
from weightpatch.likelihoods import Bernoulli, Categorical, Gaussian, Of
from weightpatch.records import Record

X = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))


def mlp(out: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, out)).eval()


def other(model: nn.Module, x: Tensor) -> Classified:
    return Classified(x, (model(x).argmax(1) + 1) % 4, 0.1)


def test_the_demands_own_input_is_in_no_figure():
    model = mlp()
    found = wp.edit(model, other(model, X[:1]), keep=Locality(X[:2]))
    assert (found.result, found.kept.items, found.kept.changed) == (Result.satisfied, 1, 0)
    assert found.patch.manifest.metrics["kept"]["items"] == 1
    assert wp.edit(model, other(model, X[:1]), keep=Locality(X[:1])).kept is None
    judged = wp.edit(
        model, other(model, X[:1]), Auto(budget=Budget(changed=0.0)), keep=Locality(X[100:300], judge=Locality(X[:100]))
    )
    assert (judged.result, judged.held_out.items) == (Result.satisfied, 99)


@dataclass
class Answer:
    classes: Tensor
    value: Tensor


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.classes, self.value = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Answer:
        h = torch.relu(self.trunk(x))
        return Answer(self.classes(h), self.value(h))


def test_the_drift_of_several_outputs_is_the_sum_of_their_means():
    model, others = Two().eval(), X[20:23]
    fix = Classified(X[:1], (model(X[:1]).classes.argmax(1) + 1) % 4, 0.1, output="classes")
    keep = Locality(X[1:20], likelihood=Categorical(), output="classes") & Locality(
        others, likelihood=Gaussian(1.0, 0.05), output="value"
    )
    found = wp.edit(model, fix, RMSProp(lr=1e-2), keep=keep)
    with torch.no_grad():
        p, before = model(X[1:20]).classes.softmax(1), model(others).value
        with found.patch.applied(model):
            q, after = model(X[1:20]).classes.softmax(1), model(others).value
    true = float((p * (p / q).log()).sum(1).mean() + (after - before).square().sum(1).mean() / 2)
    assert found.kept.drift == pytest.approx(true, rel=1e-4)
    untouched = wp.edit(model, fix, RMSProp(lr=1e-2), keep=keep, parameters="classes.*")
    assert untouched.kept.drift < 1


def test_items_of_which_nothing_is_asked_are_not_asked_alone():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 5)).eval()
    x, labels = torch.arange(12).view(3, 4), torch.full((3, 4), -100)
    labels[1, 2] = (model(x[1:2])[0, 2].argmax() + 1) % 5
    assert wp.edit(model, Classified(x, labels, 0.1)).result is Result.satisfied
    on = torch.zeros(3, 6, dtype=torch.bool)
    on[1, 2] = True
    assert wp.edit(mlp(6), Tagged(X[:3], on=on, margin=0.1)).result.held


class Rare(nn.Module):
    """One pass in twenty answers otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z if torch.rand(()) > 0.05 else z.flip(1)


@pytest.mark.filterwarnings("ignore:Rare is run in full passes")
def test_draws_that_seldom_matter_are_seen():
    model, found = Rare().eval(), []
    for seed in range(5):
        torch.manual_seed(seed)
        found.append(wp.edit(model, other(model.net, X[:1])))
    assert all(one.reality.draws == 32 for one in found)
    assert sum(one.result is Result.unreliable for one in found) >= 2


class OverTheBatch(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + 0.3 * x.mean(0))


def test_items_that_depend_on_each_other_are_seen_in_half_precision():
    x, false = X[:7].bfloat16(), 0
    for seed in range(4):
        model = OverTheBatch(seed).eval().bfloat16()
        fix = other(model, x)
        found = wp.edit(model, fix, RMSProp(lr=1e-2, max_steps=300))
        with torch.no_grad(), found.patch.applied(model):
            alone = sum(int(model(x[i : i + 1]).argmax(1)) == int(fix.labels[i]) for i in range(7))
        false += alone < 7
        assert (found.result is Result.satisfied) <= (alone == 7)
    assert false > 0


def test_masks_of_tags_have_the_shape_of_the_output():
    model, x = nn.Conv2d(1, 4, 3, padding=1).eval(), torch.randn(3, 1, 4, 4)  # as many tags as rows and columns
    on = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    on[0, 2, 1, 3] = True
    fix = Tagged(x[:1], on=on, margin=5.0, likelihood=Bernoulli(Of.logits))
    assert float(fix.violation(model)) == pytest.approx(5.0 - float(model(x[:1])[0, 2, 1, 3]))
    bound = fix.bind(model)
    assert torch.equal(bound.on, on)
    assert torch.equal(bound.bind(model).violation(model), fix.violation(model))
    kept = Kept(x, likelihood=Bernoulli(Of.logits)).bind(model)
    assert torch.equal(kept.on, model(x) > 0)


class Partly(nn.Module):
    """Answers some inputs with NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).masked_fill(x[:, :1] > 3.5, torch.nan)


@pytest.mark.parametrize("editor", [None, RMSProp(lr=1e-2)], ids=["Auto", "RMSProp"])
def test_kept_items_without_a_finite_answer_are_refused(editor: Any):
    model, x = Partly().eval(), X[:150].clone()
    x[30, 0] = 4
    with pytest.raises(NonFinite, match="NaN or infinity"):
        wp.edit(model, other(model, X[:1]), editor, keep=Locality(x[1:]))


class Pair(NamedTuple):
    x: Tensor
    prior: Tensor


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, pair: Pair) -> Tensor:
        return self.net(pair.x) + pair.prior


def test_what_would_not_come_back_from_a_file_is_not_written():
    model = OfPairs().eval()
    first = Classified({"pair": Pair(X[:1], torch.zeros(1, 4))}, torch.tensor([2]), 0.1)
    with pytest.warns(UserWarning, match="its inputs hold a Pair, which a patch file cannot hold"):
        found = wp.edit(model, first, MinimumNorm())
    assert found.patch.demands == ()
    with pytest.raises(InvalidInput, match="its inputs hold a dict"):
        Classified({"x": {1: X[:1]}}, torch.tensor([1])).record()


@pytest.mark.parametrize("nested", [[], 3, None, "map", {"map": []}, {"tuple": 1}, {"tensor": []}])
def test_any_damaged_record_is_named(nested: Any):
    record = Classified(X[:1], torch.tensor([1])).record()
    damaged = Record(record.kind, record.version, record.tensors, {**record.scalars, "inputs": nested})
    with pytest.raises(InvalidInput, match="weightpatch/classified 1 cannot be read"):
        restored(damaged)
