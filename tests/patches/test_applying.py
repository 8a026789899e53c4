from __future__ import annotations

import copy
import io
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from patch_cases import DTYPES, NAMES, Net, change, changes, dtypes, patch_for, same_bits, snapshot, unchanged
from torch import nn

from weightpatch.errors import BaseMismatch, InvalidInput, NotEditable, PatchConflict, PatchDamaged
from weightpatch.patches import (
    Full,
    LowRank,
    Manifest,
    Patch,
    applied,
    applying,
    base_fingerprint,
    compose,
    fingerprint,
)


@settings(max_examples=150)
@given(dtypes, changes, st.integers(0, 2**20))
def test_reverting_gives_the_same_bits(dtype, kinds, seed):
    model = Net(seed, dtype)
    before, mark = snapshot(model), fingerprint(model)
    patch = patch_for(model, seed, kinds)
    patch.apply(model)
    assert applied(model) == (patch,)
    assert base_fingerprint(model) == mark
    assert unchanged(model, compose(before, [patch]))
    Patch.from_bytes(patch.to_bytes()).revert(model)
    assert unchanged(model, before)
    assert applied(model) == ()
    assert applying._ATTRIBUTE not in vars(model)


@settings(max_examples=25, stateful_step_count=12)
class Histories(RuleBasedStateMachine):
    """Any history of applying and reverting, refused steps included: the weights are those of the set of patches."""

    @initialize(dtype=dtypes, seed=st.integers(0, 2**20))
    def start(self, dtype, seed):
        self.model = Net(seed, dtype)
        self.base = snapshot(self.model)
        self.made: list[Patch] = []

    @rule(kinds=changes, seed=st.integers(0, 2**20))
    def make(self, kinds, seed):
        self.made.append(patch_for(self.model, seed, kinds))

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def apply(self, data):
        patch = data.draw(st.sampled_from(self.made))
        on = {p.id for p in applied(self.model)}
        if patch.id in on or not set(patch.manifest.requires) <= on:
            with pytest.raises(PatchConflict):
                patch.apply(self.model)
        else:
            patch.apply(self.model)

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def revert(self, data):
        patch = data.draw(st.sampled_from(self.made))
        on = applied(self.model)
        if patch not in on or any(patch.id in p.manifest.requires for p in on):
            with pytest.raises(PatchConflict):
                patch.revert(self.model)
        else:
            patch.revert(self.model)

    @invariant()
    def weights_follow_from_the_set(self):
        if hasattr(self, "model"):
            assert unchanged(self.model, compose(self.base, applied(self.model)))


TestHistories = Histories.TestCase


def test_the_with_block_takes_the_patch_off_again_also_after_an_error():
    model = Net()
    before = snapshot(model)
    patch = patch_for(model, 0, {"cube": "all"})
    with patch.applied(model) as patched:
        assert patched is model
        assert applied(model) == (patch,)
    assert unchanged(model, before)
    with pytest.raises(ZeroDivisionError), patch.applied(model):
        _ = 1 / 0
    assert unchanged(model, before)


def test_nothing_but_the_values_changes():
    model = Net().train()
    model.head.eval()
    model.cube.requires_grad_(False)
    model.gain.grad = torch.ones(())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    places = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)}
    state, keys = torch.get_rng_state(), list(model.state_dict())
    patch = patch_for(model, 0, {"table.weight": "all", "cube": "row"})
    patch.apply(model)
    assert places == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)}
    assert model.head.weight is model.table.weight
    assert (model.training, model.head.training, model.cube.requires_grad, model.gain.requires_grad) == (
        True,
        False,
        False,
        True,
    )
    assert model.gain.grad is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    patch.revert(model)
    assert places == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)}


def test_copies_of_a_patched_model_can_be_reverted_on_their_own():
    model = Net()
    before = snapshot(model)
    patch = patch_for(model, 0, {"cube": "all", "table.weight": "row"})
    patch.apply(model)
    twin = copy.deepcopy(model)
    patch.revert(model)
    assert applied(twin) == (patch,)
    assert not torch.equal(twin.cube, model.cube)
    patch.revert(twin)
    assert unchanged(twin, before)
    assert unchanged(model, before)


def test_a_patched_model_can_be_saved_whole():
    model = Net()
    before = snapshot(model)
    patch = patch_for(model, 0, {"cube": "outer"})
    patch.apply(model)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    patch.revert(again)
    assert unchanged(again, before)


