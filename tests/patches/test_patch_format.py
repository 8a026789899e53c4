from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from patch_cases import Net, changes, dtypes, patch_for, same_bits

from weightpatch.errors import InvalidInput, PatchDamaged, PatchError
from weightpatch.patches import Entry, Gate, Manifest, Patch, describe, fingerprint, format, manifest


def small() -> Patch:
    base = {"w": torch.zeros(4, 4, dtype=torch.bfloat16), "b": torch.zeros(2)}
    new = {
        "w": torch.eye(4, dtype=torch.bfloat16)[[1, 0, 2, 3]] * base["w"].new_ones(4, 1),
        "b": torch.tensor([1.0, 2]),
    }
    new["w"][2:] = 0
    return Patch.between(base, new, fingerprint=fingerprint(base), editor="E()", metrics={"drift": 0.5})


def gated() -> Patch:
    base = {"w": torch.zeros(2)}
    gates = {"fc": Gate(torch.ones(1, 2), torch.zeros(1), torch.full((1, 1), -0.0))}
    return Patch.between(base, {"w": torch.ones(2)}, fingerprint=fingerprint(base), gates=gates)


def golden(patch: Patch) -> tuple[str, str]:
    patch = dataclasses.replace(patch, manifest=dataclasses.replace(patch.manifest, versions={"weightpatch": "0"}))
    return patch.id[:16], hashlib.sha256(patch.to_bytes()).hexdigest()[:16]


def test_bytes_and_ids_are_those_of_every_earlier_version():
    base = {"b": torch.zeros(2), "w": torch.zeros(4, 4, dtype=torch.bfloat16)}
    new = {"b": torch.tensor([1.0, 2]), "w": torch.eye(4, dtype=torch.bfloat16)}
    patch = Patch.between(base, new, fingerprint=fingerprint(base), editor="E()", metrics={"drift": 0.5})
    assert golden(patch) == ("d9b3eaea9cd37b55", "0fc8bbc947ee3fd9")
    assert b"gates" not in patch.to_bytes()
    assert golden(gated()) == ("1efbbe353feaca00", "1f70e0aaff41df78")


def test_an_empty_list_of_gates_is_not_how_a_patch_without_any_is_written():
    data = small().to_bytes()
    content = format.parse(data)
    plain = content.manifest.to_json() | {"gates": []}
    assert Manifest.from_json(plain) == content.manifest
    text = json.dumps(plain | {"id": "0" * 64}, sort_keys=True, separators=(",", ":"))
    names = sorted(content.arrays, key=lambda name: (-format.SIZES[content.arrays[name].code], name))
    arrays = [(name, content.arrays[name]) for name in names]
    found = format.header({format.KEY: text}, [(name, a.code, a.shape, len(a.data)) for name, a in arrays])
    found += b"".join(a.data for _, a in arrays)
    found = found.replace(b"0" * 64, hashlib.sha256(found).hexdigest().encode(), 1)
    with pytest.raises(PatchDamaged):
        format.parse(found)


@settings(max_examples=100)
@given(dtypes, changes, st.integers(0, 2**20))
def test_what_is_saved_is_loaded(dtype, kinds, seed):
    patch = patch_for(Net(seed, dtype), seed, kinds)
    data = patch.to_bytes()
    again = Patch.from_bytes(data)
    assert again == patch
    assert again.manifest == patch.manifest
    assert again.to_bytes() == data
    assert hash(again) == hash(patch)
    for name, operation in patch.operations.items():
        assert type(again.operations[name]) is type(operation)
        for part, tensor in operation.parts.items():
            assert torch.equal(again.operations[name].parts[part], tensor)


@pytest.mark.parametrize("make", [small, gated])
def test_every_single_bit_matters(make):
    data = make().to_bytes()
    assert Patch.from_bytes(data) == make()
    accepted = []
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            try:
                format.parse(flipped)
                accepted.append((place, bit))
            except PatchDamaged:
                pass
    assert not accepted


@pytest.mark.parametrize("make", [small, gated])
def test_every_truncation_and_every_addition_is_refused(make):
    data = make().to_bytes()
    for length in range(len(data)):
        with pytest.raises(PatchDamaged):
            format.parse(data[:length])
    for more in (b"\0", b" ", data):
        with pytest.raises(PatchDamaged):
            format.parse(data + more)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 3000), st.integers(0, 40))
def test_spliced_bytes_are_refused(noise, place, cut):
    data = small().to_bytes()
    spliced = data[:place] + noise + data[place + cut :]
    if spliced != data:
        with pytest.raises(PatchDamaged):
            Patch.from_bytes(spliced)


def test_thirty_saves_give_one_digest(tmp_path):
    model = Net()
    found = set()
    for number in range(30):
        patch_for(model, 0, {"cube": "all", "gain": "all", "head.bias": "few"}).save(tmp_path / f"{number}.safetensors")
        found.add(hashlib.sha256((tmp_path / f"{number}.safetensors").read_bytes()).hexdigest())
    assert len(found) == 1


