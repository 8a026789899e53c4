"""Replays against the slow oracle: a full pass of a deep copy."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import network_cases as cases
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from network_cases import NETS, Net, gradients, made, moved, oracle, tensors
from torch import Tensor, nn

from weightpatch.errors import NotEditable
from weightpatch.network import Network


@pytest.fixture(params=NETS, ids=lambda net: net.name)
def net(request: pytest.FixtureRequest) -> Net:
    return request.param


def recorded(network: Network) -> list[str]:
    """The names of the calls that the network's first plan records."""
    plans = [plan for kept in network._replayer._plans.values() for plan in kept]
    return [name for name, index in plans[0].sequence if index >= 0]


def close(one: Any, two: Any, tolerance: float = 1e-6) -> None:
    for a, b in zip(tensors(one), tensors(two), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=tolerance * max(1.0, float(b.detach().abs().max())))


def test_answers_and_gradients_are_those_of_a_full_pass(net: Net):
    model = made(net)
    network = Network(model, net.parameters)
    batches = [net.inputs(3), net.inputs(5)]
    for seed in range(3):
        for args, kwargs in batches:
            params = moved(network.start, seed)
            mine = network.at(params)(*args, **kwargs)
            expected = oracle(model, params, args, kwargs)
            close(mine, expected)
            for a, b in zip(gradients(mine, params), gradients(expected, params), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not network.full_passes_because


def test_the_plan_is_the_expected_one(net: Net):
    network = Network(made(net), net.parameters)
    args, kwargs = net.inputs(3)
    network.before(*args, **kwargs)
    if net.recorded is not None:
        assert tuple(recorded(network)) == net.recorded
    assert not network.full_passes_because


def test_nothing_of_the_users_changes(net: Net):
    model = made(net).train()
    model.register_forward_hook(lambda *_: None)
    args, kwargs = net.inputs(3)
    args, kwargs = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, kwargs))
    given_before = [t.clone() for t in tensors((args, kwargs))]
    before = zoo.digest(model)
    network = Network(model, net.parameters)
    for seed in range(2):
        params = moved(network.start, seed)
        gradients(network.at(params)(*args, **kwargs), params)
    names = {"glue": ("batch",), "transformer-decoder": ("src", "tgt"), "transformer-encoder": ("src", "tgt")}
    inputs = {**dict(zip(names[net.name], args, strict=True)), **kwargs} if kwargs else args
    network.run(network.start, network.record(inputs))
    assert zoo.digest(model) == before
    assert all(torch.equal(a, b) for a, b in zip(given_before, tensors((args, kwargs)), strict=True))
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_edit_that_changes_nothing_changes_nothing(net: Net):
    network = Network(made(net), net.parameters)
    args, kwargs = net.inputs(4)
    first = network.before(*args, **kwargs)
    same = {name: value.clone().requires_grad_() for name, value in network.start.items()}
    for function in (network.before, network.at(same), network.full(same)):
        for a, b in zip(tensors(first), tensors(function(*args, **kwargs)), strict=True):
            assert torch.equal(a, b)


def test_the_second_pass_on_a_batch_is_a_replay(monkeypatch: pytest.MonkeyPatch):
    model = zoo.TinyResNet().eval()
    network = Network(model, "layer2.*")
    calls: list[int] = []
    network._replayer._modules["layer1.0.conv1"].register_forward_hook(lambda *_: calls.append(1))
    x, y = cases.floats(2, 3, 8, 8), cases.floats(4, 3, 8, 8)
    network.before(x)
    learning = len(calls)
    for seed in range(5):
        network.at(moved(network.start, seed))(x)
    assert len(calls) == learning
    network.before(y)
    assert len(calls) == learning + 1  # another batch size needs one pass, and no probe
    assert torch.equal(network.before(y), network.full(network.start)(y))