def test_tied_names_are_one_tensor():
    model = Net()
    own = dict(model.state_dict())
    new = change(own["head.weight"], 0, "all")
    patch = Patch.between(own, {"head.weight": new}, fingerprint=fingerprint(model))
    patch.apply(model)
    assert same_bits(model.table.weight.detach(), new)
    other = Patch.between(
        dict(model.state_dict()),
        {"table.weight": own["table.weight"]},
        fingerprint=base_fingerprint(model),
        requires=(patch.id,),
    )
    other.apply(model)
    assert torch.equal(model.head.weight, own["head.weight"])
    other.revert(model)
    patch.revert(model)
    assert unchanged(model, own)
    assert patch == Patch.between(own, {"head.weight": new, "table.weight": new}, fingerprint=fingerprint(model))
    with pytest.raises(InvalidInput, match="one tensor"):
        Patch.between(own, {"head.weight": new, "table.weight": new + 1}, fingerprint=fingerprint(model))
    apart = {name: tensor.clone() for name, tensor in own.items()}
    both = Patch.between(apart, {"head.weight": new, "table.weight": new}, fingerprint=fingerprint(model))
    with pytest.raises(PatchConflict, match="under two names"):
        both.apply(model)
    assert unchanged(model, own)


def test_a_tie_that_copies_have_lost_is_patched_under_all_its_names():
    model = Net()
    own = snapshot(model)
    patch = Patch.between(own, {"head.weight": own["head.weight"] + 1}, fingerprint=fingerprint(model), exact=True)
    assert patch.manifest.tensors[0].names == ("head.weight", "table.weight")
    loose = Net()
    loose.head.weight = nn.Parameter(loose.head.weight.detach().clone())
    patch.apply(loose)
    assert torch.equal(loose.table.weight, own["table.weight"] + 1)
    assert torch.equal(loose.head.weight, own["head.weight"] + 1)
    patch.revert(loose)
    assert unchanged(loose, own)
    found = compose({name: tensor.clone() for name, tensor in own.items()}, [patch])
    assert torch.equal(found["table.weight"], own["table.weight"] + 1)
    assert torch.equal(found["head.weight"], own["head.weight"] + 1)


def variants(model: Net) -> dict[str, nn.Module]:
    """Models that are almost the one a patch was made for."""
    found = {name: copy.deepcopy(model) for name in ("value", "elsewhere", "buffer", "shape", "missing", "more")}
    with torch.no_grad():
        found["value"].cube.view(-1)[5].add_(1e-6)
        found["elsewhere"].gain.add_(1e-6)
        found["buffer"].norm.num_batches_tracked.add_(1)
    found["shape"].cube = nn.Parameter(model.cube.detach().transpose(0, 1).contiguous())
    del found["missing"].cube
    found["more"].register_buffer("extra", torch.zeros(1))
    found["dtype"] = copy.deepcopy(model).half()
    return found


@pytest.mark.parametrize(
    ("kind", "words"),
    {
        "value": "'cube' has other values",
        "elsewhere": "others differ",
        "buffer": "others differ",
        "shape": r"'cube' has shape \(4, 3, 2\); expected \(3, 4, 2\)",
        "missing": "'cube' is missing",
        "more": "others differ",
        "dtype": "'cube' is float16; expected float32",
    }.items(),
)
def test_other_weights_are_refused_and_named(kind, words):
    model = Net()
    patch = patch_for(model, 0, {"cube": "all"})
    other = variants(model)[kind]
    before = snapshot(other)
    with pytest.raises(BaseMismatch, match=words):
        patch.apply(other)
    assert unchanged(other, before)
    assert not applied(other)


def test_conflicts_are_refused_with_the_model_untouched():
    model = Net()
    one = patch_for(model, 0, {"cube": "all"})
    with pytest.raises(PatchConflict, match="not applied here; applied are: none"):
        one.revert(model)
    one.apply(model)
    two = patch_for(model, 1, {"gain": "all"})
    two.apply(model)
    before = snapshot(model)
    with pytest.raises(PatchConflict, match="applied already"):
        one.apply(model)
    with pytest.raises(PatchConflict, match=f"required by {two.id[:12]}"):
        one.revert(model)
    assert unchanged(model, before)
    assert set(applied(model)) == {one, two}
    other = Net()
    with pytest.raises(PatchConflict, match=f"requires {one.id[:12]}"):
        two.apply(other)


