"""Demands as the content of patches: data of any kind, which comes back as it was and is never looked up."""

from __future__ import annotations

import json
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from weightpatch.cli import main
from weightpatch.errors import InvalidInput, NonFinite
from weightpatch.patches import Demand, Patch, Unrecorded, base_fingerprint, describe
from weightpatch.records import Record

DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
)


def patch_with(*demands: Demand, **more) -> Patch:
    return Patch.between({}, {}, fingerprint="0" * 64, demands=demands, **more)


def demand(kind="a/b", version=1, tensors=None, scalars=None, before=None, after=None) -> Demand:
    return Demand(Record(kind, version, tensors or {}, scalars or {}), before, after)


def made(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=draw).to(dtype)


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}(\.[0-9]){0,2}", fullmatch=True)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
violations = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=150)
@given(
    st.lists(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=3), max_size=3),
    st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,9}/[a-z0-9][a-z0-9_.-]{0,9}", fullmatch=True),
    st.integers(1, 2**31 - 1),
    violations,
    violations,
    st.integers(0, 2**20),
)
def test_any_record_comes_back_as_it_was(each, kind, version, before, after, seed):
    """Also empty tensors, single numbers and truths; in the order in which they were given."""
    tensors = [{name: made(*facts, seed) for name, facts in one.items()} for one in each]
    given = [
        demand(kind, version, one, {"n": n, "deep": [{"x": None}]}, before, after) for n, one in enumerate(tensors)
    ]
    patch = patch_with(*given, unrecorded=[Unrecorded("Says", "it asks a decoder")])
    again = Patch.from_bytes(patch.to_bytes())
    assert again == patch
    assert again.to_bytes() == patch.to_bytes()
    assert again.manifest == patch.manifest
    assert again.manifest.unrecorded == (Unrecorded("Says", "it asks a decoder"),)
    assert len(again.demands) == len(given)
    for n, (found, own) in enumerate(zip(again.demands, tensors, strict=True)):
        assert (found.record.kind, found.record.version, found.before, found.after) == (kind, version, before, after)
        assert found.record.scalars == {"n": n, "deep": [{"x": None}]}
        assert found.record.tensors.keys() == own.keys()
        for name, tensor in own.items():
            assert found.record.tensors[name].dtype == tensor.dtype
            assert torch.equal(found.record.tensors[name], tensor)


def test_a_patch_holds_a_copy_and_everything_counts():
    tensors, scalars = {"x": torch.zeros(2, 3).t()}, {"a": [1, 2]}
    patch = patch_with(demand(tensors=tensors, scalars=scalars, before=1, after=0))
    kept = patch.id
    tensors["x"].fill_(1)
    scalars["a"].append(3)
    assert Patch.from_bytes(patch.to_bytes()).id == kept
    assert patch.demands[0].before == 1.0
    assert type(patch.demands[0].copy().entry.before) is float
    others = [
        patch_with(),
        patch_with(demand(tensors=tensors, scalars={"a": [1, 2]}, before=1, after=0)),
        patch_with(demand(tensors={"x": torch.zeros(3, 2)}, scalars=scalars, before=1, after=0)),
        patch_with(demand(tensors={"x": torch.zeros(3, 2)}, scalars={"a": [1, 2]}, before=2, after=0)),
        patch_with(demand(tensors={"x": torch.zeros(3, 2)}, scalars={"a": [1, 2]}, before=1)),
        patch_with(demand("a/c", tensors={"x": torch.zeros(3, 2)}, scalars={"a": [1, 2]}, before=1, after=0)),
        patch_with(demand("a/b", 2, {"x": torch.zeros(3, 2)}, {"a": [1, 2]}, before=1, after=0)),
        patch_with(demand(tensors={"y": torch.zeros(3, 2)}, scalars={"a": [1, 2]}, before=1, after=0)),
    ]
    assert len({kept, *(other.id for other in others)}) == 1 + len(others)
    assert patch_with(demand(tensors={"x": torch.zeros(3, 2)}, scalars={"a": [1, 2]}, before=1, after=0)).id == kept