@pytest.mark.parametrize("room", ["enough", "for three"])
def test_many_small_batches_in_turn_are_replayed_and_large_ones_do_not_drive_each_other_out(room):
    network = Network(zoo.TinyResNet().eval(), "layer2.*")
    calls: list[int] = []
    network._replayer._modules["layer1.0.conv1"].register_forward_hook(lambda *_: calls.append(1))
    batches = [cases.floats(2, 3, 8, 8) for _ in range(20)]
    recordings = network._replayer._recordings
    if room == "for three":
        recordings._nbytes = 3 * network.record(batches[0]).nbytes
    expected = [network.full(network.start)(x) for x in batches]

    def passes(some) -> int:
        calls.clear()
        for x in some:
            assert torch.equal(network.before(x), next(y for x_, y in zip(batches, expected, strict=True) if x_ is x))
        return len(calls)

    passes(batches + batches)
    for _ in range(2):
        assert passes(batches) == (0 if room == "enough" else 12)  # eight are kept whatever their size
    assert passes([*batches[10:12]] * 5) == (0 if room == "enough" else 2)  # what is used now drives out what is not
    del batches[:]
    network.before(cases.floats(3, 3, 8, 8))
    assert len(recordings._kept) == 1


def test_unused_recordings_make_room():
    network = Network(zoo.TinyResNet().eval(), "layer2.*")
    recordings = network._replayer._recordings
    recordings._nbytes, recordings._most = 0, 10
    batches = [cases.floats(2, 3, 8, 8) for _ in range(15)]
    for x in batches:
        network.before(x)
    assert len(recordings._kept) == 10
    held = [kept.recording for kept in recordings._kept.values() if kept.recording]
    assert len(held) == 3  # five of the eight were the oldest of fifteen that were seen


def test_only_what_replays_read_is_stored():
    network = Network(zoo.TinyResNet(), "layer2.*")
    x = cases.floats(16, 3, 8, 8)
    recording = network.record(x)
    layer1 = 16 * 8 * 8 * 8 * 4
    assert layer1 <= recording.nbytes <= layer1 + 100
    dead = [leaf for call in recording.calls[:-1] for leaf in call.leaves]
    assert len(dead) == 3
    assert all(leaf.untyped_storage().nbytes() == 4 and bool(leaf.isnan().all()) for leaf in dead)
    torch.testing.assert_close(network.run(network.start, recording), network.full(network.start)(x), rtol=0, atol=0)
    torch.testing.assert_close(recording.output, network.before(x), rtol=0, atol=0)


def test_recordings_do_not_keep_inputs_alive():
    network = Network(zoo.TinyResNet(), "layer2.*")
    x = cases.floats(2, 3, 8, 8)
    network.before(x)
    ref = weakref.ref(x)
    del x
    gc.collect()
    assert ref() is None


def test_an_input_changed_in_place_is_not_taken_for_the_old_one():
    model = zoo.TinyResNet().eval()
    network = Network(model, "fc.*")
    x = cases.floats(2, 3, 8, 8)
    first = network.before(x)
    recording = network.record(x)
    x.mul_(3.0)
    assert not torch.allclose(network.before(x), first)
    close(network.before(x), oracle(model, network.start, (x,), {}))
    with pytest.raises(ValueError, match="changed in place"):
        network.run(network.start, recording)


def test_ever_new_inputs_are_not_recorded(monkeypatch: pytest.MonkeyPatch):
    network = Network(zoo.TinyResNet(), "fc.*")
    made_recordings = []
    record = network._replayer._record
    monkeypatch.setattr(network._replayer, "_record", lambda *a: made_recordings.append(1) or record(*a))
    for seed in range(30):
        network.before(cases.floats(1, 3, 8, 8, seed=seed))
    assert len(made_recordings) == 8
    x = cases.floats(1, 3, 8, 8, seed=99)
    for _ in range(3):
        network.before(x)
    assert len(made_recordings) == 9  # seen again, so recorded, then replayed


def test_a_gradient_for_the_inputs_takes_a_full_pass():
    model = zoo.TinyResNet().eval()
    network = Network(model, "fc.*")
    x = cases.floats(2, 3, 8, 8)
    network.before(x)
    wanted = x.clone().requires_grad_()
    (mine,) = torch.autograd.grad(network.before(wanted).sum(), wanted)
    (expected,) = torch.autograd.grad(oracle_live(model, wanted).sum(), wanted)
    torch.testing.assert_close(mine, expected)


