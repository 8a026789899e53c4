from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
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
from weightpatch.patches import (
    Demand,
    Entry,
    Gate,
    GateEntry,
    Manifest,
    Patch,
    Reading,
    Unrecorded,
    describe,
    fingerprint,
    format,
    manifest,
)
from weightpatch.records import Record


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


def full() -> Patch:
    """Everything that a patch can hold, small."""
    base = {"w": torch.zeros(2)}
    reading = Reading("early", "mean", (1, 2), "cosine", torch.ones(2, 3).half(), torch.zeros(3))
    gates = {"fc": Gate(torch.ones(1, 2), torch.ones(1), torch.ones(1, 1), reading)}
    record = Record("a/b", 1, {"x.0": torch.tensor([True]), "y": torch.tensor([2])}, {"says": ["é", None, {"k": 0.5}]})
    return Patch.between(
        base,
        {"w": torch.ones(2)},
        fingerprint=fingerprint(base),
        requires=("1" * 64,),
        context=("0" * 64,),
        metrics={"held_out": {"n": 200, "bounds": [0.0, 0.015]}},
        gates=gates,
        demands=[Demand(record, 2, -0.125)],
        unrecorded=[Unrecorded("Says", "a decoder is no data")],
    )


def golden(patch: Patch) -> tuple[str, str]:
    patch = dataclasses.replace(patch, manifest=dataclasses.replace(patch.manifest, versions={"weightpatch": "0"}))
    return patch.id[:16], hashlib.sha256(patch.to_bytes()).hexdigest()[:16]


def test_bytes_and_ids_are_those_of_every_earlier_version():
    assert golden(small()) == ("db9528c358e25edd", "28c843b42afe6fa4")
    assert golden(gated()) == ("6b0a5fd1f15c0a5f", "e3ccce50c61382a0")
    assert golden(full()) == ("afdb17fb3a425b8c", "3fa6b858d62f8f02")


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


@pytest.mark.parametrize("make", [small, gated, full])
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


def arrays_of(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """The page docs/patch-format.md in standard library: the arrays by what they belong to, or None for no patch."""
    try:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        manifest = json.loads(header.pop("__metadata__")["weightpatch-patch"])
        identity = manifest["id"]
        assert len(identity) == 64
        assert data.count(identity.encode()) == 1
        assert hashlib.sha256(data.replace(identity.encode(), b"0" * 64)).hexdigest() == identity
        kinds = {"full": ["values"], "lowrank": ["left", "right"], "rows": ["index", "values"]}
        parts = [(entry["name"], kinds.get(entry["kind"], ["index", "values"])) for entry in manifest["tensors"]]
        for entry in manifest["gates"]:
            more = [f"{part}.{n}" for n in range(1, len(entry["readings"])) for part in ("keys", "radii")]
            parts.append((entry["layer"], ["keys", "radii", "values", *more]))
        parts += [(f"reading {n}", entry["parts"]) for n, entry in enumerate(manifest["readings"])]
        parts += [(f"demand {n}", entry["tensors"]) for n, entry in enumerate(manifest["demands"])]
        found = {}
        for number, (owner, names) in enumerate(parts):
            for name in names:
                info = header.pop(f"{number:04}.{name}")
                begin, stop = info["data_offsets"]
                found[f"{owner}: {name}"] = (info["dtype"], info["shape"], data[end + begin : end + stop])
        assert not header
        return found
    except (ValueError, KeyError, TypeError, AssertionError, AttributeError):
        return None


@pytest.mark.parametrize("make", [small, full])
def test_an_independent_reader_agrees(make):
    """On the arrays, and on every mutation of one byte."""
    data = make().to_bytes()
    found, content = arrays_of(data), format.parse(data)
    own = [(array.code, list(array.shape), bytes(array.data)) for array in content.arrays.values()]
    assert found is not None
    assert sorted(found.values()) == sorted(own)
    for place in range(len(data)):
        mutated = bytearray(data)
        mutated[place] = (mutated[place] + 1 + place % 255) % 256
        assert arrays_of(bytes(mutated)) is None
        with pytest.raises(PatchDamaged):
            format.parse(mutated)


def test_an_independent_reader_finds_what_belongs_to_what():
    found = arrays_of(full().to_bytes())
    assert list(found) == [
        "w: values",
        "fc: keys",
        "fc: radii",
        "fc: values",
        "reading 0: centre",
        "reading 0: metric",
        "demand 0: x.0",
        "demand 0: y",
    ]
    assert found["demand 0: x.0"] == ("BOOL", [1], b"\1")
    assert found["demand 0: y"] == ("I64", [1], struct.pack("<q", 2))
    assert found["reading 0: metric"] == ("F16", [2, 3], struct.pack("<6e", *[1] * 6))


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
    full().save(path)
    found = describe(path)
    assert json.loads(json.dumps(found)) == found
    assert found["context"] == ["0" * 64, "1" * 64]
    assert found["gates"] == [
        {"layer": "fc", "readings": [0], "bytes": 16, "parts": {"keys": [1, 2], "radii": [1], "values": [1, 1]}}
    ]
    assert found["readings"][0]["parts"] == {"centre": [3], "metric": [2, 3]}
    assert found["readings"][0]["bytes"] == 24
    (demand,) = found["demands"]
    assert (demand["kind"], demand["before"], demand["after"], demand["bytes"]) == ("a/b", 2.0, -0.125, 9)
    assert demand["parts"] == {"x.0": [1], "y": [1]}
    assert demand["scalars"] == {"says": ["é", None, {"k": 0.5}]}
    assert found["unrecorded"] == [{"kind": "Says", "reason": "a decoder is no data"}]


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


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth > 1 else []


def shared(depth: int) -> list:
    """A hundred million numbers in the memory of a few lists."""
    return [shared(depth - 1)] * 20 if depth else [0] * 20


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
        {"metrics": {"a": [1, float("nan")]}},
        {"metrics": {"a": {"b": ["\x1b[2J"]}}},
        {"metrics": {"a": {"b\0": 1}}},
        {"metrics": {"a": (1, 2)}},
        {"metrics": {"a": {1, 2}}},
        {"metrics": {"a": torch.ones(())}},
        {"metrics": {"a": 2**63}},
        {"metrics": {"a": {3: 1}}},
        {"metrics": {3: 1}},
        {"metrics": {"a": nested(16)}},
        {"metrics": {"a": [shared(6)] * 20}},
        {"metrics": {"a": [0] * 100_001}},
        {"metrics": {"a": [[0] * 10_000] * 10_000}},
        {"settings": {"a": [1]}},
        {"settings": {"a": None}},
        {"context": ("x",)},
        {"settings": {"a\0": 1}},
    ],
)
def test_manifests_hold_only_what_can_be_shown_and_compared(fields):
    base = {"w": torch.zeros(2)}
    with pytest.raises(InvalidInput):
        Patch.between(base, {"w": torch.ones(2)}, **({"fingerprint": "0" * 64} | fields))


