"""Gates as the content of patches: saved, applied, composed and reverted as everything else."""

from __future__ import annotations

import copy
import io
import itertools
import json
import subprocess
import sys
import warnings
from collections import OrderedDict

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from patch_cases import DTYPES, change, dtypes, same_bits, snapshot, unchanged
from safetensors.torch import save_file
from torch import nn

from weightpatch.cli import main
from weightpatch.errors import BaseMismatch, InvalidInput, NotEditable, PatchConflict, ShapeMismatch
from weightpatch.gates import KEY, GateHook, gate_of, gated
from weightpatch.patches import (
    Gate,
    Patch,
    applied,
    applying,
    base_fingerprint,
    compose,
    describe,
    fingerprint,
    load_weights,
    save_weights,
)
from weightpatch.patches.weights import Weights


class Conv1D(nn.Module):
    """As the one of transformers: the weight is (width, out)."""

    def __init__(self, out, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Net(nn.Module):
    """Modules of several kinds, called in several ways; `body.2` and `again` are one module."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
            self.again = self.body[2]
            self.conv = Conv1D(5, 6)
            self.head = nn.Linear(5, 3)
        self.to(dtype).eval()

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x=torch.tanh(self.again(self.body(x))))))


SIZES = {"body.0": (4, 6), "body.1": (6, 6), "body.2": (6, 6), "conv": (6, 5), "head": (5, 3)}
names = st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=3, unique=True)


def inputs(seed=0, dtype=torch.float32, shape=(8,)):
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given_to(model, name, x):
    """What a module is given while the model answers: (k, width)."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or (*kwargs.values(),))[0].detach().flatten(0, -2)),
        with_kwargs=True,
    )
    model(x)
    handle.remove()
    return torch.cat(seen)


def gate_at(model, name, x, seed=0, radius=0.0, scale=1.0):
    keys = given_to(model, name, x)
    draw = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(len(keys), SIZES[name][1], generator=draw)
    return Gate(keys, torch.full((len(keys),), radius, dtype=keys.dtype), values.to(keys.dtype))


def patch_of(model, gates, new=None):
    """A patch of the model as it is, after those applied to it."""
    return Patch.between(
        dict(model.state_dict()),
        new or {},
        fingerprint=base_fingerprint(model),
        requires=tuple(patch.id for patch in applied(model)),
        exact=True,
        gates=gates,
    )


def bare(model):
    """Nothing is left of any patch."""
    plain = all(not part._forward_hooks and not part._forward_hooks_with_kwargs for part in model.modules())
    return plain and applying._ATTRIBUTE not in vars(model)


@settings(max_examples=50)
@given(dtypes, names, st.booleans(), st.integers(0, 2**20))
def test_what_is_saved_is_loaded(dtype, where, weights_too, seed):
    model = Net(seed, dtype)
    new = {"conv.weight": change(model.conv.weight, seed, "few")} if weights_too else None
    patch = patch_of(model, {name: gate_at(model, name, inputs(seed, dtype), seed, 0.25) for name in where}, new)
    data = patch.to_bytes()
    again = Patch.from_bytes(data)
    assert again == patch
    assert again.to_bytes() == data
    assert again.manifest == patch.manifest
    assert [entry.layer for entry in again.manifest.gates] == sorted(where) == sorted(again.gates)
    for name, gate in patch.gates.items():
        assert all(same_bits(again.gates[name].parts[part], tensor) for part, tensor in gate.parts.items())
    assert patch.nbytes == sum(part.nbytes for part in (*patch.operations.values(), *patch.gates.values()))


def test_a_patch_holds_a_copy_and_every_number_of_it_counts():
    model = Net()
    gate = gate_at(model, "head", inputs())
    patch = patch_of(model, {"head": gate})
    assert repr(patch) == f"<Patch {patch.id[:12]}: 0 tensors, 1 gate, {patch.nbytes} bytes>"
    assert patch != patch_of(model, {})
    assert patch != patch_of(model, {"body.0": gate})
    kept = patch.id
    for part in gate.parts.values():
        part.view(-1)[-1] += 1
        assert patch_of(model, {"head": gate}).id != kept
    assert Patch.from_bytes(patch.to_bytes()).id == kept
    half = {name: part.half() for name, part in gate.parts.items()}
    mixed = patch_of(model, {"head": Gate(half["keys"], gate.radii.double(), half["values"].bfloat16())})
    assert {part.dtype for part in Patch.from_bytes(mixed.to_bytes()).gates["head"].parts.values()} == {
        torch.float16,
        torch.float64,
        torch.bfloat16,
    }