def oracle_live(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def test_second_derivatives_and_torch_func():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh()).eval()
    network = Network(model, "2.*")
    (x,), _ = cases.x6(4)

    def objective(params: dict[str, Tensor]) -> Tensor:
        return network.at(params)(x).square().sum()

    direct = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())
    for _ in range(2):  # before and after the batch is recorded
        mine, expected = torch.func.grad(objective)(network.start), direct(network.start)
        for name in network.names:
            torch.testing.assert_close(mine[name], expected[name])
        network.before(x)
    params = moved(network.start, 0)
    first = torch.autograd.grad(objective(params), list(params.values()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), list(params.values()))
    plain = {name: value.detach().requires_grad_() for name, value in params.items()}
    again = torch.autograd.grad(
        torch.func.functional_call(model, plain, (x,)).square().sum(), list(plain.values()), create_graph=True
    )
    for a, b in zip(
        second, torch.autograd.grad(sum(g.square().sum() for g in again), list(plain.values())), strict=True
    ):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- what cannot be replayed


class Fickle(nn.Module):
    """Takes another way whenever something outside of it says so."""

    way = "left"

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left if Fickle.way == "left" else self.right)(x))


def test_another_way_through_the_model_is_seen(monkeypatch: pytest.MonkeyPatch):
    model = Fickle()
    network = Network(model, "head.*")
    (x,), _ = cases.x6(3)
    network.before(x)
    monkeypatch.setattr(Fickle, "way", "right")
    with pytest.warns(UserWarning, match=r"Fickle is run in full passes: left is not called"):
        mine = network.before(x)
    close(mine, oracle(model, network.start, (x,), {}))
    assert "left is not called" in network.full_passes_because
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(network.at(network.start)(x), mine)


class InputBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.left(x) if x.sum() > 0 else self.right(x) * 2)


def test_a_way_chosen_by_the_input_gets_a_plan_of_its_own():
    model = InputBranch()
    network = Network(model, "head.*")
    batches = [cases.floats(3, 6).abs(), -cases.floats(3, 6).abs()]
    for _ in range(3):
        for x in batches:
            params = moved(network.start, 1)
            close(network.at(params)(x), oracle(model, params, (x,), {}))
    assert not network.full_passes_because
    assert sorted(name for plans in network._replayer._plans.values() for plan in plans for name in plan.names) == [
        "left",
        "right",
    ]


class InputDependence(nn.Module):
    """The same calls in the same order, but for some inputs `block` is given what depends on the edit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.edited, self.block = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        z = self.edited(h)
        return self.block(h * 1.0 if x.sum() > 0 else z * 1.0) + z[:, :3]


@pytest.mark.parametrize("tracked", [True, False])
def test_what_depends_on_the_edit_may_change_with_the_input(tracked: bool):
    model = InputDependence()
    network = Network(model, "edited.*")
    with torch.set_grad_enabled(tracked):
        for seed in range(3):
            for x in (cases.floats(3, 6).abs(), -cases.floats(3, 6).abs()):
                params = moved(network.start, seed)
                close(network.at(params)(x), oracle(model, params, (x,), {}))


class Counting(nn.Module):
    """Answers differently at every call, even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.calls = nn.Linear(6, 6), nn.Linear(6, 3), 0
        self.register_buffer("mean", torch.zeros(6))
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        self.calls += 1
        self.history.append(h)
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.head(h - self.mean) * self.calls


def test_a_model_that_remembers_starts_every_pass_from_the_same_state():
    model = Counting()
    model.eval()(cases.floats(2, 6, seed=5))
    before = zoo.digest(model)
    network = Network(model, "head.*")
    with pytest.warns(UserWarning, match="remember something"):
        network.before(cases.floats(3, 6))
    for seed in range(3):
        params = moved(network.start, seed)
        x = cases.floats(3, 6, seed=seed)
        mine, expected = network.at(params)(x), oracle_without_history(model, params, x)
        close(mine, expected)
        gradients(mine, params)
    assert zoo.digest(model) == before
    assert (model.calls, len(model.history)) == (1, 1)


