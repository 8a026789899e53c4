from __future__ import annotations

import json
import os

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from patch_cases import DTYPES, Net, changes, dtypes, patch_for, snapshot, unchanged

from weightpatch.errors import BaseMismatch, InvalidInput, NotEditable, PatchConflict, PatchDamaged, PatchError
from weightpatch.patches import Patch, applied, base_fingerprint, files, load_weights, save_weights
from weightpatch.patches.weights import KEY, Weights


def plain(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dtypes, st.lists(changes, min_size=1, max_size=3), st.integers(0, 2**20))
def test_a_reverted_file_is_the_original_byte_for_byte(tmp_path, dtype, kinds, seed):
    model = Net(seed, dtype)
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(plain(model), path, metadata={"format": "pt"})
    original = path.read_bytes()
    for number, kind in enumerate(kinds):
        patch = patch_for(model, seed + 10 * number, kind)
        patch.apply(model)
        save_weights(path, load_weights(path).apply(Patch.from_bytes(patch.to_bytes())))
        found = load_weights(path)
        assert found.patches == applied(model)
        assert found.fingerprint == base_fingerprint(model)
        assert unchanged(model, dict(found.tensors))
        assert unchanged(model, safetensors.torch.load_file(path))
    for patch in reversed(found.patches):
        save_weights(path, load_weights(path).revert(patch))
    assert path.read_bytes() == original
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]


def patched(tmp_path, number=2):
    model = Net()
    path = tmp_path / "m.safetensors"
    save_weights(path, Weights(snapshot(model)))
    for seed in range(number):
        patch = patch_for(model, seed, {"cube": "all", "gain": "all"})
        patch.apply(model)
        save_weights(path, load_weights(path).apply(patch))
    return model, path


def test_another_metadata_key_is_kept_and_ours_names_base_and_patches(tmp_path):
    model, path = patched(tmp_path)
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[KEY])
    assert record["patches"] == [patch.id for patch in applied(model)]
    assert record["base"] == base_fingerprint(model)
    folder = tmp_path / "m.safetensors.patched"
    assert {p.name for p in folder.iterdir()} == {
        f"{record['originals']}.originals.safetensors",
        *(f"{patch.id}.patch.safetensors" for patch in applied(model)),
    }


def test_ties_of_a_state_dict_come_back(tmp_path):
    model = Net()
    patch = patch_for(model, 0, {"table.weight": "all"})
    save_weights(path := tmp_path / "m.safetensors", Weights(snapshot(model)).apply(patch))
    found = load_weights(path)
    assert found.tensors["head.weight"] is found.tensors["table.weight"]
    save_weights(path, found.revert(patch))
    assert unchanged(model, safetensors.torch.load_file(path))


def test_weights_are_values():
    weights = Weights(snapshot(Net()))
    patch = patch_for(Net(), 0, {"cube": "all"})
    changed = weights.apply(patch)
    assert weights.patches == ()
    assert changed.patches == (patch,)
    assert torch.equal(weights.tensors["cube"], Net().cube)
    assert repr(changed) == f"<Weights: {len(weights.tensors)} tensors, 1 patches>"
    assert changed.revert(patch).tensors["cube"].equal(weights.tensors["cube"])
    with pytest.raises(PatchConflict):
        changed.apply(patch)
    with pytest.raises(PatchConflict):
        weights.revert(patch)


def test_state_dicts_saved_by_torch_are_read(tmp_path):
    model = Net()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    found = load_weights(tmp_path / "m.pt")
    assert found.fingerprint == base_fingerprint(model)
    patch = patch_for(model, 0, {"table.weight": "all"})
    save_weights(tmp_path / "m.safetensors", found.apply(patch))
    patch.apply(model)
    assert unchanged(model, safetensors.torch.load_file(tmp_path / "m.safetensors"))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_nothing_in_a_weights_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(1), "x": Evil()}, tmp_path / "m.pt")
    with pytest.raises(PatchError, match="cannot read"):
        load_weights(tmp_path / "m.pt")
    assert not (tmp_path / "evil-was-here").exists()


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"hello")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "nested.pt")
    for name in ("m.safetensors", "nothing.safetensors", "list.pt", "nested.pt", "nothing.pt"):
        with pytest.raises(PatchError, match="cannot read"):
            load_weights(tmp_path / name)
    with pytest.raises(InvalidInput, match=r"NAME\.safetensors"):
        save_weights(tmp_path / "m.pt", Weights({}))
    with pytest.raises(NotEditable, match="'w'"):
        save_weights(tmp_path / "c.safetensors", Weights({"w": torch.ones(1, dtype=torch.complex128)}))