@settings(max_examples=60)
@given(dtypes, names, st.sampled_from([(8,), (4, 2), (2, 2, 2)]), st.integers(0, 2**20))
def test_inside_the_values_are_added_and_outside_and_afterwards_every_bit_is_the_base_s(dtype, where, shape, seed):
    model = Net(seed, dtype)
    x, others = inputs(seed, dtype, shape), inputs(seed + 1, dtype, shape)
    before, plain, elsewhere = snapshot(model), model(x).detach(), model(others).detach()
    kinds = [type(part) for part in model.modules()]
    last = sorted(where, key=list(SIZES).index)[-1]
    patch = patch_of(model, {name: gate_at(model, name, x, seed, 1e-6, 0.01 + (name == last)) for name in where})
    patch.apply(model)
    assert unchanged(model, before)
    assert [type(part) for part in model.modules()] == kinds
    assert same_bits(model(others).detach(), elsewhere)
    first = sorted(where, key=list(SIZES).index)[0]
    expected = gated(
        *(given_to(model, first, x), model.get_submodule(first).forward(given_to(model, first, x))),
        *patch.gates[first].parts.values(),
    )
    assert isinstance(model.get_submodule(first)._forward_hooks[KEY], GateHook)
    assert same_bits(gate_of(model.get_submodule(first)).values, patch.gates[first].values)
    assert torch.equal(model.get_submodule(first)(given_to(model, first, x)), expected)
    assert not torch.equal(model(x), plain)
    patch.revert(model)
    assert bare(model)
    assert gate_of(model.get_submodule(first)) is None
    assert same_bits(model(x).detach(), plain)
    assert unchanged(model, before)


@settings(max_examples=40)
@given(dtypes, st.integers(2, 4), st.integers(0, 2**20), st.data())
def test_the_order_of_patches_does_not_matter_and_the_nearest_key_wins(dtype, count, seed, data):
    """Balls of several patches overlap; what is on answers as one book of all keys would."""
    model, x = Net(seed, dtype), inputs(seed, dtype, (20,))
    patches = [
        patch_of(model, {"head": gate_at(model, "head", inputs(seed + n, dtype, (5,)), n, 1.0)}) for n in range(count)
    ]
    given, plain = given_to(model, "head", x), model(x)
    for on in itertools.combinations(patches, data.draw(st.integers(1, count))):
        answers = []
        for order in (data.draw(st.permutations(on)), data.draw(st.permutations(on))):
            for patch in order:
                patch.apply(model)
            answers.append(model(x))
            for patch in data.draw(st.permutations(on)):
                patch.revert(model)
            assert bare(model)
        assert same_bits(answers[0].detach(), answers[1].detach())
        book = [torch.cat([patch.gates["head"].parts[part] for patch in on]) for part in ("keys", "radii", "values")]
        assert torch.equal(answers[0], gated(given, plain, *book))


def test_a_later_patch_has_the_last_word_on_one_key():
    """Whatever their ids are: in one of the two the later one's is the smaller."""
    model, x = Net(), inputs(shape=(1,))
    ids = set()
    for seed in range(8):
        one = patch_of(model, {"head": gate_at(model, "head", x, seed)})
        one.apply(model)
        two = patch_of(model, {"head": gate_at(model, "head", x, seed + 10)})
        two.apply(model)
        ids.add(one.id < two.id)
        assert torch.equal(model(x), model.head.forward(given_to(model, "head", x)) + two.gates["head"].values)
        with pytest.raises(PatchConflict, match="required by"):
            one.revert(model)
        two.revert(model)
        assert torch.equal(model(x), model.head.forward(given_to(model, "head", x)) + one.gates["head"].values)
        one.revert(model)
        assert bare(model)
    assert ids == {True, False}


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_gates_of_one_patch_go_together(dtype):
    model, x = Net(1, dtype), inputs(1, dtype)
    before, plain = snapshot(model), model(x)
    weights = patch_of(model, {}, {"body.0.weight": change(model.body[0].weight, 3, "outer")})
    with weights.applied(model):
        gate = gate_at(model, "head", x[:2], 0, 1e-6)
        wanted = model(x).clone()
        wanted[:2] += gate.values
    both = patch_of(model, {"head": gate}, {"body.0.weight": change(model.body[0].weight, 3, "outer")})
    with both.applied(model):
        assert same_bits(model(x)[2:].detach(), wanted[2:].detach())
        assert torch.equal(model(x), wanted)
        assert unchanged(model, compose(before, [weights]))
    assert same_bits(model(x).detach(), plain.detach())
    assert unchanged(model, before)
    assert bare(model)


