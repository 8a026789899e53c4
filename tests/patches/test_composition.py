from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from patch_cases import DTYPES, KINDS, Net, change, changes, dtypes, patch_for, same_bits, snapshot, unchanged

from weightpatch.errors import BaseMismatch, PatchConflict
from weightpatch.patches import Patch, applied, base_fingerprint, compose, fingerprint
from weightpatch.patches.composition import canonical
from weightpatch.patches.rounding import rounded


def wanted(base, patches, name):
    """Slow oracle for patches that do not require each other: float64 sums in the order of ids, one rounding."""
    total = base[name].double()
    for patch in sorted(patches, key=lambda patch: patch.id):
        if (operation := patch.operations.get(name)) is None:
            continue
        if operation.kind == "lowrank":
            total = total + (operation.left.double() @ operation.right.double()).reshape(total.shape)
        else:
            total = total + (operation.on(base[name]).double() - base[name].double())
    return rounded(total, base[name].dtype)


@settings(max_examples=60)
@given(dtypes, st.lists(changes, min_size=2, max_size=4), st.integers(0, 2**20))
def test_sums_from_the_base_in_float64_with_one_rounding(dtype, kinds, seed):
    model = Net(seed, dtype)
    base = snapshot(model)
    patches = [patch_for(model, seed + 100 * number, kind) for number, kind in enumerate(kinds)]
    patches = list({patch.id: patch for patch in patches}.values())
    found = compose(base, patches)
    for name in base:
        touching = [patch for patch in patches if name in patch.operations]
        if len(touching) == 1:
            assert same_bits(found[name], touching[0].operations[name].on(base[name]))
        elif len(touching) > 1:
            expected = wanted(base, patches, name).double()
            # The order of float64 additions inside one operation is left open by the oracle: half a last bit
            assert torch.allclose(
                found[name].double(),
                expected,
                rtol=1e-15 + (dtype != torch.float64) * torch.finfo(dtype).eps,
                atol=1e-15,
            )


@settings(max_examples=40)
@given(dtypes, st.lists(changes, min_size=3, max_size=3), st.booleans(), st.booleans(), st.integers(0, 2**20))
def test_any_order_gives_the_same_weights(dtype, kinds, second_on_first, third_on_second, seed):
    """Through models and through state dicts, with and without requirements."""
    model = Net(seed, dtype)
    base = snapshot(model)
    patches = [patch_for(model, seed, kinds[0])]
    for number, on_top in ((1, second_on_first), (2, third_on_second)):
        below = patches[number - 1] if on_top else None
        needed = [] if below is None else [p for p in patches if p.id in (*below.manifest.requires, below.id)]
        for patch in needed:
            patch.apply(model)
        patches.append(patch_for(model, seed + number * 10, kinds[number]))
        for patch in reversed(needed):
            patch.revert(model)
        assert unchanged(model, base)
    if len({patch.id for patch in patches}) < 3:
        return
    expected = None
    for order in itertools.permutations(patches):
        composed = compose(base, order)
        expected = composed if expected is None else expected
        assert all(same_bits(composed[n], expected[n]) for n in base if base[n].is_floating_point())
        if all(set(p.manifest.requires) <= {q.id for q in order[:i]} for i, p in enumerate(order)):
            for patch in order:
                patch.apply(model)
            assert unchanged(model, expected)
            assert applied(model) == canonical(patches)
            for patch in reversed(order):
                patch.revert(model)
            assert unchanged(model, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", list(itertools.product(KINDS, repeat=2)))
def test_a_patch_made_after_others_gives_exactly_its_weights(dtype, kinds):
    """No rounding is left between a patch and what it was made after, however far the weights move."""
    model = Net(3, dtype)
    for number, kind in enumerate((*kinds, "all")):
        before = snapshot(model)
        new = {"cube": change(before["cube"] * 10 ** -(2 * number) + 0, number, kind)}
        patch = Patch.between(before, new, fingerprint=base_fingerprint(model), requires=ids(model), exact=True)
        patch.apply(model)
        assert same_bits(model.cube.detach(), new["cube"])


def ids(model):
    return tuple(patch.id for patch in applied(model))


def test_touching_different_numbers_leaves_each_as_it_was_wanted():
    base = {"w": torch.full((4,), 1e30)}
    mark = fingerprint(base)
    first, second = base["w"].clone(), base["w"].clone()
    first[0], second[3] = 1e-30, -0.0
    one, two = (Patch.between(base, {"w": w}, fingerprint=mark) for w in (first, second))
    found = compose(base, [two, one])["w"]
    assert same_bits(found[[0, 3]], torch.tensor([1e-30, -0.0]))
    assert same_bits(found[1:3], base["w"][1:3])


def test_untouched_tensors_are_the_same_objects_and_tied_ones_stay_tied():
    model = Net()
    base = dict(model.state_dict())
    found = compose(base, [patch_for(model, 0, {"table.weight": "all"})])
    assert found["cube"] is base["cube"]
    assert found["table.weight"] is found["head.weight"]
    assert not torch.equal(found["head.weight"], base["head.weight"])
    assert list(found) == list(base)


def test_no_patches_is_the_base():
    base = Net().state_dict()
    assert compose(base, []) == base


def test_what_does_not_fit_is_refused():
    model = Net()
    base = snapshot(model)
    one = patch_for(model, 0, {"cube": "all"})
    with pytest.raises(PatchConflict, match="twice"):
        compose(base, [one, one])
    one.apply(model)
    two = patch_for(model, 1, {"gain": "all"})
    with pytest.raises(PatchConflict, match=f"requires {one.id[:12]}"):
        compose(base, [two])
    with pytest.raises(BaseMismatch, match="'cube' has other values"):
        compose(snapshot(model), [one])
    with pytest.raises(BaseMismatch, match="'cube' is missing"):
        compose({"gain": base["gain"]}, [one])


def test_patches_that_overflow_together_are_refused():
    base = {"w": torch.tensor([0.0, 1.0], dtype=torch.float16)}
    mark = fingerprint(base)
    made = [Patch.between(base, {"w": torch.tensor([0, v]).half()}, fingerprint=mark) for v in (6e4, 6.1e4)]
    with pytest.raises(PatchConflict, match="out of its type's range"):
        compose(base, made)


def test_requirements_order_before_ids():
    model = Net()
    stack = []
    for seed in range(6):
        stack.append(patch_for(model, seed, {"gain": "all"}))
        stack[-1].apply(model)
    assert canonical(reversed(stack)) == tuple(stack)


@pytest.mark.parametrize("seed", range(4))
def test_a_patch_made_after_two_is_recomputed_without_a_fourth(seed):
    """Its own base leaves the fourth out, wherever ids put it in the order."""
    model = Net(seed)
    base = snapshot(model)
    one, two, apart = (patch_for(model, seed + number, {"cube": "all"}) for number in (0, 10, 20))
    for patch in (one, two):
        patch.apply(model)
    top = patch_for(model, seed + 30, {"cube": "all"})
    top.apply(model)
    wanted = model.cube.detach() + (apart.result(base)["cube"] - base["cube"])
    apart.apply(model)
    assert unchanged(model, compose(base, [apart, top, two, one]))
    assert torch.allclose(model.cube, wanted, rtol=1e-6, atol=1e-6)
    apart.revert(model)
    assert unchanged(model, compose(base, [top, two, one]))
