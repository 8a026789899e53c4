"""Patches carry their demands, and later edits keep to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weightpatch as wp
from weightpatch.constraints import Classified, Kept, Within, restored
from weightpatch.editing import Result
from weightpatch.editors import Adam, Auto, Budget, MinimumNorm
from weightpatch.errors import ConflictingConstraints, InvalidInput
from weightpatch.patches import Demand, applied, base_fingerprint
from weightpatch.records import Record
from weightpatch.tasks import images

TEST = images.fashion_test()


def wrong(index: int, margin: float = 0.1) -> Classified:
    return Classified(TEST.images[index : index + 1], (TEST.labels[index : index + 1] + 3) % 10, margin)


def test_demands_survive_the_file_and_change_nothing(tmp_path):
    model = images.fashion_classifier()
    fix = wrong(0) & Kept(TEST.images[5:8], 0.01)
    found = wp.edit(model, fix, MinimumNorm(), parameters="fc.*").raise_for_result()
    found.patch.save(tmp_path / "one.patch.safetensors")
    patch = wp.Patch.load(tmp_path / "one.patch.safetensors")
    assert patch == found.patch
    records = [demand.record for demand in patch.demands]
    assert [(record.kind, record.version) for record in records] == [("weightpatch/classified", 1)] * 2
    asked = [restored(record) for record in records]
    assert [part.margin for part in asked] == [0.1, 0.01]
    assert torch.equal(asked[0].inputs, TEST.images[:1])
    assert torch.equal(asked[1].labels, model(TEST.images[5:8]).argmax(1))
    first, second = patch.demands
    assert first.before == pytest.approx(float(wrong(0).violation(model).detach()), abs=1e-6)
    assert first.before > 0 >= second.before
    with patch.applied(model):
        assert first.after == pytest.approx(float(wrong(0).violation(model).detach()), abs=1e-6)
    assert max(first.after, second.after) == found.violation <= 0
    plain = wp.edit(model, fix, MinimumNorm(), parameters="fc.*", remember=False).patch
    assert plain.demands == ()
    assert plain.nbytes == patch.nbytes
    own = dict(model.state_dict())
    assert all(torch.equal(value, patch.result(own)[name]) for name, value in plain.result(own).items())


def test_a_later_edit_keeps_to_earlier_demands_and_without_memory_it_need_not():
    kept, lost = [], []
    for remember, held in ((True, kept), (False, lost)):
        model, made = images.fashion_classifier(), []
        for index in range(12):
            fix = wrong(index, 0.01)
            found = wp.edit(model, fix, MinimumNorm(), parameters="fc.*", remember=remember)
            assert found.result in (Result.satisfied, Result.already_satisfied)
            found.patch.apply(model)
            made.append(fix)
        held += [fix.satisfied(model) for fix in made]
    assert all(kept)
    assert not all(lost)


def test_a_demand_that_contradicts_an_earlier_one_is_named():
    model = images.fashion_classifier()
    found = wp.edit(model, wrong(0), MinimumNorm(), parameters="fc.*").raise_for_result()
    other = Classified(TEST.images[:1], TEST.labels[:1], 0.1)
    with found.patch.applied(model):
        with pytest.raises(ConflictingConstraints, match="ask the same input to be class"):
            wp.edit(model, other, MinimumNorm(), parameters="fc.*")
        assert wp.edit(model, other, MinimumNorm(), parameters="fc.*", remember=False).result is Result.satisfied
    assert wp.edit(model, other, MinimumNorm(), parameters="fc.*").result is Result.already_satisfied


def test_one_budget_serves_all_patches_and_once_it_is_spent_edits_are_gates():
    model, keep = images.fashion_classifier(), wp.Locality(TEST.images[1000:1500])
    before = model(keep.inputs).argmax(1)
    auto, fixes, last = Auto(budget=Budget(changed=0.008, seconds=5)), [], []
    for index in range(6):
        fixes.append(wrong(index))
        found = wp.edit(model, fixes[-1], auto, keep=keep, parameters="fc.*").raise_for_result()
        found.patch.apply(model)
        last.append(found.attempts[-1].name)
        changed = float((model(keep.inputs).argmax(1) != before).double().mean())
        taken = found.attempts[-1]
        assert (taken.kept + taken.held_out).share == pytest.approx(changed)
        assert changed <= 0.008
    assert all(fix.satisfied(model) for fix in fixes)
    assert last[-1] == "gate at fc"
    for patch in reversed(applied(model)):
        patch.revert(model)
    assert torch.equal(model(keep.inputs).argmax(1), before)


def test_regression_demands_and_what_a_patch_cannot_hold():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    near = Within(x, torch.zeros(4, 2).double(), 0.01)
    patch = wp.edit(model, near, Adam(lr=0.05, max_steps=500)).raise_for_result().patch
    record = patch.demands[0].record
    assert (record.kind, restored(record).tolerance) == ("weightpatch/within", 0.01)
    assert patch.manifest.unrecorded == ()
    assert wp.Patch.from_bytes(patch.to_bytes()) == patch


def test_a_demand_that_no_file_can_hold_is_named_and_the_patch_is_made_all_the_same():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    own = Classified(x, model(x).argmin(1), 0.1, output=lambda answer: answer)
    with pytest.warns(UserWarning, match="does not remember its demand Classified"):
        patch = wp.edit(model, own, MinimumNorm()).raise_for_result().patch
    assert patch.demands == ()
    (left,) = patch.manifest.unrecorded
    assert left.kind == "Classified"
    assert "a function selects its output" in left.reason
    assert wp.Patch.from_bytes(patch.to_bytes()).manifest.unrecorded == (left,)


def test_records_of_other_kinds_are_left_alone_and_broken_ones_of_ours_are_named():
    model, x = nn.Linear(3, 2), torch.ones(1, 3)
    fix = Classified(x, model(x).argmin(1), 0.1)
    for kind, version in (("alice/tone", 1), ("weightpatch/classified", 2)):
        other = Record(kind, version, {"inputs": x})
        with patch_with(model, Demand(other)).applied(model):
            assert wp.edit(model, fix, MinimumNorm()).result is Result.satisfied
    broken = Record("weightpatch/classified", 1, {"inputs": x}, {"margin": 0.1})
    with (
        patch_with(model, Demand(broken)).applied(model),
        pytest.raises(InvalidInput, match="weightpatch/classified 1 cannot be read"),
    ):
        wp.edit(model, fix, MinimumNorm())


def patch_with(model: nn.Module, demand: Demand) -> wp.Patch:
    return wp.Patch.between({}, {}, fingerprint=base_fingerprint(model), demands=(demand,))