def test_other_hooks_stay_as_they_are_and_where_they_are():
    model, x = Net(), inputs()
    order = []
    first = model.head.register_forward_hook(lambda *a: order.append("first"))
    one, two = (patch_of(model, {"head": gate_at(model, "head", x, seed)}) for seed in (0, 1))
    one.apply(model)
    model.head.register_forward_hook(lambda *a: order.append(type(a[-1])), with_kwargs=True)
    keys = list(model.head._forward_hooks)
    two.apply(model)
    assert list(model.head._forward_hooks) == keys
    one.revert(model)
    assert list(model.head._forward_hooks) == keys
    two.revert(model)
    assert list(model.head._forward_hooks) == [keys[0], keys[2]]
    order.clear()
    model(x)
    assert order == ["first", torch.Tensor]
    first.remove()
    assert len(model.head._forward_hooks) == len(model.head._forward_hooks_with_kwargs) == 1


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("act", ["first", "second", "revert one", "revert last"])
def test_a_fault_between_writes_puts_everything_back(monkeypatch, fault, at, act):
    model, x = Net(), inputs()
    model.head.register_forward_hook(lambda *a: None, with_kwargs=True)
    one, two = (
        patch_of(
            model,
            {name: gate_at(model, name, x, seed) for name in ("body.0", "head")},
            {"conv.bias": model.conv.bias.detach() + seed, "head.bias": model.head.bias.detach() - seed},
        )
        for seed in (1, 2)
    )
    if act != "first":
        one.apply(model)
    if act == "revert one":
        two.apply(model)
    model.head.register_forward_hook(lambda *a: None)
    before, on, answers = snapshot(model), applied(model), model(x).detach()
    hooks = [(list(p._forward_hooks.items()), dict(p._forward_hooks_with_kwargs)) for p in model.modules()]
    count = itertools.count()

    def faulty(real):
        def call(*args):
            number = next(count)
            if number == at // 2 and at % 2 == 0:
                raise fault
            real(*args)
            if number == at // 2:
                raise fault

        return call

    for name in ("_put", "_hang"):
        monkeypatch.setattr(applying, name, faulty(getattr(applying, name)))
    with pytest.raises(fault):
        getattr(two if act == "second" else one, "revert" if "revert" in act else "apply")(model)
    assert unchanged(model, before)
    assert applied(model) == on
    assert hooks == [(list(p._forward_hooks.items()), dict(p._forward_hooks_with_kwargs)) for p in model.modules()]
    monkeypatch.undo()
    assert same_bits(model(x).detach(), answers)


def test_a_fault_while_it_is_remembered_puts_everything_back(monkeypatch):
    model, x = Net(), inputs()
    patch = patch_of(model, {"head": gate_at(model, "head", x)})
    real = applying._remember

    def faulty(model, state):
        real(model, state)
        if state is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(applying, "_remember", faulty)
    with pytest.raises(KeyboardInterrupt):
        patch.apply(model)
    assert bare(model)


def test_copies_can_be_reverted_on_their_own():
    model, x = Net(), inputs()
    plain = model(x).detach()
    patch = patch_of(model, {"head": gate_at(model, "head", x), "conv": gate_at(model, "conv", x)})
    patch.apply(model)
    answers = model(x).detach()
    twin = copy.deepcopy(model)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    patch.revert(model)
    assert bare(model)
    for other in (twin, loaded):
        assert same_bits(other(x).detach(), answers)
        assert applied(other) == (patch,)
        patch.revert(other)
        assert bare(other)
        assert same_bits(other(x).detach(), plain)


