"""The fast answers to a test set against copying the model and running all of it."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightpatch.evaluation import engines, predictor, products
from weightpatch.evaluation.predictor import Drift, FastPredictor, SlowPredictor
from weightpatch.evaluation.screening import Screen, margins, settle
from weightpatch.evaluation.steps import Halving, channels_last
from weightpatch.evaluation.tracing import Trace
from weightpatch.likelihoods import Categorical
from weightpatch.network import Network, structural_clone

BATCH = 16


@pytest.fixture
def _always_rough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Approximate first, whatever a timing on this machine says."""
    monkeypatch.setattr(predictor, "_SCREENED", 0)
    monkeypatch.setattr(predictor, "_GAIN", float("inf"))
    monkeypatch.setattr(predictor, "_NEGLIGIBLE", -1.0)
    monkeypatch.setattr(predictor, "_SAMPLE", 10)


def diverse(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Centre the logits, so that the answers are of many classes."""
    with torch.no_grad():
        logits = model.eval()(inputs)
        biases = [p for n, p in model.named_parameters() if p.shape == logits.shape[1:] and n.endswith("bias")]
        if biases:
            biases[-1] -= logits.mean(0)
    return model


def answers(outputs: Tensor) -> Tensor:
    return Categorical().answer(outputs)


def screen(outputs: Tensor) -> Screen:
    return Screen(Categorical(-1), outputs)


def edited(network: Network, scale: float, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    moved = {n: p + scale * p.abs().mean() * torch.randn(p.shape, generator=random) for n, p in network.start.items()}
    return network.rounded(moved)


def compared(
    model: nn.Module, parameters: str | tuple[str, ...], inputs: Tensor
) -> tuple[FastPredictor, SlowPredictor, Network]:
    network = Network(model, parameters)
    fast, slow = FastPredictor(model, network, inputs, BATCH), SlowPredictor(model, network, inputs, BATCH)
    assert torch.equal(answers(fast.base), answers(slow.base))
    return fast, slow, network


def agree(fast: FastPredictor, slow: SlowPredictor, network: Network) -> list[Tensor]:
    found = []
    for seed, scale in enumerate((0.01, 0.1, 1.0)):
        params = edited(network, scale, seed)
        ours, theirs = fast.predict(params), slow.predict(params)
        assert torch.equal(answers(ours.outputs), answers(theirs.outputs))
        exact = fast.drift_items == slow.drift_items
        assert ours.drift == pytest.approx(theirs.drift, rel=1e-4 if exact else 0.05, abs=1e-7 if exact else 1e-3)
        found.append(answers(theirs.outputs))
    unchanged = fast.predict(network.rounded(network.start))
    assert torch.equal(answers(unchanged.outputs), answers(slow.base))
    assert abs(unchanged.drift) < 1e-6
    return found


def test_every_kind_of_model(case: zoo.Case) -> None:
    model = diverse(case.model(), case.inputs(61))
    before = zoo.digest(model)
    found = agree(*compared(model, case.parameters, case.inputs(61)))
    assert zoo.digest(model) == before
    assert any(len(classes.unique()) > 1 for classes in found)


@pytest.mark.usefixtures("_always_rough")
def test_every_kind_of_model_screened(case: zoo.Case) -> None:
    fast, slow, network = compared(diverse(case.model(), case.inputs(61)), case.parameters, case.inputs(61))
    rounded = network.rounded(network.start)[network.names[0]].dtype != torch.float32
    assert (fast.drift_items == 61) == (rounded or isinstance(fast._fine, engines.Head))
    agree(fast, slow, network)


@pytest.mark.usefixtures("_always_rough")
@pytest.mark.parametrize(
    "parameters", ["*", "layer1.*", "layer2.1.*", "layer2.0.downsample.*", "layer1.1.bn2.*", "fc.*"]
)
def test_every_part_of_a_residual_network(parameters: str) -> None:
    case = next(case for case in zoo.CASES if case.name == "resnet")
    fast, slow, network = compared(diverse(case.model(), case.inputs(61)), parameters, case.inputs(61))
    assert fast.untraced_because == ""
    agree(fast, slow, network)
    # Some items were far enough from a tie; the last layer is always exact.
    assert (fast.predict(edited(network, 0.01)).exact < 61) == (parameters != "fc.*")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parameters", ["head.*", "head.weight"])
def test_only_the_classes_whose_weights_changed_are_computed(parameters: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(body=nn.Linear(6, 20), act=nn.Tanh(), head=nn.Linear(20, 40, bias=bias)))
    inputs = torch.randn(61, 6)
    fast, slow, network = compared(model, parameters, inputs)
    assert isinstance(fast._fine, engines.Head)
    agree(fast, slow, network)
    for classes in ([3], [0, 7, 39], list(range(20))):
        params = network.rounded(network.start)
        for value in params.values():
            value[classes] += 0.5 * torch.randn_like(value[classes])
        ours, theirs = fast.predict(params), slow.predict(params)
        assert torch.equal(answers(ours.outputs), answers(theirs.outputs))
        assert ours.drift == pytest.approx(theirs.drift, rel=1e-4)
        with torch.no_grad():
            exact = torch.func.functional_call(model, params, (inputs,))
        assert torch.allclose(fast._fine.over(fast._fine.weights(params)), exact, atol=1e-6)


@pytest.mark.parametrize("parameters", ["*", "layer2.*", "layer2.0.downsample.*", "fc.*"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_batch_behind_the_edit_is_bit_for_bit_that_of_a_full_pass(
    parameters: str, layout: torch.memory_format
) -> None:
    case = next(case for case in zoo.CASES if case.name == "resnet")
    model, inputs = case.model().to(memory_format=layout), case.inputs(40).to(memory_format=layout)  # type: ignore[call-overload]
    network = Network(model, parameters)
    with network.isolated(), torch.no_grad():
        engine = engines.Traced.of(model, network, inputs, BATCH)
        for seed in range(3):
            params = edited(network, 0.3, seed)
            for number, batch in enumerate(inputs.split(BATCH)):
                assert torch.equal(engine.batch(params, number), network.full(params)(batch))


class Pooling(nn.Module):
    """Takes 2×2 maxima of what may be negative and of what may not, of even and of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(c, c, 3, padding=1, groups=g) for c, g in ((2, 1), (2, 2), (2, 1))
        )
        self.pool1, self.pool2, self.pool3 = nn.MaxPool2d(2), nn.MaxPool2d((2, 2), 2), nn.MaxPool2d(2)
        self.relu, self.fc = nn.ReLU(), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.conv1(x)))
        x = self.pool2(self.conv2(x) + self.conv1(x))
        return self.fc(self.pool3(torch.relu(self.conv3(x))).mean((2, 3)))


