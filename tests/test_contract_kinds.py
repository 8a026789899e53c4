"""One table: what an edit tells is true, whatever outputs mean and however a model is asked, answers and behaves.

The oracles are written out in numpy and know nothing of the package: they see a fresh copy of the model, with the patch
that was saved, and pick its answers apart themselves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from scipy import special, stats
from torch import Tensor, nn

import weightpatch as wp
from weightpatch import Locality, Result
from weightpatch.constraints import IGNORED, Classified, Constraint, Tagged, Within
from weightpatch.editors import GaussNewton, RMSProp
from weightpatch.likelihoods import Bernoulli, Gaussian, Likelihood, Of
from weightpatch.verdict import Level

Array = np.ndarray[Any, Any]
ASKED, DRAWS = 2, 100


@dataclass
class Answer:
    aux: Tensor
    main: Tensor


def mine(answer: dict[str, Tensor]) -> Tensor:
    return answer["main"]


# How a model answers: its answer of two tensors, `output=`, and how a reader picks the one that is meant
ANSWERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any, Callable[[Any], Tensor]]] = {
    "tensor": (lambda aux, main: main, None, lambda answer: answer),
    "key": (lambda aux, main: {"aux": aux, "main": main}, "main", lambda answer: answer["main"]),
    "place": (lambda aux, main: (aux, main), 1, lambda answer: answer[1]),
    "attribute": (Answer, "main", lambda answer: answer.main),
    "function": (lambda aux, main: {"aux": aux, "main": main}, mine, lambda answer: answer["main"]),
}
# How a batch is nested: x, and a second tensor that belongs to the items
INPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda x, more: x,
    "tuple in tuple": lambda x, more: ((x, (more,)),),
    "dict in dict": lambda x, more: {"batch": {"x": x, "deep": {"more": more}}},
    "list": lambda x, more: [x, more],
    "numpy": lambda x, more: {"x": x.numpy(), "more": [more.numpy(), None]},
    "array": lambda x, more: x.numpy(),
}
MANNERS = ("deterministic", "stochastic", "batch-dependent")
EDITORS = {
    "default": (None, "head.*"),
    "exact": (GaussNewton(max_steps=50), "head.*"),
    "steps": (RMSProp(lr=0.01, max_steps=300), "*"),
}


def belonging(x: Tensor) -> Tensor:
    return x.double().reshape(len(x), -1).mean(1, keepdim=True).float()


def tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, (Tensor, np.ndarray)):
        yield torch.as_tensor(given)
    elif isinstance(given, (dict, tuple, list)):
        for part in given.values() if isinstance(given, dict) else given:
            yield from tensors(part)


def second_best(z: Array) -> Array:
    return np.argsort(-z, -1)[..., 1]


def kl_of_classes(p: Array, q: Array) -> Array:
    return special.rel_entr(p, q).sum(-1)


def kl_of_tags(p: Array, q: Array) -> Array:
    return (special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)).sum(-1)


def only(labels: Array, place: tuple[int, ...]) -> Tensor:
    """Return labels of positions that are ignored everywhere but at one place of each item."""
    kept = np.full_like(labels, IGNORED)
    kept[:, *place] = labels[:, *place]
    return torch.from_numpy(kept)


@dataclass(frozen=True)
class Kind:
    """What outputs mean.

    Attributes:
        draw: makes inputs of n items.
        body: x to (n, ..., 16) or, of pixels, (n, 16, ...).
        head: to outputs.
        end: what is done with outputs last.
        ask: inputs, outputs with numbers last, and the output: what they do not answer.
        holds: of outputs and what `ask` made: which items do what is asked, by the margin that is asked.
        changed: of outputs before and after, which positions answer otherwise, (n, ...).
        drift: of outputs before and after, KL of each position.
        likelihood: for what is kept, given how many items.
        unit: of outputs, given those of all that is kept: what `changed` and `drift` are given is divided by it.
        last: whether the outputs of a position are on the last dimension.
    """

    draw: Callable[[int], Tensor]
    body: Callable[[], nn.Module]
    head: Callable[[], nn.Module]
    end: Callable[[Tensor], Tensor]
    ask: Callable[[Any, Array, Any], Constraint]
    holds: Callable[[Array, Any], Array]
    changed: Callable[[Array, Array], Array]
    drift: Callable[[Array, Array], Array]
    likelihood: Callable[[int], Likelihood | None] = lambda n: None
    unit: Callable[[Array], Any] = lambda z: 1.0
    last: bool = True


def floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def vectors(out: int, **facts: Any) -> Kind:
    return Kind(
        draw=floats(6),
        body=lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh()),
        head=lambda: nn.Linear(16, out),
        **{"end": lambda z: z, **facts},
    )


def classes_of(
    place: tuple[int, ...] = (), logits: Callable[[Array], Array] = lambda z: z, **facts: Any
) -> dict[str, Any]:
    """Ask for the class that is liked second, of each item or at one place of it."""

    def ask(inputs: Any, z: Array, output: Any) -> Constraint:
        labels = second_best(z)
        return Classified(inputs, only(labels, place) if place else torch.from_numpy(labels), 0.1, output=output)

    def holds(z: Array, fix: Any) -> Array:
        wanted = fix.labels.numpy()
        mine = np.arange(z.shape[-1]) == wanted[..., None]
        z = logits(z)
        gap = np.where(mine, z, -np.inf).max(-1) - np.where(mine, -np.inf, z).max(-1)
        return ((gap >= fix.margin) | (wanted == IGNORED)).reshape(len(z), -1).all(1)

    told = {"drift": lambda a, b: kl_of_classes(special.softmax(a, -1), special.softmax(b, -1)), **facts}
    return {"ask": ask, "holds": holds, "changed": lambda a, b: a.argmax(-1) != b.argmax(-1), **told}


def tags_of(likelihood: Bernoulli, **facts: Any) -> dict[str, Any]:
    """Ask for the first tag of each item to be what it is not."""

    def first(z: Array, on: bool) -> Tensor:
        mask = np.zeros(z.shape, dtype=bool)
        mask.reshape(len(z), -1)[:, 0] = (z.reshape(len(z), -1)[:, 0] > 0) != on
        return torch.from_numpy(mask)

    def ask(inputs: Any, z: Array, output: Any) -> Constraint:
        return Tagged(inputs, first(z, True), first(z, False), 0.1, output=output, likelihood=likelihood)

    def holds(z: Array, fix: Any) -> Array:
        on, off = fix.on.numpy(), fix.off.numpy()
        return np.where(on, z >= fix.margin, ~off | (z <= -fix.margin)).reshape(len(z), -1).all(1)

    def wide(z: Array) -> Array:
        return z.reshape(len(z), -1)

    return {
        "ask": ask,
        "holds": holds,
        "changed": lambda a, b: ((wide(a) > 0) != (wide(b) > 0)).any(1),
        "drift": lambda a, b: kl_of_tags(special.expit(wide(a)), special.expit(wide(b))),
        "likelihood": lambda n: likelihood,
        **facts,
    }


def numbers_of(fitted: bool) -> dict[str, Any]:
    """Ask for 0.3 more; the scale is given, or read off more than one kept item."""
    return {
        "ask": lambda inputs, z, output: Within(inputs, torch.from_numpy(z + 0.3).float(), 1e-3, output=output),
        "holds": lambda z, fix: ((z - fix.targets.numpy()) ** 2).reshape(len(z), -1).sum(1) <= fix.tolerance,
        "changed": lambda a, b: (np.abs(b - a) > 0.1).reshape(len(a), -1).any(1),
        "drift": lambda a, b: (0.5 * (b - a) ** 2).reshape(len(a), -1).sum(1),
        "likelihood": lambda n: None if fitted and n > 1 else Gaussian(0.5, 0.05),
        "unit": lambda z: z.std(0) if fitted and len(z) > 1 else 0.5,
    }


KINDS = {
    "classes": vectors(4, **classes_of()),
    "probabilities": vectors(4, end=lambda z: z.softmax(1), **classes_of(logits=np.log, drift=kl_of_classes)),
    "tags": vectors(5, **tags_of(Bernoulli())),
    "one logit": vectors(1, end=lambda z: z.flatten(), **tags_of(Bernoulli(of=Of.logits))),
    "numbers (n,)": vectors(1, end=lambda z: z.flatten(), **numbers_of(False)),
    "numbers (n, k)": vectors(3, **numbers_of(True)),
    "pixels": Kind(
        draw=floats(2, 3, 3),
        body=lambda: nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Tanh()),
        head=lambda: nn.Conv2d(16, 3, 1),
        end=lambda z: z,
        last=False,
        **classes_of((1, 2)),
    ),
    "tokens": Kind(
        draw=lambda n: torch.randint(0, 30, (n, 4), generator=torch.Generator().manual_seed(n)),
        body=lambda: nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 16), nn.Tanh()),
        head=lambda: nn.Linear(16, 8),
        end=lambda z: z,
        **classes_of((3,)),
    ),
}


class Model(nn.Module):
    """A body, a head that is asked about and another one."""

    def __init__(self, kind: Kind, answer: str, manner: str) -> None:
        super().__init__()
        zoo.seed()
        self.body, self.head, self.other = kind.body(), kind.head(), kind.head()
        self.kind, self.answer, self.manner = kind, answer, manner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, *more = tensors((args, kwargs))
        h = self.body(x)
        scale = 1 + 0.1 * (more[0] if more else belonging(x))
        h = h * scale.view(-1, *[1] * (h.ndim - 1))
        if self.manner == "stochastic":
            h = nn.functional.dropout(h, 0.2)
        if self.manner == "batch-dependent":
            h = h - h.mean(0)
        return ANSWERS[self.answer][0](self.other(h), self.kind.end(self.head(h)))


@dataclass(frozen=True)
class Row:
    kind: str
    answer: str
    inputs: str
    kept: int
    manner: str
    editor: str

    def __str__(self) -> str:
        return "-".join(str(value).replace(" ", "_") for value in vars(self).values())

    @property
    def own(self) -> Kind:
        return KINDS[self.kind]

    def model(self) -> nn.Module:
        """Return the model as it is in a training run: its norms have seen data."""
        model = Model(self.own, self.answer, self.manner)
        model.body(self.own.draw(50))
        return model

    def batch(self, x: Tensor) -> Any:
        return INPUTS[self.inputs](x, belonging(x))

    @torch.no_grad()
    def outputs(self, model: nn.Module, x: Tensor) -> Array:
        """Return what the model answers, numbers last, as a reader finds it."""
        given = self.batch(x)
        args = given if isinstance(given, tuple) else (given,)
        answer = model(**given) if isinstance(given, dict) else model(*args)
        z = ANSWERS[self.answer][2](answer).double()
        return (z if self.own.last else z.movedim(1, -1)).numpy()

    def asked(self) -> Tensor:
        return self.own.draw(200)[:ASKED]

    def keeps(self) -> Tensor:
        return self.own.draw(self.kept)

    def mask(self) -> Tensor | None:
        """Return which positions count: of tokens, not those of padding."""
        if self.kind != "tokens":
            return None
        mask = torch.ones(self.kept, 4, dtype=torch.bool)
        mask[::2, 2:] = False
        return mask


DIMENSIONS = {
    "kind": KINDS,
    "answer": ANSWERS,
    "inputs": INPUTS,
    "kept": (10, 300, 2, 1),
    "manner": MANNERS,
    "editor": EDITORS,
}


def covering(dimensions: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Yield rows in which any two values of different dimensions meet: far fewer than all combinations."""
    left = dict.fromkeys(
        ((i, a), (j, b)) for (i, one), (j, two) in combinations(enumerate(dimensions), 2) for a in one for b in two
    )
    while left:
        row = dict(next(iter(left)))
        for i, values in enumerate(dimensions):
            if i not in row:
                row[i] = max(values, key=lambda v: sum(pair in left for pair in _pairs({**row, i: v})))
        for pair in _pairs(row):
            left.pop(pair, None)
        yield tuple(row[i] for i in range(len(dimensions)))