def oracle_without_history(model: Counting, params: dict[str, Tensor], x: Tensor) -> Tensor:
    history, model.history = model.history, []
    try:
        return oracle(model, params, (x,), {})
    finally:
        model.history = history


class StaleCache(nn.Module):
    """Keeps a function of the edited weight from its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.kept = nn.Linear(6, 6), nn.Linear(6, 3), None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.head.weight.t() * 2
        return self.stem(x) @ self.kept


def test_a_cache_of_an_edited_weight_is_not_trusted():
    model = StaleCache()
    network = Network(model, "head.weight")
    (x,), _ = cases.x6(3)
    with pytest.warns(UserWarning, match="remember something"):
        network.before(x)
    params = moved(network.start, 1)
    close(network.at(params)(x), oracle(model, params, (x,), {}))
    assert model.kept is None


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.dropout(self.stem(x), 0.5, True))


def test_a_model_that_draws_draws_the_same_every_time():
    network = Network(Noisy(), "head.*")
    (x,), _ = cases.x6(3)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="draws random numbers"):
        first = network.before(x)
    torch.rand(7)
    assert torch.equal(network.before(x), first)
    torch.manual_seed(3)
    network.before(x)
    assert torch.equal(torch.get_rng_state(), state)


class Opaque(nn.Module):
    """Hands a value on through numpy, unseen by torch: the edit's effect on `codes` must not be lost."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.edited, self.codes = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.edited(self.stem(x))
        shift = torch.from_numpy(z.detach().numpy() * 2.0)
        return self.codes(shift) + z


def test_values_that_leave_torch_and_come_back():
    model = Opaque()
    network = Network(model, "edited.*")
    (x,), _ = cases.x6(3)
    for seed in range(2):
        params = moved(network.start, seed)
        close(network.at(params)(x), oracle(model, params, (x,), {}))
    assert recorded(network) == ["stem"]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda h: self.head(self.stem(h).tanh()), x, use_reentrant=False)


def test_activation_checkpointing_is_refused_rather_than_wrong():
    with pytest.raises(NotEditable, match="checkpointing"):
        Network(Checkpointed(), "stem.*").before(cases.floats(2, 6))


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.attention = nn.Linear(6, 6), nn.Linear(6, 3), nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        h = self.stem(x)
        if fail:
            raise KeyError("the user's own")
        return self.head(h)


@pytest.mark.parametrize("replay", [True, False])
def test_the_users_exception_passes_and_leaves_nothing_behind(replay: bool):
    model = Failing()
    before = zoo.digest(model)
    network = Network(model, "head.*", replay=replay)
    (x,), _ = cases.x6(3)
    with pytest.raises(KeyError, match="the user's own"):
        network.before(x, fail=True)
    assert zoo.digest(model) == before
    first = network.before(x)
    with pytest.raises(KeyError, match="the user's own"):
        network.at(moved(network.start, 1))(x, fail=True)
    assert torch.equal(network.before(x), first)
    assert zoo.digest(model) == before
    assert torch.backends.mha.get_fastpath_enabled()
    weights = dict(network._replayer._model.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in network.start.items())


def test_without_replay_answers_are_the_same(net: Net):
    model = made(net)
    network = Network(model, net.parameters, replay=False)
    args, kwargs = net.inputs(3)
    params = moved(network.start, 2)
    close(network.at(params)(*args, **kwargs), oracle(model, params, args, kwargs))
    assert kwargs or network.record(args).nbytes == 0


# ---------------------------------------------------------------- random graphs of modules