@pytest.mark.usefixtures("_always_rough")
def test_maxima_of_signed_and_of_odd_sizes() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(61, 2, 12, 12)
    model = diverse(Pooling(), inputs)
    trace = Trace(structural_clone(model), ("conv1.weight",))
    pools = [step for step in trace.fused if isinstance(step, Halving)]
    assert [step.positive for step in pools] == [True, False, True]
    fast, slow, network = compared(model, "*", inputs)
    assert fast.untraced_because == ""
    agree(fast, slow, network)


def test_the_drift_is_that_of_the_definition_also_where_classes_are_impossible() -> None:
    random = torch.Generator().manual_seed(0)
    before, after = 5 * torch.randn(2, 50, 4, generator=random)
    assert Drift(before).to(after) == pytest.approx(float(Categorical().divergence(before, after).mean()), rel=1e-5)
    assert Drift(before).to(before) == 0
    before[:, 2] = after[:, 2] = -torch.inf
    assert Drift(before).to(after) == pytest.approx(float(Categorical().divergence(before, after).mean()), rel=1e-5)
    after[0, 1] = -torch.inf
    assert Drift(before).to(after) == torch.inf
    after[0, 0] = torch.nan
    assert math.isnan(Drift(before).to(after))


def test_a_convolution_swallows_what_follows_it() -> None:
    model = structural_clone(next(case for case in zoo.CASES if case.name == "resnet").model())
    trace = Trace(model, ("layer2.1.conv1.weight",))
    assert [type(step).__name__ for step in trace.fused] == ["Convolution", "Convolution", "Call", "Whole"]
    assert [node.name for node in trace.cuts] == ["layer2_0_relu_1"]


def test_what_does_not_fit_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "BUDGET", 1000)
    case = next(case for case in zoo.CASES if case.name == "resnet")
    agree(*compared(case.model(), "layer2.*", case.inputs(40)))


class Branching(nn.Module):
    """Branches on values, so that it cannot be traced; changes what it records in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.first(x)
        if float(x.sum()) == float("inf"):
            h = -h
        h += self.middle(h)
        return {"logits": self.last(h)}


class Adding(nn.Module):
    """Adds in place to what precedes the edit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h += self.middle(x)
        return self.last(torch.relu_(h))


