"""One table: every constraint, of every kind of output, is met, remembered, and told from what contradicts it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import tiny_text as tiny
import torch
import zoo
from test_contract import CASE, mistake
from torch import Tensor, nn

import weightpatch as wp
from weightpatch.constraints import (
    IGNORED,
    Classified,
    Constraint,
    Kept,
    Preferred,
    Says,
    Seq2SeqFrame,
    Tagged,
    Within,
    restored,
)
from weightpatch.editing import Result
from weightpatch.editors import GaussNewton, MinimumNorm
from weightpatch.errors import ConflictingConstraints
from weightpatch.likelihoods import Bernoulli, Categorical, Gaussian, Of

X, REST = CASE["mlp"].inputs(12).split(3)[0], CASE["mlp"].inputs(12)[3:]
PIXELS = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
NESTED = {"batch": {"pair": (REST, torch.ones(len(REST), 8))}}
FRAME = Seq2SeqFrame(start=(1,), pad=2, name="target")
SOURCE = {"source": torch.tensor([[3, 4, 5]])}
GOOD, BAD = torch.tensor([7, 8, 0]), torch.tensor([9, 0])


class Nested(nn.Module):
    """Takes a tuple in a mapping, and answers a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        hidden = self.body(batch["pair"][0]).tanh() * batch["pair"][1]
        return {"hidden": hidden, "scores": self.head(hidden)}


@dataclass(frozen=True)
class Row:
    """A constraint of the table.

    Attributes:
        asked: what the model does not do yet.
        held: what it does already.
        contrary: what cannot be met together with `asked`.
        build: the model.
        parameters: what moves: the last layer.
        affine: whether answers are affine in it.
        keep: what stays; None for nothing.
        named: whether contradictions are told before any search, or else by an exact editor.
    """

    asked: Callable[[nn.Module], Constraint]
    held: Callable[[nn.Module], Constraint]
    contrary: Callable[[nn.Module], Constraint]
    build: Callable[[], nn.Module] = CASE["mlp"].model
    parameters: str = "3.*"
    affine: bool = True
    keep: wp.Locality | None = wp.Locality(REST)
    named: bool = True

    def model(self) -> nn.Module:
        zoo.seed()
        return self.build().eval()


def one() -> nn.Module:
    """Answer one number an item, (n,)."""
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))


def flipped(model: nn.Module, inputs: Tensor, back: bool = False) -> Tagged:
    """Ask that the first tag becomes what it is not; or that it stays."""
    z = model(inputs)
    first = torch.zeros_like(z, dtype=torch.bool)
    first.view(len(z), -1)[:, 0] = True
    on = (z < 0) ^ back
    return Tagged(inputs, first & on, first & ~on, 0.1, likelihood=Bernoulli(of=Of.logits))


def nested(model: nn.Module, place: int) -> Classified:
    """Ask for the class that is liked most, or second."""
    inputs = {"batch": {"pair": (X, torch.ones(len(X), 8))}}
    labels = model(**inputs)["scores"].argsort(1, descending=True)[:, place]
    return Classified(inputs, labels, 0.1 * place, output="scores")


def pixel(model: nn.Module, place: int) -> Classified:
    """Ask for the class of one pixel of each picture."""
    labels = torch.full((len(PIXELS), 4, 4), IGNORED)
    labels[:, 1, 2] = model(PIXELS).argsort(1, descending=True)[:, place, 1, 2]
    return Classified(PIXELS, labels, 0.1 * place)


def said(model: nn.Module) -> Says:
    """Ask for the first two tokens that the model writes by itself."""
    so_far = torch.tensor([[1]])
    for _ in range(2):
        so_far = torch.cat([so_far, model(SOURCE["source"], so_far)[:, -1].argmax(-1, keepdim=True)], 1)
    return Says(SOURCE, so_far[0, 1:], FRAME)