def test_in_another_process_a_new_hook_does_not_take_a_gate_s_place(tmp_path):
    model = nn.Sequential(OrderedDict(head=nn.Linear(4, 3)))
    x = inputs()
    keys = Gate(x, torch.zeros(8), torch.ones(8, 3))
    patch = Patch.between(model.state_dict(), {}, fingerprint=fingerprint(model), gates={"head": keys})
    expected = (model(x) + 1).detach()
    patch.apply(model)
    torch.save((model, patch, x, expected), tmp_path / "all.pt")
    code = """
import sys, torch
model, patch, x, expected = torch.load(sys.argv[1], weights_only=False)
seen = []
model.head.register_forward_hook(lambda *a: seen.append(1))
assert torch.equal(model(x), expected) and seen
patch.revert(model)
print(torch.equal(model(x) + 1, expected), len(model.head._forward_hooks))
"""
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "all.pt"], capture_output=True, text=True)
    assert ran.stderr == ""
    assert ran.stdout.split() == ["True", "1"]


def test_a_module_with_two_names_has_one_hook():
    model, x = Net(), inputs()
    one = patch_of(model, {"body.2": gate_at(model, "body.2", x)})
    keys = given_to(model, "body.2", x)[8:]
    two = patch_of(model, {"again": Gate(keys, torch.zeros(8), torch.ones(8, 6))})
    one.apply(model)
    two.apply(model)
    assert list(model.again._forward_hooks) == [KEY]
    assert len(model.again._forward_hooks[KEY].gate.keys) == 24
    one.revert(model)
    assert torch.equal(model.again(keys), model.again.forward(keys) + 1)
    two.revert(model)
    assert bare(model)
    both = patch_of(model, {**one.gates, **two.gates})
    with both.applied(model):
        assert len(model.again._forward_hooks[KEY].gate.keys) == 24
    assert bare(model)


def test_training_through_a_gate_gives_the_gradients_of_the_base():
    model, x = Net(), inputs()
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with patch_of(model, {"head": gate_at(model, "head", x)}).applied(model):
        model(x).sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def wrong(model, name, width=4, out=4):
    return patch_of(model, {name: Gate(torch.zeros(1, width), torch.ones(1), torch.ones(1, out))})


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("heat", (5, 3), "'heat', which the model does not have; the nearest of its modules are 'head'"),
        ("body.0.weight", (4, 6), "which the model does not have"),
        ("head", (6, 3), "from 6 to 3 features; it has 5 to 3"),
        ("head", (5, 4), "from 5 to 4 features; it has 5 to 3"),
        ("conv", (6, 6), "from 6 to 6 features; it has 5 to 6 or 6 to 5"),
    ],
)
def test_gates_that_do_not_fit_are_refused_with_the_model_untouched(name, sizes, words):
    model = Net()
    before = snapshot(model)
    with pytest.raises(BaseMismatch, match=words):
        wrong(model, name, *sizes).apply(model)
    assert unchanged(model, before)
    assert bare(model)


def test_modules_that_do_not_say_their_sizes_are_checked_at_the_call_and_against_one_another():
    model, x = Net(), inputs()
    patch = wrong(model, "body.1", 6, 5)
    patch.apply(model)
    with pytest.raises(ShapeMismatch, match=r"'body.1' needs .* \(\.\.\., 6\) .* \(\.\.\., 5\).*\(8, 6\)"):
        model(x)
    with pytest.raises(BaseMismatch, match="from 6 to 6 features; it has 6 to 5"):
        patch_of(model, {"body.1": Gate(torch.zeros(1, 6), torch.ones(1), torch.ones(1, 6))}).apply(model)
    patch.revert(model)
    assert bare(model)