@pytest.mark.usefixtures("_always_rough")
@pytest.mark.parametrize(("kind", "traced"), [(Branching, False), (Adding, True)])
def test_models_that_are_hard_to_record(kind: type[nn.Module], traced: bool) -> None:
    torch.manual_seed(0)
    fast, slow, network = compared(kind(), "middle.*", torch.randn(61, 6))
    assert (fast.untraced_because == "") == traced
    agree(fast, slow, network)
    agree(fast, slow, network)


def test_batches_that_were_not_recorded_run_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "BUDGET", 600)
    torch.manual_seed(0)
    agree(*compared(Branching(), "last.*", torch.randn(61, 6)))


@pytest.mark.usefixtures("_always_rough")
def test_ties_and_nan_are_answered_as_by_a_full_pass() -> None:
    torch.manual_seed(0)
    fast, slow, network = compared(zoo.mlp(), "3.*", torch.randn(61, 6))
    for value in (0.0, float("nan"), float("inf"), 1e30):
        params = {name: torch.full_like(p, value) for name, p in network.start.items()}
        ours, theirs = fast.predict(params), slow.predict(params)
        assert torch.equal(answers(ours.outputs), answers(theirs.outputs))
        assert ours.exact == 61 or value == 1e30
    assert (answers(theirs.outputs) != -1).all()
    nothing = fast.predict({n: torch.full_like(p, torch.nan) for n, p in network.start.items()})
    assert (answers(nothing.outputs) == -1).all()


@pytest.mark.usefixtures("_always_rough")
def test_a_run_that_is_continued_estimates_the_drift_on_the_same_items() -> None:
    torch.manual_seed(0)
    model, inputs = zoo.mlp(), torch.randn(61, 6)
    network = Network(model, "*")
    params = edited(network, 0.3)
    new = FastPredictor(model, network, inputs, BATCH)
    assert new.drift_items == 10
    for items in (10, 61):
        again = FastPredictor(model, network, inputs, BATCH, drift_items=items)
        assert again.drift_items == items
    slow = SlowPredictor(model, network, inputs, BATCH)
    assert again.predict(params).drift == pytest.approx(slow.predict(params).drift, rel=1e-4)


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(0, 2), st.integers(2, 6))
def test_settle_finds_every_answer_within_the_assumed_error(seed: int, noise: float, classes: int) -> None:
    random = torch.Generator().manual_seed(seed)
    exact = torch.randn(200, classes, generator=random)
    coarse = exact + noise * (2 * torch.rand(200, classes, generator=random) - 1)
    logits, known = settle(coarse, lambda index: exact[index], torch.arange(40), screen(exact))
    assert torch.equal(logits.argmax(1), exact.argmax(1))
    assert torch.equal(logits[known], exact[known])
    assert known[:40].all()


