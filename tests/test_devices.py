"""Models on an accelerator, and models elsewhere than new tensors are by default: where they are must not matter.

Without an accelerator the default is ``meta``, where no number is: a tensor that the library makes there, and not where
the model is, fails at its first use.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import test_contract as contract
import tiny_text as tiny
import torch
import zoo
from torch import nn

import weightpatch as wp
from weightpatch.editing import Result
from weightpatch.editors import Gate, KeyValue, LowRank, MinimumNorm, RMSProp
from weightpatch.evaluation.generations import SlowGenerations
from weightpatch.evaluation.predictor import FastPredictor, SlowPredictor
from weightpatch.likelihoods import Categorical
from weightpatch.network import Network
from weightpatch.statistics import second_moments
from weightpatch.training import EditableObjective, RandomLabels, TrainSettings, train

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator"))
LAYER = "transformer.h.1.mlp.c_proj"


class Place:
    """Where models and inputs are, and what surrounds the library's work there."""

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda" if name == "cuda" else "cpu")
        self._default = torch.device("meta" if name == "not the default" else "cpu")

    @contextmanager
    def here(self) -> Iterator[None]:
        with self._default:
            yield

    def case(self, case: zoo.Case) -> tuple[nn.Module, Any]:
        def inputs(n: int) -> torch.Tensor:
            with torch.device("cpu"):
                return case.inputs(n).to(self.device)

        return case.model().to(self.device), inputs


@pytest.fixture(params=["not the default", CUDA])
def place(request: pytest.FixtureRequest) -> Place:
    return Place(request.param)


@pytest.fixture
def accelerator() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    return torch.device("cuda")


@pytest.mark.parametrize(("case", "row"), contract.PAIRS)
def test_every_editor(place: Place, case: zoo.Case, row: contract.Row, tmp_path) -> None:
    model, inputs = place.case(case)
    fix, before, keep = contract.mistake(model, inputs(1)), zoo.digest(model), wp.Locality(inputs(8))
    with place.here():
        editor = row.make(case, model, inputs)
        found = wp.edit(model, fix, editor, keep=keep, parameters=case.parameters)
        assert found.result is Result.satisfied
        assert found.drift is not None
        assert zoo.digest(model) == before
        found.patch.save(tmp_path / "patch.safetensors")
        patch = wp.Patch.load(tmp_path / "patch.safetensors")
        with patch.applied(model):
            assert fix.satisfied(model)
            assert {value.device.type for value in model.state_dict().values()} == {place.device.type}
    assert zoo.digest(model) == before


def test_answers_to_a_test_set(place: Place, case: zoo.Case) -> None:
    model, inputs = place.case(case)
    x = inputs(61)
    with place.here():
        network = Network(model, case.parameters)
        fast, slow = FastPredictor(model, network, x, 16), SlowPredictor(model, network, x, 16)
        assert torch.equal(fast.base.argmax(1), slow.base.argmax(1))
        assert torch.allclose(fast.base, slow.base, atol=1e-5)
        for scale in (0.0, 0.01, 0.1):
            moved = {name: p + scale * p.abs().mean() * torch.randn_like(p) for name, p in network.start.items()}
            ours, theirs = fast.predict(network.rounded(moved)), slow.predict(network.rounded(moved))
            assert torch.equal(ours.outputs.argmax(1), theirs.outputs.argmax(1))
            assert ours.drift == pytest.approx(theirs.drift, rel=0.05, abs=1e-3)


def test_an_evaluation(place: Place) -> None:
    model, inputs = place.case(next(case for case in zoo.CASES if case.name == "resnet"))
    x = inputs(60)
    with torch.no_grad():
        labels = model.eval()(x).argmax(1).cpu()
    edits = [contract.mistake(model, x[row : row + 1]) for row in range(3)]
    with place.here():
        report = wp.evaluate(
            model, edits, RMSProp(lr=0.01, max_steps=100), test=(x, labels), parameters="fc.*", batch_size=16
        )
    assert [row.result for row in report.rows] == [Result.satisfied] * 3


def test_two_sided_moments_are_those_of_the_cpu(place: Place) -> None:
    model, inputs = place.case(next(case for case in zoo.CASES if case.name == "mlp"))
    wanted = second_moments(copy.deepcopy(model).cpu(), inputs(40).cpu(), parameters="3.*", likelihood=Categorical())
    with place.here():
        found = second_moments(model, inputs(40), parameters="3.*", likelihood=Categorical())
    for name, layer in found.layers.items():
        torch.testing.assert_close(layer.total.cpu(), wanted.layers[name].total, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.fisher.cpu(), wanted.layers[name].fisher, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "resnet", "encoder"])
def test_training(accelerator: torch.device, name: str, tmp_path) -> None:
    pytest.importorskip("accelerate")
    case = next(case for case in zoo.CASES if case.name == name)
    x, y = case.inputs(40), torch.randint(5, (40,))
    objective = EditableObjective(case.model(), RMSProp(lr=1e-2, max_steps=3), parameters=case.parameters)
    found = train(
        objective,
        (x, y),
        sampler=RandomLabels(x, 5),
        optimiser=lambda objective: torch.optim.Adam(objective.parameters(), lr=1e-2),
        settings=TrainSettings(steps=4, batch_size=8, edits=2, log_every=1, checkpoint_every=2),
        folder=tmp_path,
        trackers=(),
    )
    assert found.step == 4
    assert {p.device.type for p in objective.parameters()} == {accelerator.type}