def test_other_weights_and_scripted_modules_are_refused():
    model, x = Net(), inputs()
    patch = patch_of(model, {"head": gate_at(model, "head", x)})
    with pytest.raises(BaseMismatch, match="made for other weights"):
        patch.apply(Net(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(model, x)
    with pytest.raises(NotEditable, match="'head' is TorchScript"):
        patch.apply(scripted)
    patch.apply(model)
    with pytest.raises(PatchConflict, match="applied already"):
        patch.apply(model)
    model.head.bias.data.add_(1)
    with pytest.raises(BaseMismatch, match="have changed since"):
        patch.revert(model)


def test_hostile_module_names_are_refused():
    gate = Gate(torch.ones(1, 1), torch.ones(1), torch.ones(1, 1))
    for name in ("", "a/b", "a..b", "x" * 257, "a\x1b[2J"):
        with pytest.raises(InvalidInput, match="module name"):
            Patch.between({}, {}, fingerprint="0" * 64, gates={name: gate})


def test_files_of_weights_cannot_hold_gates(tmp_path, capsys):
    model, x = Net(), inputs()
    patch = patch_of(model, {"head": gate_at(model, "head", x)}, {"head.bias": model.head.bias.detach() + 1})
    words = rf"patch {patch.id[:12]} has gates \(at 'head'\).*live model: Patch.load"
    with pytest.raises(NotEditable, match=words):
        Weights(snapshot(model)).apply(patch)
    with pytest.raises(NotEditable, match=words):
        compose(snapshot(model), [patch])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, path := tmp_path / "m.safetensors")
    before = path.read_bytes()
    patch.save(tmp_path / "a.patch.safetensors")
    assert main(["apply", str(tmp_path / "a.patch.safetensors"), "--weights", str(path)]) == 2
    shown = capsys.readouterr()
    assert "has gates (at 'head')" in shown.err
    assert "Traceback" not in shown.err
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_gates_that_are_slipped_beside_a_file_of_weights_are_refused(tmp_path):
    """The folder beside the file holds patches by their id: forge the record, too."""
    model, x = Net(), inputs()
    plain = patch_of(model, {}, {"head.bias": model.head.bias.detach() + 1})
    gate = patch_of(model, {"head": gate_at(model, "head", x)}, {"head.bias": model.head.bias.detach() + 1})
    save_weights(path := tmp_path / "m.safetensors", Weights(snapshot(model)).apply(plain))
    gate.save(tmp_path / "m.safetensors.patched" / f"{gate.id}.patch.safetensors")
    path.write_bytes(path.read_bytes().replace(plain.id.encode(), gate.id.encode()))
    with pytest.raises(NotEditable, match="has gates"):
        load_weights(path)


def test_inspecting_shows_gates(tmp_path, capsys):
    model, x = Net(), inputs()
    gates = {name: gate_at(model, name, x) for name in ("conv", "head")}
    patch_of(model, gates, {"head.bias": model.head.bias.detach() + 1}).save(path := tmp_path / "a.patch.safetensors")
    found = describe(path)
    shapes = {name: {part: list(t.shape) for part, t in gate.parts.items()} for name, gate in gates.items()}
    assert found["gates"] == [
        {"layer": "conv", "readings": [0], "bytes": gates["conv"].nbytes, "parts": shapes["conv"]},
        {"layer": "head", "readings": [1], "bytes": gates["head"].nbytes, "parts": shapes["head"]},
    ]
    assert found["tensors"][0]["name"] == "head.bias"
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gates"] == found["gates"]
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "gate at module" in shown
    assert f"{gates['conv'].nbytes}" in shown
    patch_of(model, {}, {"head.bias": model.head.bias.detach() + 1}).save(path)
    assert describe(path)["gates"] == []
    assert main(["inspect", str(path)]) == 0
    assert "gate" not in capsys.readouterr().out


def wrapped(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def in_place(model):
    model.compile(backend="eager")
    return model


def inside(model):
    return nn.Sequential(torch.compile(model, backend="eager"))


def function(model):
    return torch.compile(lambda x: model(x), backend="eager")


def part(model):
    model.head = torch.compile(model.head, backend="eager")
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("how", "dtype"),
    [*((how, torch.float32) for how in (wrapped, in_place, inside, function, part)), (wrapped, torch.bfloat16)],
)
def test_what_was_compiled_before_sees_gates_come_and_go(how, dtype):
    torch._dynamo.reset()
    model, x, others = Net(0, dtype), inputs(0, dtype), inputs(1, dtype)
    one, two = (
        patch_of(model, {"head": gate_at(model, "head", x[n : n + 1], n, 1e-6)}, {"conv.bias": model.conv.bias + n})
        for n in (0, 1)
    )
    compiled = how(model)
    plain, elsewhere = compiled(x), compiled(others)
    one.apply(model)
    assert same_bits(compiled(others).detach(), elsewhere.detach())
    assert same_bits(compiled(x).detach(), model(x).detach())
    assert [bool(row) for row in (compiled(x) != plain).any(1)] == [True, *[False] * 7]
    two.apply(model)
    with pytest.raises(PatchConflict):
        two.apply(model)
    assert torch.equal(compiled(x), model(x))
    one.revert(model)
    two.revert(model)
    assert same_bits(compiled(x).detach(), plain.detach())
    assert bare(model)


def test_a_compiled_model_can_be_given_and_is_its_inside():
    model, x = Net(), inputs()
    plain, mark = model(x).detach(), fingerprint(model)
    patch = patch_of(model, {"head": gate_at(model, "head", x)}, {"head.bias": model.head.bias.detach() + 1})
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    assert fingerprint(compiled) == mark
    patch.apply(compiled)
    assert applied(compiled) == applied(model) == (patch,)
    assert base_fingerprint(compiled) == base_fingerprint(model) == mark
    assert applying._ATTRIBUTE not in vars(compiled)
    assert torch.equal(compiled(x), model(x))
    assert ((model(x) - plain) != 0).all()
    patch.revert(model)
    assert applied(compiled) == ()
    assert same_bits(compiled(x).detach(), plain)
    part(model)
    assert fingerprint(model) == mark
    patch.apply(model)
    patch.revert(model)
    assert bare(model)


def test_compiled_parts_are_gated_under_the_names_of_the_eager_model():
    model, x = Net(), inputs()
    patch = patch_of(model, {name: gate_at(model, name, x) for name in ("body.0", "conv")})
    with patch.applied(model):
        expected = model(x)
    model.body, model.conv = (torch.compile(part, backend="eager") for part in (model.body, model.conv))
    model(x)
    with patch.applied(model):
        assert torch.equal(model(x), expected)
    assert bare(model)


def test_a_module_that_is_compiled_between_two_patches_has_one_hook():
    model, x = Net(), inputs()
    one, two = (patch_of(model, {"conv": gate_at(model, "conv", x[seed:], seed)}) for seed in (0, 4))
    with one.applied(model), two.applied(model):
        expected = model(x)
    one.apply(model)
    model.conv = torch.compile(model.conv, backend="eager")
    two.apply(model)
    assert torch.equal(model(x), expected)
    one.revert(model)
    two.revert(model)
    assert bare(model)


def quantised(seed=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(Net(seed), {nn.Linear}, dtype=torch.qint8)


def test_quantised_modules_can_be_gated():
    model, x, others = quantised(), inputs(), inputs(1)
    plain, elsewhere = model(x), model(others)
    patch = patch_of(model, {"head": gate_at(model, "head", x, 0, 1e-6)})
    assert type(model.head) is not nn.Linear
    patch.apply(model)
    # What is quantised depends on the whole batch, and the batches are those from which the keys were taken
    assert torch.equal(model(x), plain + patch.gates["head"].values)
    assert same_bits(model(others), elsewhere)
    twin = copy.deepcopy(model)
    for other in (model, twin):
        patch.revert(other)
        assert same_bits(other(x), plain)
        assert bare(other)
    with pytest.raises(BaseMismatch, match="made for other weights"):
        patch.apply(quantised(1))
    with pytest.raises(BaseMismatch, match="it has 5 to 3"):
        wrong(model, "head", 5, 4).apply(model)


def test_quantising_a_gated_model_keeps_the_gates():
    model = Net()
    patch = patch_of(model, {"body.0": gate_at(model, "body.0", x := inputs())})
    plain = quantised()
    patch.apply(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert torch.equal(found.body[0](x), plain.body[0](x) + patch.gates["body.0"].values)
    with pytest.raises(BaseMismatch, match="have changed"):
        patch.revert(found)
