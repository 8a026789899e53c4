"""One table: every editor keeps every promise on every kind of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import pytest
import torch
import zoo

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editing import Result
from weightpatch.statistics import second_moments

EDITORS = (
    wp.editors.GradientDescent(lr=0.1, max_steps=200),
    wp.editors.ScaledGradientDescent(lr=0.2, max_steps=200),
    wp.editors.RProp(lr=0.01, max_steps=200),
    wp.editors.RMSProp(lr=0.01, max_steps=200),
    wp.editors.Momentum(lr=0.05, max_steps=200),
    wp.editors.Adam(lr=0.01, max_steps=200),
    wp.editors.MinimumNorm(),
    wp.editors.GaussNewton(max_steps=50),
    wp.editors.Shrink(wp.editors.RMSProp(lr=0.02, max_steps=200)),
    wp.editors.Retry((wp.editors.GradientDescent(lr=1e-9, max_steps=1), wp.editors.Adam(lr=0.01, max_steps=200))),
    wp.editors.LowRank(wp.editors.Adam(lr=0.02, max_steps=200), rank=2),
    wp.editors.Bounded(wp.editors.Adam(lr=0.03, max_steps=200), radius=0.025),
)


METRIC = (
    lambda metric: wp.editors.Preconditioned(metric=metric, max_steps=200),
    lambda metric: wp.editors.Preconditioned(metric=metric, max_steps=200, line_search=4),
    lambda metric: wp.editors.Shrink(wp.editors.Preconditioned(metric=metric, max_steps=200)),
    lambda metric: wp.editors.MinimumNorm(metric=metric),
    lambda metric: wp.editors.GaussNewton(metric=metric, max_steps=50),
)


LAYERS = {"mlp": "3", "encoder": "layers.layers.1.linear2", "tied": "hidden", "bf16": "3"}


def key_value(
    preset: str, metric: Mapping[str, float] = MappingProxyType({}), **settings: float
) -> Callable[[zoo.Case], wp.editors.Editor]:
    """Return what makes the editor for the linear layer of a case, or skips where there is none."""

    def make(case: zoo.Case) -> wp.editors.Editor:
        if case.name not in LAYERS:
            pytest.skip("no linear layer whose weight may move")
        layer = LAYERS[case.name]
        if preset == "ultraedit":
            return wp.editors.KeyValue.ultraedit(layer)
        moments = second_moments(case.model(), case.inputs(40), parameters=f"{layer}.weight")
        return getattr(wp.editors.KeyValue, preset)(layer, moments.metric(**metric), **settings)

    make.__name__ = preset
    return make


KEY_VALUE = (
    key_value("rome"),
    key_value("emmet"),
    key_value("memit"),
    key_value("alphaedit", metric={"energy": 0.8}, weight=0.1),
    key_value("ultraedit"),
)


@pytest.fixture(
    params=(*EDITORS, *METRIC, *KEY_VALUE), ids=lambda editor: getattr(editor, "__name__", type(editor).__name__)
)
def editor(request: pytest.FixtureRequest, case: zoo.Case) -> wp.editors.Editor:
    if isinstance(request.param, wp.editors.Editor):
        return request.param
    if request.param in KEY_VALUE:
        return request.param(case)
    if case.name in ("resnet", "encoder", "tied", "weight-normed"):
        pytest.skip(
            "norms, embeddings and parametrisations have no metric; tests/editors has linear layers of two of these"
        )
    return request.param(second_moments(case.model(), case.inputs(40), parameters=case.parameters).metric())


def mistake(model: torch.nn.Module, inputs: torch.Tensor, margin: float = 0.1) -> Classified:
    """Ask for the class that the model now likes second."""
    with torch.no_grad():
        second = model.eval()(inputs).float().argsort(1, descending=True)[:, 1]
    return Classified(inputs, second, margin)


def test_every_editor_solves_every_model_and_leaves_it_alone(case: zoo.Case, editor: wp.editors.Editor):
    model = case.model()
    fix = mistake(model, case.inputs(1))
    model.train()  # as a model is in the middle of a training run
    untouched = zoo.digest(model)
    found = wp.edit(model, fix, editor, keep=wp.Locality(case.inputs(8)), parameters=case.parameters)
    assert zoo.digest(model) == untouched

    assert found.result is Result.satisfied, found
    assert found.steps > 0
    assert found.violation <= 0
    assert found.drift is not None
    assert 0 <= found.drift < 10
    model.eval()
    assert not fix.satisfied(model)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with found.patch.applied(model):
        assert fix.satisfied(model)
        touched = {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])}
        assert touched
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_the_patch_survives_its_file(case: zoo.Case, editor: wp.editors.Editor, tmp_path):
    model = case.model()
    fix = mistake(model, case.inputs(1))
    found = wp.edit(model, fix, editor, parameters=case.parameters).raise_for_result()
    found.patch.save(tmp_path / "fix.patch.safetensors")
    patch = wp.Patch.load(tmp_path / "fix.patch.safetensors")
    fresh = case.model().eval()
    patch.apply(fresh)
    assert fix.satisfied(fresh)


def test_an_edit_that_holds_already_changes_nothing(case: zoo.Case, editor: wp.editors.Editor):
    model = case.model().eval()
    inputs = case.inputs(2)
    with torch.no_grad():
        fix = Classified(inputs, model(inputs).float().argmax(1))
    found = wp.edit(model, fix, editor, keep=wp.Locality(case.inputs(8)), parameters=case.parameters)
    assert found.result is Result.already_satisfied
    assert (found.steps, found.drift, len(found.patch.operations)) == (0, 0.0, 0)


def test_edits_are_deterministic(case: zoo.Case, editor: wp.editors.Editor):
    fixes = [
        wp.edit(m := case.model(), mistake(m, case.inputs(1)), editor, parameters=case.parameters) for _ in range(2)
    ]
    assert fixes[0].patch.id == fixes[1].patch.id