def test_the_id_is_the_digest_of_the_file_with_zeros_for_the_id():
    patch = small()
    data = patch.to_bytes()
    assert data.count(patch.id.encode()) == 1
    assert hashlib.sha256(data.replace(patch.id.encode(), b"0" * 64)).hexdigest() == patch.id


def test_equality_is_of_content():
    patch = small()
    other = dataclasses.replace(patch, manifest=dataclasses.replace(patch.manifest, editor="F()"))
    assert patch != other
    assert patch != patch.id
    assert len({patch, small(), other}) == 2
    assert repr(patch) == f"<Patch {patch.id[:12]}: 2 tensors, {patch.nbytes} bytes>"


def test_any_safetensors_reader_reads_it(tmp_path):
    """All kinds of operations at once: the wide types come first, so that everything is aligned."""
    model = Net(0, torch.float64)
    patch = patch_for(model, 0, {"cube": "all", "table.weight": "row", "head.bias": "few", "gain": "all"})
    patch.save(path := tmp_path / "a.patch.safetensors")
    found = safetensors.torch.load_file(path)
    parts = [p for name in sorted(patch.operations) for p in patch.operations[name].parts.values()]
    assert all(torch.equal(a, b) for a, b in zip((found[name] for name in sorted(found)), parts, strict=True))
    with safetensors.safe_open(path, framework="pt") as file:
        assert list(file.metadata()) == [format.KEY]
        assert json.loads(file.metadata()[format.KEY])["id"] == patch.id


def test_an_independent_reader_agrees():
    """The page docs/patch-format.md in twenty lines of standard library, on every mutation of one byte."""

    def accepts(data: bytes) -> bool:
        try:
            end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:end])
            identity = json.loads(header["__metadata__"]["weightpatch-patch"])["id"]
            assert len(identity) == 64
            assert data.count(identity.encode()) == 1
            return hashlib.sha256(data.replace(identity.encode(), b"0" * 64)).hexdigest() == identity
        except (ValueError, KeyError, TypeError, AssertionError, AttributeError):
            return False

    data = small().to_bytes()
    assert accepts(data)
    for place in range(len(data)):
        mutated = bytearray(data)
        mutated[place] = (mutated[place] + 1 + place % 255) % 256
        assert accepts(bytes(mutated)) is False
        with pytest.raises(PatchDamaged):
            format.parse(mutated)


def test_description_of_a_file(tmp_path):
    patch = small()
    patch.save(path := tmp_path / "a.patch.safetensors")
    found = describe(path)
    assert found["id"] == patch.id
    assert found["bytes"] == path.stat().st_size
    assert found["metrics"] == {"drift": 0.5}
    assert [t["name"] for t in found["tensors"]] == ["b", "w"]
    assert sum(t["bytes"] for t in found["tensors"]) == patch.nbytes
    assert found["tensors"][0]["parts"] == {"values": [2]}
    assert json.loads(json.dumps(found)) == found


def test_describing_needs_no_torch(tmp_path):
    small().save(tmp_path / "a.patch.safetensors")
    code = (
        "import sys; from weightpatch.patches import describe; print(describe(sys.argv[1])['id']);"
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "a.patch.safetensors"], capture_output=True, text=True)
    assert ran.stderr == ""
    assert ran.stdout.strip() == small().id


def test_the_package_lists_what_it_has():
    import weightpatch.patches as package

    assert sorted(package.__all__) == dir(package) == package.__all__
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_a_patch_of_nothing_says_so():
    base = {"w": torch.ones(3)}
    patch = Patch.between(base, {"w": base["w"].clone()}, fingerprint=fingerprint(base))
    assert patch.operations == {}
    assert Patch.from_bytes(patch.to_bytes()) == patch


def test_loaded_tensors_are_aligned_and_can_be_used():
    patch = Patch.from_bytes(patch_for(Net(0, torch.float64), 0, {"cube": "few", "table.weight": "row"}).to_bytes())
    for operation in patch.operations.values():
        for tensor in operation.parts.values():
            assert tensor.data_ptr() % tensor.element_size() == 0


def test_result_is_what_applying_gives():
    model = Net()
    base = dict(model.state_dict())
    patch = patch_for(model, 0, {"cube": "outer", "gain": "all"})
    found = patch.result(base)
    patch.apply(model)
    assert found.keys() == {"cube", "gain"}
    assert same_bits(found["cube"], model.cube.detach())
    with pytest.raises(PatchError, match="another 'cube'"):
        patch.result(model.state_dict())


