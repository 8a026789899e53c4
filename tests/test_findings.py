"""What was once told wrongly, or not at all, is told right: one test or more for each fault."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_contract_kinds import ANSWERS, INPUTS, KINDS, MANNERS, Row, second_best
from test_truth import OTHERS, X, second
from torch import Tensor, nn

import weightpatch as wp
from weightpatch import Locality, Result
from weightpatch.constraints import Ask, Classified, Constraint, Says, Seq2SeqFrame, Tagged, register
from weightpatch.editors import Auto, Budget, GradientDescent, MinimumNorm, RMSProp
from weightpatch.errors import ConflictingConstraints
from weightpatch.likelihoods import Bernoulli, Categorical, Of
from weightpatch.records import Record
from weightpatch.training import EditableObjective

FAULTS = {
    "an edit is judged on what its metric was made of": (
        "test_truth.test_what_few_kept_items_promise_is_kept_on_others",
        "test_truth.test_the_kept_figure_and_the_held_out_one_come_out_of_every_door",
        "test_findings.test_of_sentences_those_are_told_of_which_any_token_changed",
    ),
    "outputs of every kind are taken for classes": (
        "test_truth.test_drift_of_numbers_is_in_units_of_their_spread_and_binds",
        "test_truth.test_numbers_of_one_output_can_be_kept_and_of_shape_n",
        "test_truth.test_tags_are_counted_as_tags",
        "test_truth.test_one_logit_says_yes_or_no",
        "test_truth.test_segmentation_is_judged_pixel_by_pixel",
        "test_truth.test_networks_that_end_in_a_softmax",
        "test_contract_kinds.test_what_is_told_of_kept_items_is_what_a_plain_computation_finds",
    ),
    "nothing is kept and no word is said of it": ("test_truth.test_nothing_kept_is_said",),
    "one output of several is watched": (
        "test_truth.test_an_output_that_nobody_watches_is_named_and_both_can_be_kept",
        "test_findings.test_of_a_tuple_the_output_that_is_meant_is_edited_and_kept",
        "test_contract_kinds.test_the_model_is_left_alone_and_what_is_not_known_is_said",
    ),
    "inputs that are nested are not taken apart": (
        "test_calling.test_every_leaf_with_a_row_for_each_item_is_taken_apart",
        "test_findings.test_evaluations_take_nested_inputs_apart",
        "test_findings.test_training_replays_nested_inputs",
    ),
    "satisfied is said of one draw, or of one batch": (
        "test_truth.test_satisfied_means_in_every_draw",
        "test_truth.test_demands_that_hold_together_are_asked_alone_where_items_depend_on_each_other",
        "test_findings.test_an_item_that_the_model_refuses_alone_does_not_hold_alone",
        "test_contract_kinds.test_satisfied_is_true_of_a_fresh_model_in_the_batch_and_alone",
    ),
    "a gate changes what is kept": (
        "test_truth.test_a_gate_changes_nothing_that_is_kept_or_is_refused",
        "test_truth.test_balls_leave_out_the_kept_items_that_judged_them",
    ),
    "the verdict is green where a class is broken, or little is known": (
        "test_verdict.test_a_class_that_doubled_its_error_is_not_hidden_by_the_rest",
        "test_verdict.test_half_of_all_translations_changed",
        "test_verdict.test_no_change_on_three_texts_is_no_proof",
        "test_contract_kinds.test_a_single_kept_item_judges_nothing",
    ),
    "constraints of other kinds are forgotten": (
        "test_truth.test_a_constraint_of_ones_own_is_remembered_once_it_is_registered",
        "test_truth.test_what_cannot_be_remembered_says_so",
        "test_contract_constraints.test_demands_that_contradict_each_other_are_told",
        "test_findings.test_later_edits_keep_to_demands_of_every_kind",
        "test_findings.test_training_records_the_passes_of_every_constraint",
    ),
    "a gate goes to a layer that the answer does not depend on": (
        "test_truth.test_a_gate_goes_to_the_layer_that_the_answer_depends_on",
    ),
}


@pytest.mark.parametrize("tests", FAULTS.values(), ids=list(FAULTS))
def test_every_fault_has_its_tests(tests: tuple[str, ...]) -> None:
    for name in tests:
        module, _, test = name.rpartition(".")
        assert callable(getattr(importlib.import_module(module), test))


WORDS = tuple(" ".join(str(1 + (7 * i + 3 * j) % 37) for j in range(1 + i % 5)) for i in range(60))


def translator() -> Any:
    pytest.importorskip("transformers")
    import tiny_text as tiny

    from weightpatch.tasks.text import Seq2Seq

    model = tiny.marian()
    model.generation_config.forced_eos_token_id = None
    return Seq2Seq(model, tiny.Words(tiny.WORDS - 1, 0), {"max_new_tokens": 6})


def said(kind: Any, texts: tuple[str, ...], found: wp.Edit) -> Tensor:
    """Return which texts are answered in other words."""
    after = copy.deepcopy(kind.model)
    found.patch.apply(after)
    pairs = zip(kind.generate(texts), kind.generate(texts, after), strict=True)
    return torch.tensor([a.tolist() != b.tolist() for a, b in pairs])


@pytest.mark.parametrize("place", [3, 44])
def test_of_sentences_those_are_told_of_which_any_token_changed(place: int) -> None:
    kind, others = translator(), tuple(text for text in WORDS[20:] if text != WORDS[place])
    keep, fix = kind.kept(WORDS[:20]), kind.says(WORDS[place], torch.tensor([5, 6]))
    auto = Auto(budget=Budget(changed=0.7, drift=1.0))  # the exact edit of the layer whose metric is of half of these
    found = wp.edit(kind.model, fix, auto, keep=keep, parameters="model.decoder.layers.1.fc2.*")
    assert found.result is Result.satisfied
    changed, ids = said(kind, WORDS[:20], found), keep.inputs["input_ids"]
    places = [int((ids == row).all(1).nonzero()[0]) for row in keep.split[1].inputs["input_ids"]]
    kept, held_out = found.kept, found.held_out
    assert (held_out.items, held_out.changed) == (len(places), int(changed[places].sum()))
    assert 0 < held_out.changed < held_out.moved
    if place >= 20:  # what is asked of a sentence is not kept
        assert (kept.items, kept.changed) == (20, int(changed.sum()))
    share = float(said(kind, others, found).double().mean())
    assert 0 < share <= held_out.upper


class AuxFirst(nn.Module):
    """Answers an auxiliary output, and then the classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.aux, self.cls = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.trunk(x))
        return self.aux(h), self.cls(h)