sequences = partial(Row, build=tiny.Plain, parameters="out.*", keep=None)
ROWS = {
    "Classified": Row(
        lambda model: mistake(model, X),
        lambda model: Classified(X, model(X).argmax(1)),
        lambda model: Classified(X, model(X).argmax(1)),
    ),
    "Classified, probabilities": Row(
        lambda model: mistake(model, X),
        lambda model: Classified(X, model(X).argmax(1)),
        lambda model: Classified(X, model(X).argmax(1)),
        build=lambda: nn.Sequential(*CASE["mlp"].model(), nn.Softmax(1)),
        affine=False,
    ),
    "Classified, pixels": Row(
        lambda model: pixel(model, 1),
        lambda model: pixel(model, 0),
        lambda model: pixel(model, 0),
        build=lambda: nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1)),
        parameters="2.*",
        keep=wp.Locality(torch.randn(9, 2, 4, 4, generator=torch.Generator().manual_seed(1))),
    ),
    "Classified, nested": Row(
        lambda model: nested(model, 1),
        lambda model: nested(model, 0),
        lambda model: nested(model, 0),
        build=Nested,
        parameters="head.*",
        keep=wp.Locality(NESTED, output="scores", likelihood=Categorical())
        & wp.Locality(NESTED, output="hidden", likelihood=Gaussian(1.0)),
    ),
    "Tagged": Row(
        lambda model: flipped(model, X),
        lambda model: Tagged(X, on=model(X) > 0, off=model(X) < 0),
        lambda model: flipped(model, X, back=True),
    ),
    "Tagged, one": Row(
        lambda model: flipped(model, X[:1]),
        lambda model: Tagged(X, on=model(X) > 0, off=model(X) < 0),
        lambda model: flipped(model, X[:1], back=True),
        build=one,
        parameters="2.*",
    ),
    "Within": Row(
        lambda model: Within(X, model(X) + 0.3, 1e-4),
        lambda model: Within(X, model(X), 1e-4),
        lambda model: Within(X, model(X) - 0.3, 1e-4),
    ),
    "Within, one": Row(
        lambda model: Within(X, model(X) + 0.3, 1e-4),
        lambda model: Within(X, model(X), 1e-4),
        lambda model: Within(X, model(X) - 0.3, 1e-4),
        build=one,
        parameters="2.*",
    ),
    "Kept": Row(lambda model: Kept(X, 0.5), lambda model: Kept(X), lambda model: mistake(model, X)),
    "All": Row(
        lambda model: mistake(model, X[:1]) & Kept(X[1:]) & Within(X[2:], model(X[2:]), 1e-2),
        lambda model: Kept(X) & Within(X, model(X), 1e-4),
        lambda model: Kept(X[:1]) & Kept(X[2:]),
        keep=wp.Locality(REST, likelihood=Categorical()),
    ),
    "Says": sequences(
        lambda model: Says(SOURCE, GOOD, FRAME, 0.1),
        said,
        lambda model: Says(SOURCE, BAD, FRAME, 0.1),
    ),
    "Preferred": sequences(
        lambda model: Preferred(SOURCE, GOOD, (BAD,), FRAME, 0.1),
        lambda model: Preferred(SOURCE, BAD, (GOOD,), FRAME),
        lambda model: Preferred(SOURCE, BAD, (GOOD,), FRAME, 0.1),
        named=False,
    ),
}
NO_CONSTRAINTS = {
    "Ask": "what is asked of one input",
    "CausalFrame": "how a language model is asked",
    "Constraint": "abstract",
    "Frame": "how a model is asked for a sequence",
    "IGNORED": "a label",
    "Piece": "some demands of a constraint",
    "Seq2SeqFrame": "how an encoder-decoder is asked",
    "altered": "the same constraint of altered inputs",
    "check_consistent": "looks for contradictions",
    "packed": "inputs as a record has them",
    "register": "who reads a record",
    "restored": "reads a record",
    "token_scores": "what Preferred compares",
    "unpacked": "inputs of a record",
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))


@torch.no_grad()
def test_every_public_constraint_is_in_the_table():
    kinds = {type(row.asked(row.model())).__name__ for row in ROWS.values()}
    assert set(wp.constraints.__all__) - kinds == NO_CONSTRAINTS.keys()
    for name in NO_CONSTRAINTS:
        value = getattr(wp.constraints, name)
        assert not inspect.isclass(value) or not issubclass(value, Constraint) or inspect.isabstract(value)


EDITORS = {"exact": MinimumNorm(), "iterative": GaussNewton(max_steps=50), "default": None}
PAIRS = [
    pytest.param(row, editor, id=f"{name}-{kind}") for name, row in ROWS.items() for kind, editor in EDITORS.items()
]


@pytest.mark.parametrize(("row", "editor"), PAIRS)
def test_every_constraint_is_met_and_survives_its_file(row: Row, editor: wp.editors.Editor | None, tmp_path):
    model = row.model()
    with torch.no_grad():
        fix = row.asked(model).bind(model)
    assert not fix.satisfied(model)
    before = zoo.digest(model.train())
    found = wp.edit(model, fix, editor, keep=row.keep, parameters=row.parameters)
    assert zoo.digest(model) == before
    assert found.result in (Result.satisfied, Result.over_budget if editor is None else None), found
    assert found.violation <= 0
    assert found.certificate is None or found.certificate.affine == row.affine
    assert (found.drift is None) == (row.keep is None)
    assert found.drift is None or 0 <= found.drift < math.inf
    found.patch.save(tmp_path / "fix.patch.safetensors")
    patch, fresh = wp.Patch.load(tmp_path / "fix.patch.safetensors"), row.model()
    assert patch == found.patch
    patch.apply(fresh)
    assert fix.satisfied(fresh)
    with torch.no_grad():  # what the file remembers is what was asked
        again = torch.cat([restored(demand.record).violation(fresh) for demand in patch.demands])
        assert torch.allclose(again, fix.violation(fresh), atol=1e-6)


@every_row
def test_a_constraint_that_holds_already_changes_nothing(row: Row):
    model = row.model()
    with torch.no_grad():
        fix = row.held(model)
    found = wp.edit(model, fix, MinimumNorm(), keep=row.keep, parameters=row.parameters)
    assert (found.result, found.steps, len(found.patch.operations)) == (Result.already_satisfied, 0, 0)


@every_row
def test_demands_that_contradict_each_other_are_told(row: Row):
    model = row.model()
    with torch.no_grad():
        fix, contrary = row.asked(model), row.contrary(model).bind(model)
    remembering = row.model()
    wp.edit(remembering, fix, MinimumNorm(), keep=row.keep, parameters=row.parameters).patch.apply(remembering)
    for asked, edited in ((fix & contrary, model), (contrary, remembering)):
        if row.named:
            with pytest.raises(ConflictingConstraints, match="ask the same input"):
                wp.edit(edited, asked, MinimumNorm(), keep=row.keep, parameters=row.parameters)
        else:
            found = wp.edit(edited, asked, MinimumNorm(), keep=row.keep, parameters=row.parameters)
            assert found.result is Result.infeasible


@pytest.mark.filterwarnings("ignore:the patch does not remember", "ignore:the model also answers")
def test_a_constraint_of_ones_own_reads_what_it_likes():
    class Small(Constraint):
        def violation(self, function: Callable[..., Any]) -> Tensor:
            return function(**NESTED)["scores"].square().sum(1) - 0.1

    found = wp.edit(Nested(), Small(), MinimumNorm(), parameters="head.*")
    assert found.result is Result.satisfied