def _pairs(row: dict[int, Any]) -> Iterator[tuple[Any, Any]]:
    return combinations(sorted(row.items(), key=lambda item: item[0]), 2)


ROWS = [Row(*row) for row in covering([list(values) for values in DIMENSIONS.values()])]
every_row = pytest.mark.parametrize("row", ROWS, ids=str)


@dataclass(frozen=True)
class Made:
    """An edit, what it warned of, and whether it left the model alone."""

    fix: Any
    keep: Locality
    found: wp.Edit
    alone: bool
    told: str

    def halves(self, x: Array) -> list[Array]:
        """Return which of the kept items a search saw, and which judged it."""
        parts = [part for part in self.keep.split if part is not None]
        own = [next(tensors(part.inputs)).numpy().reshape(-1, x[0].size) for part in parts]
        flat = x.reshape(len(x), -1)
        return [np.array([int((flat == one).all(1).nonzero()[0][0]) for one in half]) for half in own]


@cache
def made(row: Row) -> Made:
    model, output = row.model().eval(), ANSWERS[row.answer][1]
    zoo.seed()
    fix = row.own.ask(row.batch(row.asked()), row.outputs(model, row.asked()), output)
    keep = Locality(row.batch(row.keeps()), row.mask(), likelihood=row.own.likelihood(row.kept))
    editor, parameters = EDITORS[row.editor]
    before = zoo.digest(model.train())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = wp.edit(model, fix, editor, keep=keep, parameters=parameters)
    return Made(fix, keep, found, zoo.digest(model) == before, " ".join(str(one.message) for one in told))