class Graph(nn.Module):
    """A random acyclic graph of modules and glue, with in-place work, reuse and views."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.relu, self.norm = nn.ReLU(inplace=True), nn.LayerNorm(4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        values = [x * 1.0]
        for kind, i, j in self.steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(self._step(kind, a, b, j))
        return sum(values)

    def _step(self, kind: str, a: Tensor, b: Tensor, j: int) -> Tensor:
        if kind == "linear":
            return self.layers[j % 3](a)
        if kind == "relu":
            return self.relu(a.clone())
        if kind == "relu alone":
            fresh = self.layers[j % 3](a)
            self.relu(fresh)
            return fresh
        if kind == "relu of linear":
            return self.relu(self.layers[j % 3](a))
        if kind == "in place":
            fresh = self.norm(a)
            fresh += b
            return fresh
        if kind == "view":
            fresh = self.block(a)
            fresh[:, :2].mul_(0.5)
            return fresh.flip(-1)
        if kind == "detach":
            return self.layers[j % 3](a.detach())
        if kind == "argmax":
            return self.norm(torch.nn.functional.one_hot(a.argmax(-1), 4).float())
        if kind == "branch":
            return self.layers[0](b) if bool(a.sum() > 0) else self.layers[1](b)
        return a * b.tanh()


KINDS = ["linear", "relu", "relu alone", "relu of linear", "in place", "view", "detach", "argmax", "branch", "product"]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 7), st.integers(0, 7)), min_size=2, max_size=8)


@settings(max_examples=150)
@given(steps=STEPS, pattern=st.sampled_from(["layers.0.*", "layers.2.*", "norm.*", "block.2.*", "layers.1.weight"]))
def test_random_graphs(steps: list[tuple[str, int, int]], pattern: str):
    torch.manual_seed(0)
    model = Graph(steps).eval()
    network = Network(model, pattern)
    batches = [cases.floats(3, 4), cases.floats(2, 4, seed=1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            for x in batches:
                params = moved(network.start, seed, 1.0)
                mine, expected = network.at(params)(x), oracle(model, params, (x,), {})
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.abs().max())))
                assert mine.requires_grad == expected.requires_grad
                if expected.requires_grad:
                    for a, b in zip(gradients(mine, params), gradients(expected, params), strict=True):
                        if a is None or b is None:
                            assert a is b
                        else:
                            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * max(1.0, float(b.abs().max())))
    assert not [w for w in caught if "full passes" in str(w.message)], network.full_passes_because


def test_layers_that_are_cast_give_gradients_to_their_masters():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(torch.bfloat16)
    network = Network(model, "2.*")
    assert {value.dtype for value in network.start.values()} == {torch.float32}
    params = moved(network.start, 0)
    x = cases.floats(4, 6).to(torch.bfloat16)
    mine = network.at(params)(x)
    expected = oracle(model, {name: value.to(torch.bfloat16) for name, value in params.items()}, (x,), {})
    assert mine.dtype == torch.bfloat16
    close(mine, expected)
    for a, b in zip(gradients(mine, params), gradients(expected, params), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)
    assert {value.dtype for value in network.rounded(params).values()} == {torch.bfloat16}


CALLERS: list[Callable[[], Any]] = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("caller", CALLERS)
def test_callers_without_gradients(caller: Callable[[], Any]):
    case = next(case for case in zoo.CASES if case.name == "encoder")
    with caller():
        model = case.model()
        x = case.inputs(3)
        network = Network(model, case.parameters)
        first = network.before(x)
        assert not first.requires_grad
        with network.isolated():
            params = moved(network.start, 0)
            mine = network.at(params)(x)
            assert all(g is not None for g in torch.autograd.grad(mine.sum(), list(params.values()), allow_unused=True))
        assert torch.equal(network.before(x), first)
        assert not network.full_passes_because
        x.zero_()
        assert torch.equal(network.before(x), network.full(network.start)(x))


class Box:
    def __init__(self, **parts: Tensor) -> None:
        vars(self).update(parts)


class Boxed(nn.Module):
    """Answers with an object that torch cannot look into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Box:
        h = torch.relu(self.trunk(x))
        return Box(a=self.a(h), b=self.b(h))


def test_outputs_that_an_edit_cannot_change_are_replayed_in_objects_too():
    model, x = Boxed().eval(), torch.randn(5, 8)
    network = Network(model)
    at, params = network.narrow(["b.weight"]), {"b.weight": network.start["b.weight"] + 1}
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(at(params)(x).a, model(x).a)