def train(model):
    torch.optim.SGD(model.parameters(), lr=0.1).step() if model.cube.grad is not None else None
    loss = model.cube.square().sum() + model.gain.square()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "meddle",
    [
        train,
        lambda model: model.load_state_dict(Net(9).state_dict()),
        lambda model: model.gain.data.add_(1),
        lambda model: model.norm(torch.randn(4, 3)),
        lambda model: model.half(),
        lambda model: delattr(model, "gain"),
    ],
)
def test_weights_that_changed_since_are_noticed(meddle):
    model = Net()
    patch = patch_for(model, 0, {"cube": "few"})
    other = patch_for(model, 1, {"mean": "all"})
    patch.apply(model)
    meddle(model)
    before = snapshot(model)
    for act in (lambda: patch.revert(model), lambda: other.apply(model)):
        with pytest.raises(BaseMismatch, match="have changed since"):
            act()
    assert unchanged(model, before)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize("reverting", [False, True])
def test_a_fault_between_writes_puts_everything_back(monkeypatch, fault, at, reverting):
    model = Net()
    patch = patch_for(model, 0, {"cube": "all", "gain": "all", "table.weight": "row"})
    if reverting:
        patch.apply(model)
    before, on = snapshot(model), applied(model)
    count, put, remember = iter(range(100)), applying._put, applying._remember

    def faulty(real):
        def act(*args):
            number = next(count)
            if number == at and number < 3:
                raise fault
            real(*args)
            if number == at:
                raise fault

        return act

    monkeypatch.setattr(applying, "_put", faulty(put))
    monkeypatch.setattr(applying, "_remember", faulty(remember))
    with pytest.raises(fault):
        patch.revert(model) if reverting else patch.apply(model)
    assert unchanged(model, before)
    assert applied(model) == on


def test_models_without_values_are_refused():
    model = Net()
    patch = patch_for(model, 0, {"cube": "all"})
    with pytest.raises(NotEditable):
        patch.apply(copy.deepcopy(model).to("meta"))


def forged(model: Net, **entry: object) -> Patch:
    """A patch with the right base that was not made by `between`."""
    honest = patch_for(model, 0, {"cube": "all"}, exact=True)
    (old,) = honest.manifest.tensors
    new = replace(old, **entry)
    values = honest.operations["cube"].values
    operation = Full(values if new.shape == old.shape else torch.zeros(new.shape))
    return Patch.from_bytes(Patch({new.name: operation}, Manifest(honest.manifest.base, tensors=(new,))).to_bytes())


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"name": "nothing"}, BaseMismatch),
        ({"name": "gain"}, BaseMismatch),
        ({"shape": (24,)}, BaseMismatch),
        ({"pre": "0" * 64}, BaseMismatch),
        ({"post": "0" * 64}, PatchDamaged),
    ],
)
def test_forged_manifests_are_refused_with_the_model_untouched(entry, error):
    model = Net()
    before = snapshot(model)
    with pytest.raises(error):
        forged(model, **entry).apply(model)
    assert unchanged(model, before)


def test_a_forged_patch_on_top_of_another_is_refused():
    model = Net()
    one = patch_for(model, 0, {"cube": "all"})
    one.apply(model)
    before = snapshot(model)
    two = patch_for(model, 1, {"cube": "all"}, exact=True)
    (old,) = two.manifest.tensors
    wrong = replace(two, manifest=replace(two.manifest, tensors=(replace(old, pre="0" * 64),)))
    with pytest.raises(BaseMismatch, match="other values of 'cube'"):
        wrong.apply(model)
    assert unchanged(model, before)
    assert applied(model) == (one,)


def test_forged_factors_that_overflow_are_refused():
    model = Net()
    before = snapshot(model)
    honest = patch_for(model, 0, {"table.weight": "all"})
    (old,) = honest.manifest.tensors
    entry = type(old)(old.name, "lowrank", old.shape, old.dtype, old.pre, old.post)
    big = LowRank(torch.full((6, 1), 3e38), torch.full((1, 4), 3e38))
    patch = Patch({old.name: big}, Manifest(honest.manifest.base, tensors=(entry,)))
    with pytest.raises(PatchConflict, match="out of its type's range"):
        patch.apply(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_patches_come_off_in_any_order(dtype):
    model = Net(1, dtype)
    before = snapshot(model)
    patches = [
        patch_for(model, seed, {NAMES[seed % 5]: "all", NAMES[(seed + 2) % 5]: "few"}) for seed in range(0, 80, 8)
    ]
    draw = torch.Generator().manual_seed(0)
    for number in torch.randperm(10, generator=draw).tolist():
        patches[number].apply(model)
    assert unchanged(model, compose(before, patches))
    for number in torch.randperm(10, generator=draw).tolist():
        patches[number].revert(model)
    assert unchanged(model, before)