def patched(row: Row, path: Path) -> nn.Module:
    """Return a fresh model with the patch, as a file holds it."""
    made(row).found.patch.save(path / "a.patch.safetensors")
    model = row.model().eval()
    wp.Patch.load(path / "a.patch.safetensors").apply(model)
    return model


def moves(row: Row, model: nn.Module, index: Array, unit: Any) -> tuple[Array, Array, Array]:
    """Return for each position of some kept items whether it counts, whether its answer is another one, and its KL."""
    x, mask = row.keeps()[index], row.mask()
    before, after = row.outputs(row.model().eval(), x) / unit, row.outputs(model, x) / unit
    changed, drift = row.own.changed(before, after), row.own.drift(before, after)
    counts = np.ones(changed.shape, dtype=bool) if mask is None else mask.numpy()[index]
    return counts, changed & counts, drift


def test_the_table_has_every_pair() -> None:
    dimensions = [list(values) for values in DIMENSIONS.values()]
    rows = [tuple(vars(row).values()) for row in ROWS]
    for (i, one), (j, two) in combinations(enumerate(dimensions), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(one, two))
    assert len(ROWS) < 60


@every_row
def test_the_model_is_left_alone_and_what_is_not_known_is_said(row: Row) -> None:
    edit = made(row)
    assert edit.alone
    assert ("the model also answers" in edit.told) == (row.answer != "tensor")
    assert ("does not remember its demand" in edit.told) == (row.answer == "function")
    assert edit.found.verdict.level is not Level.green  # of fewer than 200 judged items nobody knows that