@pytest.mark.parametrize("name", ["mlp", "resnet", "encoder"])
def test_gradients_through_the_editor_are_those_of_the_cpu(accelerator: torch.device, name: str) -> None:
    case = next(case for case in zoo.CASES if case.name == name)
    x, grads = case.inputs(8), {}
    for device in ("cpu", accelerator.type):
        model = case.model().to(device).eval()
        fix = contract.mistake(model, x[:1].to(device))
        objective = EditableObjective(model, RMSProp(lr=1e-2, max_steps=3), parameters=case.parameters).to(device)
        objective.eval()
        y = torch.arange(8, device=device) % 5
        objective(fix, batch=(x.to(device), y)).backward()
        grads[device] = {key: p.grad.cpu() for key, p in objective.named_parameters() if p.grad is not None}
    assert grads["cpu"].keys() == grads[accelerator.type].keys() != set()
    for key, wanted in grads["cpu"].items():
        torch.testing.assert_close(grads[accelerator.type][key], wanted, rtol=2e-2, atol=2e-4)


TEXTS = tuple(" ".join(str(1 + (7 * i + 3 * j) % 38) for j in range(1 + i % 5)) for i in range(24))


def kinds(device: torch.device) -> dict[str, Any]:
    text = pytest.importorskip("weightpatch.tasks.text")
    translator = tiny.marian().to(device)
    translator.generation_config.forced_eos_token_id = None
    told = {"max_new_tokens": 7}
    return {
        "model.decoder.layers.1.fc2.*": text.Seq2Seq(translator, tiny.Words(tiny.WORDS - 1, 0), told),
        f"{LAYER}.*": text.CausalLM(tiny.gpt2().to(device), tiny.Words(0), told),
    }


@pytest.mark.parametrize("make", [RMSProp(lr=1e-2, max_steps=200), MinimumNorm(), "gate", "low rank"])
@pytest.mark.parametrize("parameters", ["model.decoder.layers.1.fc2.*", f"{LAYER}.*"])
def test_sentences(accelerator: torch.device, parameters: str, make: Any) -> None:
    text = pytest.importorskip("weightpatch.tasks.text")
    kind = kinds(accelerator)[parameters]
    keep = kind.kept(TEXTS[8:16])
    editor = make
    if make == "gate":
        editor = Gate(parameters.removesuffix(".*"), 32)
    elif make == "low rank":
        editor = LowRank(RMSProp(lr=1e-2, max_steps=200), 2)
        parameters = parameters.replace("*", "weight")
    fix = kind.says(TEXTS[2], "3 9")
    before = zoo.digest(kind.model)
    found = wp.edit(kind.model, fix, editor, keep=keep, parameters=parameters).raise_for_result()
    assert zoo.digest(kind.model) == before
    with found.patch.applied(kind.model) as other:
        assert kind.text(kind.generate([TEXTS[2]], other)[0]).startswith("3 9")
    report = text.evaluate(
        kind, [fix], editor, texts=TEXTS[8:], references=TEXTS[8:], keep=keep, parameters=parameters,
        score=lambda said, wanted: float(sum(a == b for a, b in zip(said, wanted, strict=True))),
    )  # fmt: skip
    assert report.figures()["success"] == "100.0 %"


@pytest.mark.parametrize("parameters", ["model.decoder.layers.1.fc2.*", f"{LAYER}.*"])
def test_the_fast_way_answers_as_every_decode_does(accelerator: torch.device, parameters: str) -> None:
    text = pytest.importorskip("weightpatch.tasks.text")
    kind = kinds(accelerator)[parameters]
    network = Network(kind.model, parameters)
    fast = text.generations(kind, network, TEXTS)
    anew = lambda model, items: kind.generate([TEXTS[i] for i in items], model)  # noqa: E731
    slow = SlowGenerations(network, fast.base, fast._forced, anew)
    for scale in (0.0, 1e-3, 0.03, 0.3):
        params = {name: p + scale * torch.randn_like(p) for name, p in network.start.items()}
        ours, theirs = fast.predict(params), slow.predict(params)
        assert {i: t.tolist() for i, t in ours.changed.items()} == {i: t.tolist() for i, t in theirs.changed.items()}


def test_facts(accelerator: torch.device) -> None:
    lang = pytest.importorskip("weightpatch.tasks.language")
    kind = kinds(accelerator)[f"{LAYER}.*"]
    asked = lang.Fact("3 4 5", "5 6", "4", ("9",), ("4 3 5",), (lang.Question("3 8 5"),), id=1)
    for editor in (
        RMSProp(lr=1e-2, max_steps=100),
        MinimumNorm(),
        lambda some: KeyValue.ultraedit(LAYER, positions=lang.subject_position(kind, some[0])),
    ):
        report = lang.evaluate_facts(
            kind, [asked], editor, sizes={1: 1}, parameters=f"{LAYER}.weight", held_out=("3 9 12 7 30", "5 5 8")
        )
        assert report.rows[0].edits == 1