def test_settle_widens_when_the_items_near_a_tie_err_more_than_the_sample() -> None:
    exact = torch.tensor([[5.0, 0.0]] * 4 + [[0.0, 0.3], [2.0, 0.0], [0.0, 9.0]])
    coarse = exact.clone()
    coarse[0, 0] += 0.2  # the sample errs by 0.2, so that margins within 0.4 are computed again
    coarse[4] = torch.tensor([0.2, 0.0])  # errs by 0.5: margins within 1 follow ...
    coarse[5] = torch.tensor([0.0, 0.9])  # ... which errs by 2.9: and within 5.8
    asked: list[list[int]] = []
    logits, known = settle(
        coarse, lambda index: (asked.append(index.tolist()), exact[index])[1], torch.tensor([0]), screen(exact)
    )
    assert asked == [[0], [4], [5], [1, 2, 3]]
    assert known.tolist() == [True] * 6 + [False]
    assert torch.equal(logits.argmax(1), exact.argmax(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_settle_trusts_nothing_that_is_not_finite(bad: float) -> None:
    exact = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    everywhere = settle(torch.full_like(exact, bad), lambda index: exact[index], torch.arange(5), screen(exact))
    assert everywhere[1].all()
    coarse = exact.clone()
    coarse[30] = torch.tensor([bad, bad, 0.0])
    logits, known = settle(coarse, lambda index: exact[index], torch.arange(5), screen(exact))
    assert known[30]
    assert torch.equal(logits, exact)


def test_margins_and_reach() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5], [2.0, 2.0, 0.0], [float("nan"), 1.0, 0.0]])
    assert margins(logits)[:2].tolist() == [0.5, 0.0]
    assert margins(logits)[2].isnan()
    assert screen(logits).reach(torch.tensor([[0.5, -1.0, 0.0]])).item() == 1.5


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 5, 1, 1), (2, 3, 4, 5)])
def test_channels_last_has_its_strides_also_where_a_dimension_is_one(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    found = channels_last(value)
    assert torch.equal(found, value)
    assert found.permute(0, 2, 3, 1).stride() == torch.empty(shape[0], *shape[2:], shape[1]).stride()
    assert channels_last(found) is found


@pytest.fixture
def _always_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct the first convolutions for any rank up to a quarter of the outputs, whatever a timing says."""
    monkeypatch.setattr(products, "_GAIN", float("inf"))


class Parts(nn.Module):
    """A stem, and a block of which two convolutions, or three, read what comes out of it."""

    def __init__(self, *, norm: bool = True, kernel: int = 3, stride: int = 2, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 24, kernel, stride, kernel // 2, groups=groups, bias=not norm)
        self.down = nn.Conv2d(8, 24, 1, stride, bias=True)
        self.bn1, self.bn2 = (nn.BatchNorm2d(24) if norm else nn.Identity() for _ in range(2))
        self.conv2, self.fc = nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.relu(self.bn2(self.down(x)) + y).mean((2, 3)))


def parts(**kwargs: Any) -> tuple[Parts, Tensor]:
    torch.manual_seed(0)
    model, inputs = Parts(**kwargs), torch.randn(61, 3, 10, 10)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for value in (norm.weight, norm.bias, norm.running_mean):
            assert value is not None
            nn.init.normal_(value, mean=0.5)
    diverse(model, inputs)
    return model, inputs


def low_rank(network: Network, rank: int, rest: float, seed: int = 0, scale: float = 0.3) -> dict[str, Tensor]:
    """Move every kernel by so many factors, and all other parameters by `rest`."""
    random = torch.Generator().manual_seed(seed)
    moved = {}
    for name, p in network.start.items():
        noise = torch.randn(p.shape, generator=random)
        if p.ndim == 4:
            noise = (noise.flatten(1)[:, :rank] @ noise.flatten(1)[:rank]).view_as(p)
        moved[name] = p + (scale if p.ndim == 4 else rest) * p.abs().mean() * noise
    return network.rounded(moved)


def corrected(fast: FastPredictor, params: dict[str, Tensor]) -> list[str]:
    """The convolutions that run on recorded products, in float32."""
    return [str(step.args[0]) for step, _ in fast._fine.weights(params) if isinstance(step, products.Corrected)]


def agrees(fast: FastPredictor, slow: SlowPredictor, params: dict[str, Tensor]) -> None:
    ours, theirs = fast.predict(params), slow.predict(params)
    assert torch.equal(answers(ours.outputs), answers(theirs.outputs))
    exact = fast.drift_items == slow.drift_items
    assert ours.drift == pytest.approx(theirs.drift, rel=1e-4 if exact else 0.05, abs=1e-7 if exact else 1e-3)


SHAPES = [{}, {"norm": False}, {"stride": 1}, {"kernel": 1}, {"kernel": 5}]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.head(self.body(x).tanh() * scale)


@pytest.mark.parametrize("names", [("x", "scale"), ("scale", "x")])
def test_arguments_go_by_their_names(names: tuple[str, ...]) -> None:
    given = {"x": torch.randn(40, 6), "scale": torch.rand(40, 1) + 0.5}
    inputs, model = {name: given[name] for name in names}, Named().eval()
    network = Network(model, "head.*")
    fast, slow = FastPredictor(model, network, inputs, BATCH), SlowPredictor(model, network, inputs, BATCH)
    assert fast.untraced_because == ""
    assert torch.equal(answers(fast.base), answers(slow.base))
    agree(fast, slow, network)


@pytest.mark.usefixtures("_always_corrected")
@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_edits_of_the_first_convolutions(
    shape: dict[str, Any], rough: bool, request: pytest.FixtureRequest
) -> None:
    if rough:
        request.getfixturevalue("_always_rough")
    model, inputs = parts(**shape)
    fast, slow, network = compared(model, ("conv1.*", "bn1.*", "down.*", "bn2.*", "conv2.*"), inputs)
    assert (fast._coarse is not None) == rough
    for rank in (0, 1, 4):
        for rest in (0.0, 0.3):
            params = low_rank(network, rank, rest)
            assert corrected(fast, params) == (["conv1", "down"] if rank or rest else [])
            agrees(fast, slow, params)
            weights = fast._fine.weights(params)
            with torch.no_grad():
                exact = torch.func.functional_call(model, params, (inputs,))
            assert torch.allclose(fast._fine.over(weights), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    for full in (low_rank(network, 7, 0.3), edited(network, 0.3)):
        assert corrected(fast, full) == []
        agrees(fast, slow, full)
    unchanged = fast.predict(network.rounded(network.start))
    assert torch.equal(answers(unchanged.outputs), answers(slow.base))
    assert abs(unchanged.drift) < 1e-6


@pytest.mark.usefixtures("_always_rough", "_always_corrected")
def test_low_rank_edits_from_the_image_on() -> None:
    model, inputs = parts()
    fast, slow, network = compared(model, "*", inputs)
    for rank in (0, 1, 2):
        params = low_rank(network, rank, 0.3)
        assert corrected(fast, params) == ["stem"]
        agrees(fast, slow, params)


@pytest.mark.usefixtures("_always_corrected")
def test_grouped_convolutions_and_slow_corrections_run_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = parts(groups=2)
    fast, slow, network = compared(model, ("conv1.*", "down.*"), inputs)
    params = low_rank(network, 1, 0.3)
    assert corrected(fast, params) == ["down"]
    agrees(fast, slow, params)
    monkeypatch.setattr(products, "_GAIN", 0.0)
    fast, slow, network = compared(model, ("conv1.*", "down.*"), inputs)
    for rank in (0, 1):
        assert corrected(fast, low_rank(network, rank, 0.3)) == []
        agrees(fast, slow, low_rank(network, rank, 0.3))


@pytest.mark.usefixtures("_always_corrected")
@pytest.mark.parametrize(("products_fit", "expected"), [(2, ["conv1", "down"]), (1, ["conv1"]), (0, [])])
def test_products_that_do_not_fit_are_not_recorded(
    products_fit: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, product = 61 * 8 * 100 * 4, 61 * 24 * 25 * 4
    monkeypatch.setattr(engines, "BUDGET", 1.5 * (cut + products_fit * product) + 100)
    model, inputs = parts()
    fast, slow, network = compared(model, ("conv1.*", "down.*"), inputs)
    params = low_rank(network, 1, 0.3)
    assert corrected(fast, params) == expected
    agrees(fast, slow, params)
    recorded = fast._fine._recorded  # type: ignore[attr-defined]
    assert recorded.nbytes == cut + products_fit * product


class Overwriting(nn.Module):
    """Changes in place what its convolution has read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.relu(x.mul_(self.conv(x).sigmoid())).mean((2, 3)))