@every_row
def test_what_is_told_of_kept_items_is_what_a_plain_computation_finds(row: Row, tmp_path: Path) -> None:
    edit, model, x = made(row), patched(row, tmp_path), row.keeps().numpy()
    kept, held_out = edit.found.kept, edit.found.held_out
    halves = edit.halves(x)
    assert sorted(np.concatenate(halves)) == list(range(row.kept))
    assert (held_out is None) == (row.kept == 1) == (len(halves) == 1)
    assert kept.items == row.kept
    if held_out is not None:
        n, c, tries = held_out.items, held_out.changed, max(1, len(edit.found.attempts))
        assert (n, held_out.tries) == (len(halves[1]), tries)
        assert held_out.upper == pytest.approx(1.0 if c == n else stats.beta.ppf(1 - 0.05 / tries, c + 1, n - c))
    if row.manner == "stochastic":
        return
    unit = row.own.unit(row.outputs(row.model().eval(), row.keeps()))
    each = [moves(row, model, half, unit) for half in halves]
    counts, changed, drift = (np.concatenate([part[place] for part in each]) for place in range(3))
    assert (kept.positions, kept.moved) == (counts.sum(), changed.sum())
    assert kept.changed == changed.reshape(row.kept, -1).any(1).sum()
    assert kept.drift == pytest.approx(drift[counts].mean(), rel=2e-3, abs=2e-7)
    if held_out is not None:
        counts, changed, drift = each[1]
        items = changed.reshape(len(changed), -1).any(1).sum()
        assert held_out.changed >= items  # what a gate looked at does not judge it: told as it was before
        if not edit.found.patch.gates:
            assert (held_out.changed, held_out.moved) == (items, changed.sum())
            assert held_out.drift == pytest.approx(drift[counts].mean(), rel=2e-3, abs=2e-7)


@every_row
def test_satisfied_is_true_of_a_fresh_model_in_the_batch_and_alone(row: Row, tmp_path: Path) -> None:
    edit, model, x = made(row), patched(row, tmp_path), row.asked()
    found, reality = edit.found, edit.found.reality
    if row.manner == "stochastic":
        share = np.mean([row.own.holds(row.outputs(model, x), edit.fix).all() for _ in range(DRAWS)])
        assert found.result in (Result.unreliable, Result.unsatisfied) or share == 1
        assert reality.draws in (1, 32)
        assert abs(share - reality.held / reality.draws) < 0.25 or found.result is Result.unsatisfied
        return
    together = row.own.holds(row.outputs(model, x), edit.fix)
    alone = row.own.holds(np.concatenate([row.outputs(model, x[i : i + 1]) for i in range(ASKED)]), edit.fix)
    assert together.all()
    if row.manner == "deterministic":
        assert found.result in (Result.satisfied, Result.over_budget)
    else:
        assert reality.apart == ASKED
        assert (found.result is Result.unreliable) == (not alone.all())
        assert reality.alone == alone.sum()
    assert alone.all() or found.result is Result.unreliable


@pytest.mark.parametrize("row", [row for row in ROWS if row.kept == 1], ids=str)
def test_a_single_kept_item_judges_nothing(row: Row) -> None:
    found = made(row).found
    assert found.held_out is None
    assert found.verdict.level is (Level.red if found.kept.changed else Level.amber)