leaves = (
    *(st.none(), st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)),
    st.text(st.characters(exclude_categories=("C", "Z"))),
)
json_values = st.one_of(leaves)
for _ in range(3):
    keys = st.text(st.characters(categories=("L", "N", "P")), max_size=5)
    json_values = st.one_of(*leaves, st.lists(json_values, max_size=3), st.dictionaries(keys, json_values, max_size=3))


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["held out", "n", "é"]), json_values))
def test_evidence_comes_back_as_it_was(metrics):
    base = {"w": torch.zeros(2)}
    patch = Patch.between(base, {"w": torch.ones(2)}, fingerprint="0" * 64, metrics=metrics)
    again = Patch.from_bytes(patch.to_bytes())
    assert again == patch
    one, two = (json.dumps(evidence, sort_keys=True) for evidence in (metrics, again.manifest.metrics))
    assert one == two
    assert again.manifest.metrics == metrics


def test_evidence_is_a_copy_and_can_be_other_evidence():
    metrics = {"held_out": [1, {"n": 2}]}
    patch = dataclasses.replace(small())
    patch = patch.annotated(metrics=metrics)
    kept = patch.id
    metrics["held_out"][1]["n"] = 3
    assert Patch.from_bytes(patch.to_bytes()).id == kept != small().id
    other = patch.annotated(unrecorded=[Unrecorded("Says", "x")])
    assert other.manifest.metrics == {"held_out": [1, {"n": 2}]}
    assert other.operations is patch.operations
    assert len({kept, other.id, small().id}) == 3
    assert small().annotated() == small()
    with pytest.raises(InvalidInput, match="header"):
        patch.annotated(metrics={"a": "x" * 2**20})


def test_what_a_patch_was_made_on_holds_what_it_requires():
    patch = full()
    assert patch.manifest.requires == ("1" * 64,)
    assert patch.manifest.context == ("0" * 64, "1" * 64)
    assert (
        patch.id
        != dataclasses.replace(patch, manifest=dataclasses.replace(patch.manifest, requires=("0" * 64, "1" * 64))).id
    )
    with pytest.raises(InvalidInput, match="not in context"):
        Manifest("0" * 64, requires=("1" * 64,))


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
        Manifest("0" * 64, format="weightpatch-patch/1")
    entry = Entry("w", "full", (2,), "float32", "0" * 64, "1" * 64)
    for wrong in ({"kind": "zip"}, {"dtype": "int8"}, {"shape": (0,)}, {"shape": [2]}, {"shape": (True,)}, {"pre": ""}):
        with pytest.raises(InvalidInput):
            dataclasses.replace(entry, **wrong)
    many = tuple(GateEntry(f"{number:05}", (0,)) for number in range(manifest.LIMIT))
    with pytest.raises(InvalidInput, match="gates"):
        Manifest("0" * 64, tensors=(entry,), gates=many)
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