@pytest.mark.parametrize("likelihood", [None, Categorical()])
def test_of_a_tuple_the_output_that_is_meant_is_edited_and_kept(likelihood: Categorical | None) -> None:
    model = AuxFirst().eval()
    wanted = (model(X[:1])[1].argmax(1) + 1) % 3
    keep = Locality(X[1:], likelihood=likelihood)  # of the output that the demand is about
    editor = RMSProp(lr=3e-2, max_steps=200)
    with pytest.warns(UserWarning, match="also answers '1', which no demand"):
        wp.edit(model, Classified(X[:1], wanted, 0.1), editor, keep=keep)
    with pytest.warns(UserWarning, match="also answers '0', which no demand"):
        found = wp.edit(model, Classified(X[:1], wanted, 0.1, output=1), editor, keep=keep)
    assert found.result is Result.satisfied
    with torch.no_grad():
        before = model(X)[1].argmax(1)
        found.patch.apply(model)
        after = model(X)[1].argmax(1)
    assert after[0] == wanted
    assert found.kept.changed == int((before != after)[1:].sum()) > 0


@pytest.mark.parametrize("keep", [None, Locality(OTHERS[:40])], ids=["nothing", "some"])
def test_an_item_that_the_model_refuses_alone_does_not_hold_alone(keep: Locality | None) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16, track_running_stats=False)  # of the batch, in evaluation mode too
    model = nn.Sequential(nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 4)).eval()
    found = wp.edit(model, second(model, X[:7]), keep=keep, parameters="3.*")
    assert found.result is Result.unreliable
    assert (found.reality.apart, found.reality.alone) == (7, 0)


def nested(inputs: str, answer: str = "key") -> tuple[Row, nn.Module, Tensor, Tensor]:
    """Return a model that is asked so, inputs, and the classes it likes most and second."""
    row = Row("classes", answer, inputs, 1, MANNERS[0], "steps")
    model, x = row.model().eval(), KINDS["classes"].draw(120)
    z = row.outputs(model, x)
    return row, model, x, torch.from_numpy(second_best(z))


@pytest.mark.parametrize(("inputs", "answer"), [*zip(INPUTS, [*ANSWERS, "key"], strict=True)])
@pytest.mark.filterwarnings("ignore:the model also answers", "ignore:Model is judged as it is")
@pytest.mark.filterwarnings("ignore:the patch does not remember")
def test_evaluations_take_nested_inputs_apart(inputs: str, answer: str) -> None:
    (row, model, x, labels), output = nested(inputs, answer), ANSWERS[answer][1]
    right = torch.from_numpy(row.outputs(model, x).argmax(1))
    fix = Classified(row.batch(x[:1]), labels[:1], 0.1, output=output)
    editor, test = RMSProp(lr=1e-2), (row.batch(x), right)
    report = wp.evaluate(model, [fix], editor, test=test, output=output, batch_size=50, progress=False)
    assert report.base_error == 0
    edited = row.model().eval()
    wp.edit(model, fix, editor).patch.apply(edited)
    wrong = int((row.outputs(edited, x).argmax(1) != right.numpy()).sum())
    assert wrong > 0
    assert report.rows[0].impact.error == pytest.approx(100 * wrong / len(x))
    compared = wp.compare(model, edited, test, output=output, batch_size=50)
    assert int(compared.changed.sum()) == wrong


PASSES: list[str] = []


class Counted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        PASSES.append("pass")
        return super().forward(x)