@pytest.mark.parametrize(
    ("record", "words"),
    [
        *((Record(kind, 1), "kind") for kind in ("", "b", "a/", "/b", "a/b/c", "A/b", "../b", "a/b\n", "é/b", 3, None)),
        *((Record("a/b", version), "version") for version in (0, -1, True, 1.0, "1", 2**31)),
        *(
            (Record("a/b", 1, {name: torch.ones(1)}), "name of a demand's tensor")
            for name in ("", ".", "a.", "0", "a/b", "a b", "é", "x" * 129, "a\n")
        ),
        (Record("a/b", 1, {"x": [1.0]}), "list"),
        (Record("a/b", 1, {"x": torch.ones(1, dtype=torch.complex64)}), "complex64"),
        (Record("a/b", 1, {"x": torch.ones(1).to(torch.float8_e5m2)}), "float8"),
        (Record("a/b", 1, {"x": torch.ones(1, dtype=torch.int8)}), "int8"),
        (Record("a/b", 1, {"x": torch.ones(2, 2).to_sparse()}), "sparse"),
        (Record("a/b", 1, {"x": torch.ones([1] * 17)}), "17 dimensions"),
        (Record("a/b", 1, {}, {"a": float("nan")}), "finite"),
        (Record("a/b", 1, {}, {"a": 2**63}), "finite"),
        (Record("a/b", 1, {}, {"a": object()}), "finite number or text"),
        (Record("a/b", 1, {}, {"a": "\x1b[2J"}), "printable"),
        (Record("a/b", 1, {}, {"a": "\ud800"}), "printable"),
        (Record("a/b", 1, {}, {"a": json.loads("[" * 16 + "]" * 16)}), "inside one another"),
        (Record("a/b", 1, {}, {1: 1}), "name in"),
    ],
)
def test_what_no_file_can_hold_is_refused_when_it_is_given(record, words):
    with pytest.raises(InvalidInput, match=words):
        Demand(record)


def test_as_deep_as_it_may_be_comes_back():
    scalars = {"a": json.loads("[" * 15 + "]" * 15)}
    assert Patch.from_bytes(patch_with(demand(scalars=scalars)).to_bytes()).demands[0].record.scalars == scalars


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        with pytest.raises(NonFinite, match="'x'"):
            demand(tensors={"x": torch.tensor([0, bad]).to(dtype)})
    for when in ("before", "after"):
        with pytest.raises(InvalidInput, match=f"violation {when}"):
            demand(**{when: bad})


@pytest.mark.parametrize(
    ("kind", "reason"), [("", "x"), ("Says", ""), ("Says", "a\nb"), ("\x1b", "x"), ("S", "x" * 1001)]
)
def test_what_was_not_recorded_is_said_in_printable_lines(kind, reason):
    with pytest.raises(InvalidInput, match="not recorded"):
        Unrecorded(kind, reason)


def test_a_kind_is_never_imported(tmp_path):
    """Though there is a module of that name that says so when it is."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    patch_with(demand("evil/evil", tensors={"x": torch.ones(1)})).save(path := tmp_path / "a.patch.safetensors")
    code = """
import sys
from weightpatch.patches import Patch, describe
sys.path.insert(0, sys.argv[2])
describe(sys.argv[1])
patch = Patch.load(sys.argv[1])
Patch.from_bytes(patch.to_bytes())
print(patch.demands[0].record.kind, "evil" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code, path, tmp_path], capture_output=True, text=True)
    assert (ran.stderr, ran.stdout.split()) == ("", ["evil/evil", "False"])


def test_demands_change_nothing_of_the_model():
    model = nn.Linear(3, 2)
    facts = {"fingerprint": base_fingerprint(model), "exact": True}
    new = {"bias": model.bias.detach() + 1}
    plain = Patch.between(dict(model.state_dict()), new, **facts)
    own = Patch.between(dict(model.state_dict()), new, **facts, demands=[demand(tensors={"x": torch.ones(9)})])
    assert own.nbytes == plain.nbytes
    with own.applied(model):
        assert torch.equal(model.bias, new["bias"])


def test_inspecting_shows_demands_and_no_text_of_theirs_passes_for_something_else(tmp_path, capsys):
    patch = patch_with(
        demand("alice/tone", 3, {"x": torch.ones(2, 5)}, {"says": "[red]so\nid           forged"}, 1.5),
        unrecorded=[Unrecorded("Says", "[bold]its decoder[/bold] is code")],
        metrics={"held_out": {"n": 200, "note": "a\nid           forged"}},
        editor="E\nid           forged",
    )
    patch.save(path := tmp_path / "a.patch.safetensors")
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("id ")] == [f"id           {patch.id}"]
    for words in ("alice/tone 3", "x 2×5", "1.5", "unknown", "[bold]its decoder[/bold] is code", "[red]so", '"n": 200'):
        assert words in " ".join(shown.split()), words
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["demands"] == describe(path)["demands"]