def meddle_weights(path, folder):
    found = load_weights(path)
    tensors = {name: tensor + 1 if name == "mean" else tensor for name, tensor in found.tensors.items()}
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({n: t.clone() for n, t in tensors.items()}, path, metadata)


def meddle_touched(path, folder):
    found = load_weights(path)
    tensors = {name: tensor + 1 if name == "gain" else tensor for name, tensor in found.tensors.items()}
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({n: t.clone() for n, t in tensors.items()}, path, metadata)


def meddle_originals(path, folder):
    (one,) = folder.glob("*.originals.safetensors")
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    one.write_bytes(data)


def meddle_patches(path, folder):
    one, two = folder.glob("*.patch.safetensors")
    one.write_bytes(two.read_bytes())


def rewrite(path, **fields):
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()[KEY]) | fields
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, {KEY: json.dumps(record)})


@pytest.mark.parametrize(
    ("meddle", "error"),
    {
        "other weights": (meddle_weights, BaseMismatch),
        "other touched weights": (meddle_touched, BaseMismatch),
        "other originals": (meddle_originals, PatchDamaged),
        "other patches": (meddle_patches, PatchDamaged),
        "no originals": (lambda path, folder: next(folder.glob("*.originals.*")).unlink(), PatchError),
        "no patch": (lambda path, folder: next(folder.glob("*.patch.*")).unlink(), PatchError),
        "base": (lambda path, folder: rewrite(path, base="0" * 64), BaseMismatch),
        "format": (lambda path, folder: rewrite(path, format="weightpatch-weights/2"), PatchDamaged),
        "path": (lambda path, folder: rewrite(path, originals="../../x"), PatchDamaged),
        "path of a patch": (lambda path, folder: rewrite(path, patches=["../../x"]), PatchDamaged),
        "patches": (lambda path, folder: rewrite(path, patches=None), PatchDamaged),
        "tied": (lambda path, folder: rewrite(path, tied={"gain": []}), PatchDamaged),
    }.values(),
)
def test_a_file_that_is_not_as_it_was_saved_is_refused(tmp_path, meddle, error):
    _, path = patched(tmp_path)
    load_weights(path)
    meddle(path, path.with_name(path.name + ".patched"))
    with pytest.raises(error):
        load_weights(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_at_any_file_leaves_a_readable_state(tmp_path, monkeypatch, dtype):
    """Each of the files of a save fails in turn; the weights are then those before or after."""
    model = Net(0, dtype)
    path = tmp_path / "m.safetensors"
    save_weights(path, Weights(plain(model)))
    one, real = patch_for(model, 0, {"cube": "all"}), files.write
    save_weights(path, load_weights(path).apply(one))
    one.apply(model)
    two = patch_for(model, 1, {"cube": "few", "gain": "all"})
    after = load_weights(path).apply(two)
    for at in range(5):
        count = iter(range(100))

        def faulty(path, chunks, at=at, count=count):
            if next(count) == at:
                raise PatchError("cannot save: No space left on device")
            real(path, chunks)

        with monkeypatch.context() as patcher:
            patcher.setattr(files, "write", faulty)
            try:
                save_weights(path, after)
            except PatchError:
                assert load_weights(path).patches == (one,)
            else:
                assert load_weights(path).patches == after.patches
    save_weights(path, load_weights(path).revert(two).revert(one))
    assert unchanged(Net(0, dtype), safetensors.torch.load_file(path))


def test_ties_to_names_that_are_not_there_are_nothing(tmp_path):
    model, path = patched(tmp_path)
    rewrite(path, tied={"nothing": "gain"})
    assert unchanged(model, dict(load_weights(path).tensors))


def test_a_folder_that_cannot_be_made(tmp_path):
    path = tmp_path / "m.safetensors"
    save_weights(path, Weights(plain(Net())))
    (tmp_path / "m.safetensors.patched").write_text("in the way")
    with pytest.raises(PatchError, match="cannot make"):
        save_weights(path, load_weights(path).apply(patch_for(Net(), 0, {"cube": "all"})))
    assert unchanged(Net(), safetensors.torch.load_file(path))


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    model, path = patched(tmp_path)
    folder = path.with_name(path.name + ".patched")
    (folder / "notes.txt").write_text("mine")
    for patch in reversed(applied(model)):
        save_weights(path, load_weights(path).revert(patch))
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