@pytest.mark.usefixtures("_always_rough", "_always_corrected")
def test_what_a_pass_overwrites_has_no_recorded_products() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(61, 2, 8, 8)
    fast, slow, network = compared(diverse(Overwriting(), inputs), "conv.*", inputs)
    for seed in range(2):
        params = low_rank(network, 1, 0.3, seed)
        assert corrected(fast, params) == []
        agrees(fast, slow, params)


@pytest.mark.usefixtures("_always_corrected")
@pytest.mark.parametrize("name", ["conv1.weight", "bn1.weight", "bn1.bias"])
@pytest.mark.parametrize(("value", "expected"), [(math.nan, []), (math.inf, []), (1e10, ["conv1"])])
def test_corrections_of_what_is_huge_or_not_finite(name: str, value: float, expected: list[str]) -> None:
    model, inputs = parts()
    fast, slow, network = compared(model, ("conv1.*", "bn1.*"), inputs)
    params = network.rounded(network.start)
    params[name][3] = value
    assert corrected(fast, params) == expected
    if expected:
        agrees(fast, slow, params)


@pytest.mark.usefixtures("_always_corrected")
def test_a_filter_that_nearly_vanishes_is_not_the_small_difference_of_large_products() -> None:
    model, inputs = parts()
    fast, slow, network = compared(model, "conv1.*", inputs)
    for factor, expected in ((1e-6, []), (0.0, []), (0.5, ["conv1"])):
        params = network.rounded(network.start)
        params["conv1.weight"][3] *= factor
        assert corrected(fast, params) == expected
        agrees(fast, slow, params)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 12), st.floats(1e-9, 1e3), st.booleans())
