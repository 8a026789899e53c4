"""One evaluation of the edit terms: every edit tried from θ, with the gradient of how it went."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._calling import Function, Params, selected
from ..editors import IterativeEditor
from ..errors import NotEditable
from ..locality import Locality
from ..network import LiveNetwork, Recording
from ..problem import Problem
from .episodes import Episode
from .rates import LearnedRates
from .unrolling import Unrolling
from .views import Batch, Part, Recorder, View

__all__ = ["Case", "Grade", "Trial", "Weights", "cases_of"]

Choose: TypeAlias = Callable[[IterativeEditor, Problem, Sequence[Tensor]], Unrolling]


class Weights(NamedTuple):
    """c_edit, c_loc and c_gen."""

    edit: float
    loc: float
    gen: float


class Grade(NamedTuple):
    """How one edit went: L_edit, L_loc and the generality term, whether it holds, and its updates."""

    edit: float
    locality: float
    generality: float
    holds: bool
    steps: int


@final
@dataclass(frozen=True, eq=False)
class Case:
    """One edit with what is recorded for it, and its share of what should stay.

    Attributes:
        episode: the edit.
        parts: the recorded batches that it will ask the network about.
        keep: its share.
    """

    episode: Episode
    parts: tuple[Part, ...]
    keep: Locality


def cases_of(
    recorder: Recorder, live: Params, episodes: Sequence[Episode], keep: Locality, kept: Batch, *, share: bool
) -> list[Case]:
    """Record what the edits will ask for, all in one pass where that can be.

    Args:
        recorder: of the network.
        live: the parameters of this moment, by name.
        episodes: the edits.
        keep: what should stay.
        kept: its recorded batch.
        share: whether each edit is measured on a part of `keep` of its own.
    """
    shown = [[inputs for c in episode.constraints for inputs in c.batches] for episode in episodes]
    parts = {id(part.inputs): part for part in recorder.parts(live, [inputs for some in shown for inputs in some])}
    reference = selected(kept.output, keep.output).detach()
    shares = recorder.shares(live, kept, len(episodes) if share else 1)
    cases = []
    for number, (episode, some) in enumerate(zip(episodes, shown, strict=True)):
        own = tuple(parts[id(inputs)] for inputs in some if id(inputs) in parts)
        part = shares[number % len(shares)]
        index = slice(None) if part.index is None else part.index
        mask = None if keep.mask is None else keep.mask[index]
        local = replace(keep, inputs=part.inputs, mask=mask, answers=reference[index])
        cases.append(Case(episode, (*own, part), local))
    return cases


@final
class Trial:
    """Every edit tried from θ: the edit terms as one scalar whose gradient is computed with it, edit by edit.

    No graph of an edit outlives its turn: what is kept is one gradient for each parameter and each recorded tensor.

    Args:
        network: what runs.
        live: the model's parameters at this moment, by name; those that require a gradient get one.
        weights: of the terms.
        editor: with plain hyper-parameters.
        rates: the learned ones, or None.
        choose: says how to differentiate one edit.

    Attributes:
        grades: how each edit went, after `loss`.
    """

    def __init__(
        self,
        network: LiveNetwork,
        live: Params,
        weights: Weights,
        editor: IterativeEditor,
        rates: LearnedRates | None,
        choose: Choose,
    ) -> None:
        self._network, self._weights, self._editor, self._learned = network, weights, editor, rates
        self._live, self._choose = live, choose
        self._trained = {name: value for name, value in live.items() if value.requires_grad}
        self.grades: list[Grade] = []

    def loss(self, cases: Sequence[Case]) -> Tensor:
        """Return ``Σ c L`` of the means over edits, a scalar, differentiable where gradients are on."""
        rates = [] if self._learned is None else self._learned.values()
        batches = {id(part.batch): part.batch for case in cases for part in case.parts}
        recorded = [tensor for batch in batches.values() for tensor in batch.tensors()]
        sources = [*self._trained.values(), *rates, *recorded]
        if not (torch.is_grad_enabled() and sources):
            return torch.stack([self._graded(case, rates) for case in cases]).mean()

        def compute() -> tuple[Tensor, list[Tensor | None]]:
            sums = _Sums(sources)
            fixed = {name: sums.stand_in(value) for name, value in self._trained.items()}
            learned = [sums.stand_in(rate) for rate in rates]
            shared = [*fixed.values(), *learned]
            losses = [self._differentiated(case, fixed, learned, shared, sums) for case in cases]
            return torch.stack(losses).mean(), sums.scaled(1 / len(cases))

        return _Precomputed.apply(compute, *sources)  # type: ignore[no-any-return,no-untyped-call]

    def _differentiated(
        self, case: Case, fixed: Params, learned: Sequence[Tensor], shared: Sequence[Tensor], sums: _Sums
    ) -> Tensor:
        """Try one edit, add its gradients to `sums`, and return its loss."""
        everything = {**self._live, **fixed}
        view, leaves = View(self._network, everything), list(shared)
        for part in case.parts:
            recording, stand_ins = sums.recorded(part)
            view.show(part.inputs, recording)
            leaves += stand_ins
        problem, editor = self._problem(case, everything, view.at), self._with(learned)
        try:
            unrolling = self._choose(editor, problem, leaves)
            found = unrolling.gradient(editor, problem, lambda params: self._outer(case, view.at(params)), leaves)
        except RuntimeError as error:
            _refuse_once_differentiable(error)
            raise
        sums.add(leaves, found.grads)
        self.grades[-1] = self.grades[-1]._replace(steps=found.steps)
        return found.loss

    def _graded(self, case: Case, rates: Sequence[Tensor]) -> Tensor:
        """Try one edit without gradients of how it went."""
        everything = {name: value.detach() for name, value in self._live.items()}
        view = View(self._network, everything)
        for part in case.parts:
            view.show(part.inputs, part.recording())
        found = self._with([rate.detach() for rate in rates]).run(self._problem(case, everything, view.at))
        with torch.no_grad():
            loss = self._outer(case, view.at(found.params))
        self.grades[-1] = self.grades[-1]._replace(steps=found.steps)
        return loss

    def _problem(self, case: Case, everything: Params, at: Callable[[Params], Function]) -> Problem:
        start = {name: _master(everything[name]) for name in self._network.names}
        return Problem(start, at, case.episode.constraint, case.keep if self._editor.keep_weight else None)

    def _with(self, rates: Sequence[Tensor]) -> IterativeEditor:
        return self._editor if self._learned is None else self._learned.editor(self._editor, rates)

    def _outer(self, case: Case, after: Function) -> Tensor:
        """Return ``c_edit L_edit + c_loc L_loc + c_gen L_gen`` of an edited network, and note the terms."""
        violation = case.episode.constraint.violation(after)
        edit, locality = violation.relu().mean(), case.keep.drift(after, after)
        also = case.episode.also
        generality = torch.zeros_like(edit) if also is None else also.violation(after).relu().mean()
        holds = bool((violation <= 0).all())
        terms = [float(term.detach()) for term in (edit, locality, generality)]
        self.grades.append(Grade(terms[0], terms[1], terms[2], holds, 0))
        c = self._weights
        return c.edit * edit + c.loc * locality + c.gen * generality


class _Sums:
    """Stand-ins for the sources, behind which no edit's graph reaches, and the sums of their gradients."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self._sources = sources
        self._own: set[int] = set()  # places whose sum is a tensor of ours: autograd may hand out one for two leaves
        self._places = {id(source): place for place, source in enumerate(sources)}
        self._found: list[Tensor | None] = [None] * len(sources)
        self._stands: dict[int, tuple[Tensor, int, slice]] = {}

    def stand_in(self, source: Tensor) -> Tensor:
        """Return a leaf with a source's values."""
        return self._note(_master(source.detach()), self._places[id(source)], slice(None))

    def recorded(self, part: Part) -> tuple[Recording, list[Tensor]]:
        """Return a part's recording with a leaf in place of every differentiated tensor, and these leaves."""
        some = part.recording()
        made: dict[int, Tensor] = {}
        for whole, own in zip(part.batch.recording.tensors(), some.tensors(), strict=True):
            if whole.requires_grad:
                index = slice(None) if own is whole or part.index is None or len(own) == len(whole) else part.index
                made[id(own)] = self._note(own.detach(), self._places[id(whole)], index)
        return some.mapped(lambda tensor: made.get(id(tensor), tensor)), list(made.values())

    def _note(self, values: Tensor, place: int, index: slice) -> Tensor:
        leaf = values.requires_grad_()
        self._stands[id(leaf)] = (leaf, place, index)
        return leaf

    def add(self, leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Add one edit's gradients."""
        for leaf, grad in zip(leaves, grads, strict=True):
            if grad is None:
                continue
            _, place, index = self._stands[id(leaf)]
            total = self._found[place]
            if total is None and index == slice(None):
                self._found[place] = grad
                continue
            if total is None:
                total = torch.zeros(self._sources[place].shape, dtype=grad.dtype, device=grad.device)
            elif place not in self._own:
                total = total.clone()
            self._found[place] = total
            self._own.add(place)
            part = total[index] if total.ndim else total
            part.add_(grad)

    def scaled(self, factor: float) -> list[Tensor | None]:
        """Return the sums, multiplied, in the sources' dtypes."""
        pairs = zip(self._found, self._sources, strict=True)
        some = [(None if f is None else f if factor == 1 else f * factor, source) for f, source in pairs]
        return [None if found is None else found.to(source.dtype) for found, source in some]


@final
class _Precomputed(torch.autograd.Function):
    """A scalar whose gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], tuple[Tensor, list[Tensor | None]]], *sources: Tensor) -> Tensor:
        """Compute both."""
        with torch.enable_grad():
            value, grads = compute()
        ctx.save_for_backward(*grads)
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        """Hand out the gradient, weighted."""
        return (None, *(None if grad is None else grad * weight.to(grad.dtype) for grad in ctx.saved_tensors))


def _master(value: Tensor) -> Tensor:
    """Return float32 for float16 and bfloat16: small steps would be lost in them."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _refuse_once_differentiable(error: RuntimeError) -> None:
    """Name an operation that cannot be differentiated twice, and the way out; let other errors pass."""
    text = str(error)
    found = re.search(r"derivative for '?([\w:]+?)'? is not implemented", text)
    if found is None and "does not currently support double backward" not in text:
        return
    raise NotEditable(
        f"{found.group(1) if found else 'an operation of the model'} has no second derivative, which Editable Training "
        f"needs between the edited parameters and the output ({text.splitlines()[0]}); replace it by an operation that "
        "has one, choose parameters behind it, or pass first_order=True"
    ) from error
