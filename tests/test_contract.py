"""One table: every editor keeps every promise on every kind of model, and every constraint is met by what edits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import Classified
from weightpatch.editing import Result
from weightpatch.editors import KeyValue, MinimumNorm, Preconditioned, Retry, Shrink
from weightpatch.statistics import second_moments

LINEAR = {"mlp": "3", "encoder": "layers.layers.1.linear2", "tied": "hidden", "bf16": "3"}  # its weight may move
GATED = {**LINEAR, "resnet": "fc", "weight-normed": "2"}
MEASURED = ("mlp", "bf16")  # norms, embeddings and parametrisations have no metric; tests/editors has layers of these
Made = Callable[[zoo.Case, nn.Module, Callable[[int], Tensor]], wp.editors.Editor]


@dataclass(frozen=True)
class Row:
    """An editor of the table.

    Attributes:
        name: of the row.
        make: the editor, for a case, its model, and what draws inputs of it.
        cases: the names of those for which there is one.
        keeps: whether it needs something to keep.
    """

    name: str
    make: Made
    cases: tuple[str, ...] = tuple(case.name for case in zoo.CASES)
    keeps: bool = False


def plain(editor: wp.editors.Editor, name: str = "", **facts: Any) -> Row:
    return Row(name or type(editor).__name__, lambda case, model, inputs: editor, **facts)


def with_metric(name: str, make: Callable[..., wp.editors.Editor]) -> Row:
    def made(case: zoo.Case, model: nn.Module, inputs: Callable[[int], Tensor]) -> wp.editors.Editor:
        return make(metric=second_moments(model, inputs(40), parameters=case.parameters).metric())

    return Row(name, made, MEASURED)


def key_value(preset: str, metric: Mapping[str, float] | None = None, **settings: float) -> Row:
    def made(case: zoo.Case, model: nn.Module, inputs: Callable[[int], Tensor]) -> wp.editors.Editor:
        layer = LINEAR[case.name]
        moments = second_moments(model, inputs(40), parameters=f"{layer}.weight")
        return getattr(KeyValue, preset)(layer, moments.metric(**metric or {}), **settings)

    return Row(preset, made, tuple(LINEAR))


ROWS = (
    plain(wp.editors.GradientDescent(lr=0.1, max_steps=200)),
    plain(wp.editors.ScaledGradientDescent(lr=0.2, max_steps=200)),
    plain(wp.editors.RProp(lr=0.01, max_steps=200)),
    plain(wp.editors.RMSProp(lr=0.01, max_steps=200)),
    plain(wp.editors.Momentum(lr=0.05, max_steps=200)),
    plain(wp.editors.Adam(lr=0.01, max_steps=200)),
    plain(MinimumNorm()),
    plain(wp.editors.GaussNewton(max_steps=50)),
    plain(Shrink(wp.editors.RMSProp(lr=0.02, max_steps=200))),
    plain(Retry((wp.editors.GradientDescent(lr=1e-9, max_steps=1), wp.editors.Adam(lr=0.01, max_steps=200)))),
    plain(wp.editors.LowRank(wp.editors.Adam(lr=0.02, max_steps=200), rank=2)),
    plain(wp.editors.Bounded(wp.editors.Adam(lr=0.03, max_steps=200), radius=0.025)),
    plain(wp.editors.ladder(), "ladder"),
    plain(wp.editors.Auto(), keeps=True),
    Row("Gate", lambda case, model, inputs: wp.editors.Gate(GATED[case.name], 4)),
    with_metric("Preconditioned", partial(Preconditioned, max_steps=200)),
    with_metric("Preconditioned, searched", partial(Preconditioned, max_steps=200, line_search=4)),
    with_metric("Preconditioned, shrunk", lambda metric: Shrink(Preconditioned(metric=metric, max_steps=200))),
    with_metric("MinimumNorm, metric", MinimumNorm),
    with_metric("GaussNewton, metric", partial(wp.editors.GaussNewton, max_steps=50)),
    key_value("rome"),
    key_value("emmet"),
    key_value("memit"),
    key_value("alphaedit", metric={"energy": 0.8}, weight=0.1),
    Row("ultraedit", lambda case, model, inputs: KeyValue.ultraedit(LINEAR[case.name]), tuple(LINEAR)),
)
NO_EDITORS = {
    "Attempt": "one rung's account in an Auto's outcome",
    "Budget": "what an edit by Auto may cost",
    "Certificate": "what MinimumNorm proves",
    "Editor": "abstract",
    "IterativeEditor": "abstract",
    "LayerMetric": "a layer of a Metric",
    "Metric": "of MinimumNorm, GaussNewton, Preconditioned and KeyValue: rows of their own",
    "NormalisedGradient": "where KeyValue finds values: the row of ultraedit",
    "Rung": "an editor of Auto with its scope",
    "Solution": "what an editor returns",
    "iterate": "the loop of every iterative editor",
}
CASE = {case.name: case for case in zoo.CASES}
PAIRS = [pytest.param(CASE[name], row, id=f"{name}-{row.name}") for row in ROWS for name in row.cases]
CROSS = [pair for pair in PAIRS if "mlp" in pair.id or pair.id.endswith("RMSProp")]  # each editor, and each model


@cache
def made(case: zoo.Case, row: Row) -> wp.editors.Editor:
    return row.make(case, case.model(), case.inputs)


def mistake(model: nn.Module, inputs: Tensor, margin: float = 0.1) -> Classified:
    """Ask for the class that the model now likes second."""
    with torch.no_grad():
        second = model.eval()(inputs).float().argsort(1, descending=True)[:, 1]
    return Classified(inputs, second, margin)


def edited(case: zoo.Case, row: Row, kept: int = 8) -> tuple[Classified, wp.Edit, bool]:
    """Edit a model as it is in the middle of a training run; say whether it was left alone."""
    model, keep = case.model(), wp.Locality(case.inputs(kept)) if kept else None
    fix, editor = mistake(model, case.inputs(1)), made(case, row)
    before = zoo.digest(model.train())
    found = wp.edit(model, fix, editor, keep=keep, parameters=case.parameters)
    return fix, found, zoo.digest(model) == before


first = cache(edited)  # edits are most of this file's time; several tests look at one


def test_every_public_editor_is_in_the_table():
    rows = {row.name for row in ROWS} | {type(made(CASE["mlp"], row)).__name__ for row in ROWS}
    assert set(wp.editors.__all__) - rows == NO_EDITORS.keys()
    for name in NO_EDITORS:
        value = getattr(wp.editors, name)
        assert not inspect.isclass(value) or not issubclass(value, wp.editors.Editor) or inspect.isabstract(value)


@pytest.mark.parametrize(("case", "row"), PAIRS)
def test_every_editor_solves_every_model_and_leaves_it_alone(case: zoo.Case, row: Row):
    fix, found, alone = first(case, row)
    assert alone
    assert found.result is Result.satisfied, found
    assert found.steps > 0
    assert found.violation <= 0
    assert found.drift is not None
    assert 0 <= found.drift < 10
    model = case.model().eval()
    assert not fix.satisfied(model)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with found.patch.applied(model):
        assert fix.satisfied(model)
        touched = {name for name, value in kept.items() if not torch.equal(value, model.state_dict()[name])}
        assert touched or found.patch.gates
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("case", "row"), PAIRS)
def test_the_patch_survives_its_file(case: zoo.Case, row: Row, tmp_path):
    fix, found, _ = first(case, row)
    found.raise_for_result().patch.save(tmp_path / "fix.patch.safetensors")
    patch = wp.Patch.load(tmp_path / "fix.patch.safetensors")
    fresh = case.model().eval()
    patch.apply(fresh)
    assert fix.satisfied(fresh)


@pytest.mark.parametrize(("case", "row"), CROSS)
def test_edits_are_deterministic(case: zoo.Case, row: Row):
    assert edited(case, row)[1].patch.id == first(case, row)[1].patch.id


@pytest.mark.parametrize("row", [row for row in ROWS if not row.keeps], ids=lambda row: row.name)
def test_every_editor_solves_where_nothing_is_kept(row: Row):
    _, found, alone = edited(CASE["mlp"], row, kept=0)
    assert alone
    assert (found.result, found.drift) == (Result.satisfied, None)


@pytest.mark.parametrize(("case", "row"), CROSS)
def test_an_edit_that_holds_already_changes_nothing(case: zoo.Case, row: Row):
    model, inputs = case.model().eval(), case.inputs(2)
    with torch.no_grad():
        fix = Classified(inputs, model(inputs).float().argmax(1))
    found = wp.edit(model, fix, made(case, row), keep=wp.Locality(case.inputs(8)), parameters=case.parameters)
    assert found.result is Result.already_satisfied
    assert (found.steps, found.drift, len(found.patch.operations)) == (0, 0.0, 0)
