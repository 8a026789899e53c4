"""Gates as edits: always reliable, and nothing outside of a ball."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified, altered
from weightpatch.editing import Result, solve
from weightpatch.editors import Gate
from weightpatch.errors import InvalidInput
from weightpatch.preparing import prepared
from weightpatch.tasks import images


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)).eval()


def other_class(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argsort(1, descending=True)[:, 1]


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_a_gate_holds_and_leaves_everything_else_bit_for_bit(layer: str):
    model, x, kept = net(), torch.randn(5, 6), torch.randn(200, 6)
    fix = Classified(x, other_class(model, x), 0.1)
    editor, _, network = prepared(model, "*", Gate(layer), None)
    found = solve(network, fix, editor, wp.Locality(kept))
    assert found.result is Result.satisfied
    assert found.drift == 0
    params = found.params
    assert all(torch.equal(value, network.start[name]) for name, value in params.items() if ".gate." not in name)
    assert torch.equal(network.full(params)(kept), model(kept))
    radii = params[f"{layer}.gate.radii"]
    assert int((radii >= 0).sum()) == 5


def test_the_radius_is_a_share_of_the_way_to_what_stays():
    model, kept = net(), torch.randn(50, 6)
    x = torch.randn(1, 6)
    fix = Classified(x, other_class(model, x))
    for share in (0.2, 0.9):
        editor, _, network = prepared(model, "*", Gate("0", share=share), None)
        keep = wp.Locality(torch.cat([kept, x]), judge=wp.Locality(kept + 100))  # itself does not count
        params = solve(network, fix, editor, keep).params
        nearest = float((kept - x).norm(dim=1).min())
        assert float(params["0.gate.radii"].max()) == pytest.approx(share * nearest, rel=1e-5)
        way = kept[(kept - x).norm(dim=1).argmin()] - x[0]
        for step, inside in ((share * 0.99, True), (share * 1.01, False)):
            there = x + step * way
            assert torch.equal(network.full(params)(there), model(there)) is not inside


def test_what_is_kept_is_looked_at_once_for_many_edits_and_again_when_it_or_the_start_is_another():
    model, kept = net(), torch.randn(50, 6)
    _, _, network = prepared(model, "*", Gate("2"), None)
    first = network.given("2", kept)
    assert torch.allclose(first, model[1](model[0](kept)))
    assert network.given("2", kept) is first
    start = {name: value + 0.1 * (name == "0.weight") for name, value in network.start.items()}
    moved = network.restarted(start)
    assert not torch.allclose(moved.given("2", kept), first) and network.given("2", kept) is first
    kept += 1
    assert torch.allclose(network.given("2", kept), model[1](model[0](kept)))


def test_without_anything_that_stays_the_ball_holds_the_input_alone():
    model, x = net(), torch.randn(1, 6)
    editor, _, network = prepared(model, "*", Gate("0"), None)
    params = solve(network, Classified(x, other_class(model, x)), editor).params
    near = x + 1e-3
    assert torch.equal(network.full(params)(near), model(near))


def test_a_neighbour_with_the_same_demand_enlarges_the_ball_and_another_splits():
    model, kept = nn.Sequential(nn.Linear(6, 3)).eval(), torch.randn(30, 6) * 9
    x = torch.randn(1, 6)
    near, label = x + 0.3, other_class(model, x)
    keep, editor = wp.Locality(kept), Gate("0", share=0.05)
    _, _, network = prepared(model, "*", editor, None)
    first = solve(network, Classified(x, label, 2.0), editor, keep)
    network.start.update(first.params)
    assert not bool(Classified(near, label).met(network.full(network.start)))  # beyond the first ball
    wide = Gate("0", share=0.9)
    second = solve(network, Classified(near, label), wide, keep)
    assert second.result is Result.satisfied
    radii = second.params["0.gate.radii"]
    assert int((radii >= 0).sum()) == 1
    assert float(radii.max()) == pytest.approx(float((near - x).norm()), rel=1e-3)

    away = Classified(near, 3 - label - model(near).argmax(1))  # the third class
    split = solve(network, away, wide, keep)
    assert split.result is Result.satisfied
    both = network.full(split.params)
    assert bool(Classified(x, label).met(both))
    assert bool(away.met(both))
    assert float(split.params["0.gate.radii"][1]) <= float((near - x).norm()) / 2 * 1.0001


def test_demands_that_hold_are_not_given_keys_and_stay_met():
    model, x = net(), torch.randn(6, 6)
    labels = model(x).argmax(1)
    labels[0] = other_class(model, x)[0]
    _, _, network = prepared(model, "*", Gate("2"), None)
    found = solve(network, Classified(x, labels), Gate("2"), wp.Locality(torch.randn(40, 6)))
    assert found.result is Result.satisfied
    assert int((found.params["2.gate.radii"] >= 0).sum()) == 1


def test_sequences_and_half_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.AdaptiveAvgPool2d((1, 5)), nn.Flatten())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        half = model.to(dtype).eval()
        x = torch.randn(2, 7, 6, dtype=dtype)
        fix = Classified(x, half(x).argsort(1)[:, -2], 0.05)
        _, _, network = prepared(half, "*", Gate("2"), None)
        assert solve(network, fix, Gate("2"), wp.Locality(torch.randn(9, 7, 6, dtype=dtype))).result is Result.satisfied


def test_no_room_is_an_honest_failure_and_bad_settings_are_refused():
    model, x = net(), torch.randn(5, 6)
    fix = Classified(x, other_class(model, x))
    _, _, network = prepared(model, "*", Gate("0", count=4), None)
    assert solve(network, fix, Gate("0", count=4)).result is Result.stalled
    with pytest.raises(InvalidInput, match="has no slots"):
        wp.edit(model, fix, wp.editors.Shrink(Gate("0")))
    for wrong in ({"count": 0}, {"share": 1.0}, {"share": -0.1}):
        with pytest.raises(InvalidInput, match="Gate was given"):
            Gate("0", **wrong)
    with pytest.raises(InvalidInput, match="gate was asked for"):
        wp.edit(model, fix, Gate("7"))


def test_a_gate_saved_applied_and_reverted(tmp_path):
    model, test = images.fashion_classifier(), images.fashion_test()[slice(400)]
    fix = altered_too(Classified(test.images[:1], (test.labels[:1] + 3) % 10, 0.1))
    kept = test.images[100:300]
    before = model(test.images)
    found = wp.edit(model, fix, Gate("fc"), keep=wp.Locality(kept)).raise_for_result()
    assert found.patch.nbytes < 6000
    found.patch.save(tmp_path / "gate.patch.safetensors")
    patch = wp.Patch.load(tmp_path / "gate.patch.safetensors")
    with patch.applied(model):
        assert fix.satisfied(model)
        assert torch.equal(model(kept), before[100:300])
    assert torch.equal(model(test.images), before)


def altered_too(fix: Classified) -> wp.constraints.All:
    return fix & altered(fix, images.altered)


def test_a_gate_on_a_gated_model_answers_as_it_does_once_applied():
    model, test = images.fashion_classifier(), images.fashion_test()[slice(300)]
    image, keep = test.images[:1], wp.Locality(test.images[100:])
    for shift in (1, 2):  # the second asks the same input to be yet another class
        fix = Classified(image, (test.labels[:1] + shift) % 10, 0.1)
        found = wp.edit(model, fix, Gate("fc"), keep=keep, remember=False).raise_for_result()
        found.patch.apply(model)
        assert fix.satisfied(model)
        assert torch.equal(model(test.images[100:]), images.fashion_classifier()(test.images[100:]))