def test_factors_are_found_where_there_are_few_and_only_there(seed: int, rank: int, scale: float, dead: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    old, left, right = (torch.randn(*shape, generator=random) for shape in ((40, 90), (40, rank), (rank, 90)))
    if dead:
        old[::3], left[::3] = 0, 0
    new = old + scale * (left @ right)
    found = products.factors(old, new, 8)
    if found is not None:
        off = (old.double() + found[0].double() @ found[1].double() - new).norm(dim=1)
        assert (off <= 1.1 * products._ROUNDING * new.double().norm(dim=1)).all()
    if 1e-4 < scale < 1e2:
        assert (found is not None) == (rank <= 8)
        assert found is None or found[1].shape == (rank, 90)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_give_the_answers_of_the_model_itself(value: float) -> None:
    model, inputs = parts()
    fast, slow, network = compared(model, ("conv2.*", "fc.*"), inputs)
    params = network.rounded(network.start)
    params["conv2.weight"][3] = value
    ours, theirs = fast.predict(params), slow.predict(params)
    assert torch.equal(answers(ours.outputs), answers(theirs.outputs))
    assert math.isnan(ours.drift) == math.isnan(theirs.drift)
    assert bool((answers(theirs.outputs) == -1).any())


def blown_up(network: Network, seed: int) -> dict[str, Tensor]:
    """Move some tensors, or some numbers of them, to sizes up to 1e20."""
    random = torch.Generator().manual_seed(seed)
    params = {}
    for name, p in network.start.items():
        power = 10 ** float(23 * torch.rand((), generator=random) - 3)
        noise = power * p.abs().mean() * torch.randn(p.shape, generator=random)
        moved = (p + noise, p * power, torch.cat([p.flatten()[:3] * power, p.flatten()[3:]]).view_as(p))[seed % 3]
        params[name] = moved if float(torch.rand((), generator=random)) < 0.6 else p
    return network.rounded(params)


def always_agrees(fast: FastPredictor, slow: SlowPredictor, params: dict[str, Tensor]) -> Tensor:
    ours, theirs = fast.predict(params), slow.predict(params)
    assert torch.equal(answers(ours.outputs), answers(theirs.outputs))
    if fast.drift_items == slow.drift_items or not math.isfinite(theirs.drift):
        assert ours.drift == pytest.approx(theirs.drift, rel=1e-3, abs=1e-6, nan_ok=True)
    return answers(theirs.outputs)


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("name", ["resnet", "mlp", "tied", "parts", "parts without norms"])
def test_weights_of_any_size_give_the_answers_of_the_model_itself(
    name: str, rough: bool, request: pytest.FixtureRequest
) -> None:
    if rough:
        request.getfixturevalue("_always_rough")
    if "parts" in name:
        model, inputs = parts(norm=name == "parts")
        chosen: Any = ("conv1.*", "bn1.*", "down.*", "bn2.*", "conv2.*")
    else:
        case = next(case for case in zoo.CASES if case.name == name)
        inputs, chosen = case.inputs(61), case.parameters
        model = diverse(case.model(), inputs)
    fast, slow, network = compared(model, chosen, inputs)
    found = [always_agrees(fast, slow, blown_up(network, seed)) for seed in range(45)]
    assert any(bool((classes == -1).any()) for classes in found) or name != "resnet"


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_models_that_overflow_before_any_edit_answer_as_themselves(
    seed: int, rough: bool, request: pytest.FixtureRequest
) -> None:
    if rough:
        request.getfixturevalue("_always_rough")
    case = next(case for case in zoo.CASES if case.name == "resnet")
    model, inputs = diverse(case.model(), case.inputs(61)), case.inputs(61)
    whole = Network(model, "*")
    with torch.no_grad():
        for name, value in blown_up(whole, 3 * seed + 1).items():
            model.get_parameter(name).copy_(value)
        inputs[::5] *= 10.0 ** (4 * seed)
    fast, slow, network = compared(model, case.parameters, inputs)
    for scale in (0.01, 1.0, 30.0):
        always_agrees(fast, slow, edited(network, scale))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_rough_logits_that_are_not_finite_are_never_trusted(value: float) -> None:
    exact = torch.eye(6) * 5
    coarse = exact.clone()
    coarse[4, 2] = value
    logits, known = settle(coarse, lambda index: exact[index], torch.tensor([0, 1]), Screen(Categorical(), exact))
    assert torch.equal(logits, exact) and bool(known[4])