def trained(
    model: nn.Module, asked: list[Constraint], keep: Locality, steps: int = 3, **settings: Any
) -> tuple[float, list[Tensor], int]:
    """Return the objective, its gradients, and how often the body is run once passes are known."""
    objective = EditableObjective(
        model, GradientDescent(lr=0.02, max_steps=steps), parameters="head.*", c_edit=1.0, c_loc=1.0, **settings
    )
    objective(asked, keep)
    PASSES.clear()
    loss = objective(asked, keep)
    passes = len(PASSES)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return float(loss.detach()), list(grads), passes


@pytest.mark.parametrize("inputs", INPUTS)
def test_training_replays_nested_inputs(inputs: str) -> None:
    row, model, x, labels = nested(inputs)
    asked = [Classified(row.batch(x[i : i + 2]), labels[i : i + 2], 0.5, output="main") for i in (0, 2, 4)]
    keep = Locality(row.batch(x[6:]))
    (loss, ours, _), (expected, theirs, _) = (trained(model, asked, keep, replay=replay) for replay in (True, False))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert any(bool(grad.abs().max() > 0) for grad in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True, eq=False)
class Near(Constraint):
    """A constraint of one's own: a number of each item is near a value."""

    items: Tensor
    value: float

    def violation(self, function: Callable[..., Any]) -> Tensor:
        return (function(self.items)[:, 1] - self.value).square() - 1e-2

    @property
    def batches(self) -> tuple[Tensor, ...]:
        return (self.items,)

    def asks(self) -> Iterator[Ask]:
        for item in self.items:
            wanted = torch.tensor([self.value], dtype=torch.float64)
            yield Ask(item.numpy().tobytes(), wanted, 0.1, lambda _, value: f"near {value:g}")

    def record(self) -> Record:
        return Record("tests/near", 1, {"items": self.items}, {"value": self.value})

    @classmethod
    def restored(cls, record: Record) -> Near:
        return cls(record.tensors["items"], float(record.scalars["value"]))


register("tests/near", 1, Near)
FRAME = Seq2SeqFrame(start=(1,), pad=2, name="target")


class Speaker(nn.Module):
    """Writes a token after another, of what it was given and what it wrote last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(12, 8), Counted(8, 24), nn.Linear(24, 12)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(target) + self.embed(source).mean(1, keepdim=True))))


def numbers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, part in (("body", Counted(8, 24)), ("act", nn.Tanh()), ("head", nn.Linear(24, 4))):
        model.add_module(name, part)
    return model


def tags(place: int, on: bool) -> Tagged:
    at = [0]
    chosen: dict[str, Any] = {"on": at} if on else {"off": at}
    return Tagged(X[place : place + 1], margin=0.5, likelihood=Bernoulli(Of.logits), **chosen)


def speech(place: int, answer: list[int]) -> Says:
    return Says({"source": torch.tensor([[3, 4 + place]])}, torch.tensor(answer), FRAME, 0.5)


# What is asked of one input, what contradicts it, and what is asked of another input
OWN = {
    "Tagged": (numbers, lambda: tags(0, True), lambda: tags(0, False), lambda: tags(1, False)),
    "Says": (Speaker, lambda: speech(0, [7, 8]), lambda: speech(0, [7, 9]), lambda: speech(1, [5, 9])),
    "one's own": (numbers, lambda: Near(X[:1], 1.0), lambda: Near(X[:1], 2.0), lambda: Near(X[1:2], -1.0)),
}


@pytest.mark.parametrize(("build", "one", "contrary", "other"), OWN.values(), ids=list(OWN))
def test_later_edits_keep_to_demands_of_every_kind(build: Any, one: Any, contrary: Any, other: Any) -> None:
    broken = []
    for remember in (True, False):
        model = build().eval()
        editor = MinimumNorm()
        first = wp.edit(model, one(), editor, parameters="head.*", remember=remember).raise_for_result()
        first.patch.apply(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            later = wp.edit(model, other(), editor, parameters="head.*", remember=remember).raise_for_result()
        later.patch.apply(model)
        assert other().satisfied(model)
        broken.append(not one().satisfied(model))
        assert later.constraint.kind == " & ".join([one().kind] * (2 if remember else 1))
        if remember:
            with pytest.raises(ConflictingConstraints, match="ask the same input"):
                wp.edit(model, contrary(), editor, parameters="head.*")
    assert broken == [False, True]


@pytest.mark.parametrize(("build", "one", "contrary", "other"), OWN.values(), ids=list(OWN))
def test_training_records_the_passes_of_every_constraint(build: Any, one: Any, contrary: Any, other: Any) -> None:
    model = build()
    asked, likelihood = [contrary(), other()], Categorical(-1, Of.logits)
    some = X[10:20] if not isinstance(model, Speaker) else (torch.randint(3, 12, (10, 2)), torch.ones(10, 1).long())
    keep = Locality(some, likelihood=likelihood)
    assert all(len(fix.batches) == 1 for fix in asked)
    few, many = (trained(model, asked, keep, steps)[2] for steps in (2, 8))
    assert few == many <= 3  # a pass of all demands and one of what is kept, however many steps there are
    (loss, ours, _), (expected, theirs, full) = (
        trained(model, asked, keep, 8, replay=replay) for replay in (True, False)
    )
    assert full > 8
    assert loss == pytest.approx(expected, rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