def test_the_order_of_given_names_does_not_matter():
    model = Net()
    base = dict(model.state_dict())
    new = {"cube": model.cube + 1, "gain": model.gain + 1}
    mark = fingerprint(model)
    a = Patch.between(base, new, fingerprint=mark, requires=("1" * 64, "0" * 64), metrics={"a": 1, "b": 2})
    b = Patch.between(
        base, dict(reversed(new.items())), fingerprint=mark, requires=("0" * 64, "1" * 64), metrics={"b": 2, "a": 1}
    )
    assert a == b


NAMES_REFUSED = (
    "",
    ".",
    "..",
    "a..b",
    ".a",
    "a.",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\nb",
    "a\x1b[2J",
    "a\u202eb",
    "x" * 257,
)


@pytest.mark.parametrize("name", NAMES_REFUSED)
def test_hostile_names_are_refused(name):
    base = {name: torch.zeros(2)}
    with pytest.raises(InvalidInput, match="tensor name"):
        Patch.between(base, {name: torch.ones(2)}, fingerprint="0" * 64)


@given(st.text(max_size=300))
def test_names_are_fine_or_refused_and_fine_ones_are_kept(name):
    base = {name: torch.zeros(2)}
    try:
        patch = Patch.between(base, {name: torch.ones(2)}, fingerprint="0" * 64)
    except InvalidInput:
        assert (
            not name or len(name) > 256 or not name.isprintable() or set(name) & set("/\\") or not all(name.split("."))
        )
    else:
        assert list(Patch.from_bytes(patch.to_bytes()).operations) == [name]


@pytest.mark.parametrize(
    "fields",
    [
        {"fingerprint": "0" * 63},
        {"fingerprint": "G" * 64},
        {"requires": ("x",)},
        {"editor": "a\x1b[2J"},
        {"constraint": 3},
        {"metrics": {"a": float("nan")}},
        {"metrics": {"a": float("inf")}},
        {"metrics": {"a": None}},
        {"metrics": {"a": [1]}},
        {"metrics": {"a": 2**63}},
        {"metrics": {3: 1}},
        {"settings": {"a\0": 1}},
    ],
)
def test_manifests_hold_only_what_can_be_shown_and_compared(fields):
    base = {"w": torch.zeros(2)}
    with pytest.raises(InvalidInput):
        Patch.between(base, {"w": torch.ones(2)}, **({"fingerprint": "0" * 64} | fields))


def test_numbers_and_text_come_back_as_they_were():
    metrics = {
        "i": 3,
        "f": 0.1,
        "whole": 1.0,
        "text": "ä → ✓",
        "yes": True,
        "tiny": 5e-324,
        "np": np.float64(0.25),
        "z": -0.0,
    }
    base = {"w": torch.zeros(2)}
    patch = Patch.between(base, {"w": torch.ones(2)}, fingerprint="0" * 64, metrics=metrics)
    found = Patch.from_bytes(patch.to_bytes()).manifest.metrics
    assert found == metrics
    assert {k: type(v) for k, v in found.items() if k != "np"} == {k: type(v) for k, v in metrics.items() if k != "np"}


def test_too_large_a_header_is_refused_when_made():
    base = {"w": torch.zeros(2)}
    with pytest.raises(InvalidInput, match="header"):
        Patch.between(base, {"w": torch.ones(2)}, fingerprint="0" * 64, editor="x" * 2**20)


def test_unknown_names_and_formats_are_refused():
    with pytest.raises(InvalidInput, match="base lacks"):
        Patch.between({}, {"w": torch.ones(2)}, fingerprint="0" * 64)
    with pytest.raises(InvalidInput, match="format"):
        Manifest("0" * 64, format="weightpatch-patch/2")
    entry = Entry("w", "full", (2,), "float32", "0" * 64, "1" * 64)
    for wrong in ({"kind": "zip"}, {"dtype": "int8"}, {"shape": (0,)}, {"shape": [2]}, {"shape": (True,)}, {"pre": ""}):
        with pytest.raises(InvalidInput):
            dataclasses.replace(entry, **wrong)
    with pytest.raises(InvalidInput, match="gates"):
        Manifest("0" * 64, tensors=(entry,), gates=tuple(f"{number:05}" for number in range(manifest.LIMIT)))
    for tensors in ((entry, entry), (dataclasses.replace(entry, also=("w",)),), (entry,) * (manifest.LIMIT + 1)):
        with pytest.raises(InvalidInput):
            Manifest("0" * 64, tensors=tensors)


def test_large_files_are_read_without_a_second_copy(tmp_path):
    """Peak memory of reading stays under three times the file."""
    base = {"w": torch.zeros(2**22)}
    patch = Patch.between(base, {"w": torch.rand(2**22)}, fingerprint="0" * 64)
    patch.save(path := tmp_path / "a.patch.safetensors")
    code = (
        "import resource, sys; from weightpatch.patches import describe; import numpy;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024;"
        "before = peak(); describe(sys.argv[1]); print(peak() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 3 * os.path.getsize(path)
