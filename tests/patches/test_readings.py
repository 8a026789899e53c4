"""What a gate's keys are compared with: saved, loaded, shared, and refused where it cannot be run."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from patch_cases import DTYPES, floats, same_bits, snapshot, unchanged
from torch import nn

from weightpatch.errors import InvalidInput, NonFinite, PatchError, ShapeMismatch
from weightpatch.patches import Gate, Lock, Patch, Reading, applied, base_fingerprint, describe

LAYERS = ("", "early", "fc")


def patch_of(gates: dict[str, Gate], mark: str = "0" * 64) -> Patch:
    return Patch.between({}, {}, fingerprint=mark, gates=gates)


@st.composite
def readings(draw) -> Reading:
    """Of keys of three numbers."""
    seed, dtype = draw(st.integers(0, 3)), draw(st.sampled_from(DTYPES))
    metric = floats(dtype, (3, 4), seed) if draw(st.booleans()) else None
    centre = floats(dtype, (3 if metric is None else 4,), seed) if draw(st.booleans()) else None
    pooling = draw(st.sampled_from(["none", "mean", "last", "minimum"]))
    grid = draw(st.sampled_from([(), (7, 7)])) if pooling == "mean" else ()
    distance = draw(st.sampled_from(["euclidean", "cosine"]))
    return Reading(draw(st.sampled_from(LAYERS)), pooling, grid, distance, metric, centre)


def lock(reading: Reading, count: int, seed: int) -> Lock:
    return Lock(floats(torch.float32, (count, 3), seed), floats(torch.float16, (count,), seed).abs(), reading)


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "fc"]), st.lists(readings(), min_size=1, max_size=3)), st.integers(0, 99)
)
def test_what_is_saved_is_loaded_and_nothing_is_stored_twice(each, seed):
    gates = {}
    for name, own in each.items():
        first, *also = (lock(reading, 2, seed + n) for n, reading in enumerate(own))
        gates[name] = Gate(first.keys, first.radii, floats(torch.bfloat16, (2, 5), seed), first.reading, tuple(also))
    patch = patch_of(gates)
    again = Patch.from_bytes(patch.to_bytes())
    assert again == patch
    assert again.to_bytes() == patch.to_bytes()
    assert again.manifest == patch.manifest
    assert again.nbytes == patch.nbytes
    for name, gate in gates.items():
        for one, other in zip(gate.locks, again.gates[name].locks, strict=True):
            assert same_bits(one.keys, other.keys)
            assert same_bits(one.radii, other.radii)
            assert other.reading.layer == (one.reading.layer or name)
            assert dataclasses.astuple(other.reading)[1:4] == dataclasses.astuple(one.reading)[1:4]
            assert other.reading.parts.keys() == one.reading.parts.keys()
            assert all(same_bits(other.reading.parts[part], one.reading.parts[part]) for part in one.reading.parts)
    facts = [(entry, [t.tolist() for t in one.parts.values()]) for entry, one in read(again)]
    assert all(fact not in facts[:n] for n, fact in enumerate(facts))


def read(patch: Patch):
    numbered = {
        number: one.reading
        for entry in patch.manifest.gates
        for number, one in zip(entry.readings, patch.gates[entry.layer].locks, strict=True)
    }
    return [(patch.manifest.readings[number], numbered[number]) for number in sorted(numbered)]


def test_a_metric_that_gates_share_is_stored_once_and_loaded_once(tmp_path):
    metric = torch.randn(8, 400, generator=torch.Generator().manual_seed(0)).half()
    reading = Reading("early", "mean", (5, 5), metric=metric)
    alike = Reading("early", "mean", (5, 5), metric=metric.clone())
    gates = {
        f"fc.{n}": Gate(torch.ones(2, 8), torch.ones(2), torch.ones(2, 3), (reading, alike)[n % 2]) for n in range(9)
    }
    patch = patch_of(gates)
    patch.save(path := tmp_path / "a.patch.safetensors")
    own = 9 * gates["fc.0"].nbytes
    assert patch.nbytes == own + metric.numel() * 2
    assert path.stat().st_size < own + metric.numel() * 2 + 4000
    again = Patch.load(path)
    assert len({id(gate.reading) for gate in again.gates.values()}) == 1
    assert describe(path)["readings"][0]["parts"] == {"metric": [8, 400]}
    other = dict(gates, other=Gate(torch.ones(2, 8), torch.ones(2), torch.ones(2, 3), Reading("late", metric=metric)))
    assert len(patch_of(other).manifest.readings) == 2


def test_readings_are_numbered_by_their_first_use_whatever_the_order_of_the_gates():
    one, two = Reading("x"), Reading("y")
    gates = {
        "b": Gate(torch.ones(1, 2), torch.ones(1), torch.ones(1, 1), one),
        "a": Gate(
            torch.ones(1, 2), torch.ones(1), torch.ones(1, 1), two, (Lock(torch.ones(1, 3), torch.ones(1), one),)
        ),
    }
    patch = patch_of(gates)
    assert patch == patch_of(dict(reversed(gates.items())))
    assert [entry.layer for entry in patch.manifest.readings] == ["y", "x"]
    assert [entry.readings for entry in patch.manifest.gates] == [(0, 1), (1,)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.fc = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.early(x).relu())


@pytest.mark.parametrize(
    ("reading", "also"),
    [
        (Reading("early"), ()),
        (Reading(pooling="mean"), ()),
        (Reading(pooling="mean", grid=(2,)), ()),
        (Reading(pooling="last"), ()),
        (Reading("fc", "minimum"), ()),
        (Reading(distance="cosine"), ()),
        (Reading(metric=torch.eye(3)), ()),
        (Reading(centre=torch.zeros(3)), ()),
        (Reading(), (Lock(torch.zeros(1, 3), torch.ones(1)),)),
    ],
)
def test_what_cannot_be_run_yet_is_refused_with_the_model_untouched(reading, also):
    model = Net()
    before, x = snapshot(model), torch.randn(4, 3)
    gate = Gate(torch.zeros(1, 3), torch.full((1,), 1e6), torch.ones(1, 2), reading, also)
    own = {"fingerprint": base_fingerprint(model), "exact": True, "gates": {"fc": gate}}
    patch = Patch.between(dict(model.state_dict()), {"fc.bias": model.fc.bias.detach() + 1}, **own)
    answers = model(x)
    with pytest.raises(PatchError, match=r"gates 'fc' by keys read at '(early|fc)'.*can only run.*use a newer one"):
        patch.apply(model)
    assert unchanged(model, before)
    assert applied(model) == ()
    assert torch.equal(model(x), answers)


@pytest.mark.parametrize("name", ["", "fc"])
def test_the_gated_layer_s_own_input_runs_under_its_name_too(name):
    model, x = Net(), torch.randn(4, 3)
    gate = Gate(torch.zeros(1, 3), torch.full((1,), 1e6), torch.ones(1, 2), Reading(name))
    patch = patch_of({"fc": gate}, base_fingerprint(model))
    assert patch == patch_of({"fc": dataclasses.replace(gate, reading=Reading())}, base_fingerprint(model))
    plain = model(x)
    with Patch.from_bytes(patch.to_bytes()).applied(model):
        assert torch.equal(model(x), plain + 1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Reading(pooling="max"), InvalidInput, "none, mean, last, minimum"),
        (lambda: Reading(pooling=["mean"]), InvalidInput, "pooling"),
        (lambda: Reading(distance="dot"), InvalidInput, "euclidean, cosine"),
        (lambda: Reading(grid=(2,)), InvalidInput, "grid"),
        (lambda: Reading(pooling="mean", grid=(0,)), InvalidInput, "grid"),
        (lambda: Reading(pooling="mean", grid=(True,)), InvalidInput, "grid"),
        (lambda: Reading(pooling="mean", grid=[2]), InvalidInput, "grid"),
        (lambda: Reading(pooling="mean", grid=(2, 2, 2, 2)), InvalidInput, "grid"),
        (lambda: Reading(metric=torch.ones(3)), ShapeMismatch, "metric"),
        (lambda: Reading(metric=torch.ones(0, 3)), ShapeMismatch, "metric"),
        (lambda: Reading(metric=torch.ones(2, 3), centre=torch.ones(2)), ShapeMismatch, "centre"),
        (lambda: Reading(centre=torch.ones(())), ShapeMismatch, "centre"),
        (lambda: Reading(metric=torch.ones(2, 3, dtype=torch.int64)), InvalidInput, "int64"),
        (lambda: Reading(metric=torch.full((2, 3), torch.nan)), NonFinite, "metric"),
        (lambda: Lock(torch.ones(1, 2), torch.ones(1), Reading(metric=torch.ones(3, 4))), ShapeMismatch, "gives 3"),
        (lambda: Lock(torch.ones(1, 2), -torch.ones(1)), InvalidInput, "radii"),
        (lambda: gate_with(Lock(torch.ones(2, 2), torch.ones(2))), ShapeMismatch, "at least one key"),
        (lambda: patch_of({"fc": gate_with(*[Lock(torch.ones(1, 2), torch.ones(1))] * 8)}), InvalidInput, "1 to 8"),
        (
            lambda: patch_of({"fc": gate_with(Lock(torch.ones(1, 2), torch.ones(1), Reading("a/b")))}),
            InvalidInput,
            "slash",
        ),
    ],
)
def test_what_is_no_reading_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def gate_with(*also: Lock) -> Gate:
    return Gate(torch.ones(1, 2), torch.ones(1), torch.ones(1, 1), also=also)
