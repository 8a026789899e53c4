"""The objective of Editable Training: how badly edits would go, as a term of a training loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast, final

import torch.nn.functional as F
from torch import Tensor, nn

from .._calling import Inputs, Params, leaves, outputs
from ..constraints import All, Constraint
from ..editors import IterativeEditor
from ..errors import InvalidInput
from ..likelihoods import Likelihood
from ..locality import Locality
from ..network import LiveNetwork
from ..problem import Problem
from .episodes import Episode, episodes_of
from .modes import eval_is_train
from .rates import LearnedRates
from .trial import Grade, Trial, Weights, cases_of
from .unrolling import Adjoint, Unrolled, Unrolling, step_bytes
from .views import Recorder

__all__ = ["EditableObjective", "Terms"]

Loss = Callable[[Tensor, Any], Tensor]


@final
@dataclass(frozen=True)
class Terms:
    """What one evaluation of the objective found.

    Attributes:
        base: L_base; None where the objective was not asked for it.
        edit: L_edit, the mean over edits of ``max(0, l_e)`` on the edited network.
        locality: L_loc, nats.
        generality: the mean over edits of ``max(0, l)`` on what the edited network was asked in addition.
        success: the share of edits that hold.
        steps: the mean number of updates.
    """

    base: float | None
    edit: float
    locality: float
    generality: float
    success: float
    steps: float

    @staticmethod
    def of(base: Tensor | None, grades: Sequence[Grade]) -> Terms:
        """Average over the edits."""
        means = (sum(column) / len(grades) for column in zip(*grades, strict=True))
        return Terms(None if base is None else float(base.detach()), *means)


@final
class EditableObjective(nn.Module):
    """Editable Training: ``L_base + c_edit L_edit + c_loc L_loc``, differentiated through the editor's steps.

    With θ̂ = Edit(θ, l_e) for edits l_e ~ p(l_e): ``L_edit = max(0, l_e(θ̂))`` and
    ``L_loc = E_x KL(p(y|x, θ) || p(y|x, θ̂))``, each the mean over the edits given. The reference p(y|x, θ) is detached,
    and both sides are in evaluation mode. An edit that holds stops moving. Source: Sinitsin et al., Editable Neural
    Networks, ICLR 2020, equations 2 to 4.

    It owns the model, so that wrapping the objective (DistributedDataParallel, fully_shard at its root,
    ``accelerator.prepare``) wraps the model; train ``objective.parameters()``. The model's modes, buffers and random
    generators are touched by the base pass alone. What precedes the edited parameters is run once a batch, with its
    full gradient. Gradients are computed in the forward pass, one edit at a time, and handed out by the backward pass.

    Args:
        model: any eager module.
        editor: differentiated through; its ``max_steps`` is k.
        parameters: which parameters edits may move, as globs of their names.
        c_edit: the weight of L_edit.
        c_loc: the weight of L_loc.
        c_gen: the weight of the generality term: what an `Episode` asks in addition.
        c_eval: the weight of L_base in evaluation mode, beside that in training mode, where the modes differ. The edit
            terms are about the network in evaluation mode. From scratch, with batch normalisation, nothing else holds
            it to the targets: it was seen to become one that is easily edited and knows nothing.
        base_loss: L_base of (outputs, targets).
        learn: fields of the editor, such as ``("lr", "beta")``, that are learned, one value a tensor: `LearnedRates`.
        first_order: take the editor's gradients for constants: cheaper, and not the true gradient.
        share_locality: measure each of M edits on its own M-th of the locality batch: the same expectation, for the
            price of one batch. Otherwise every edit on all of it.
        graph_bytes: how much memory the graph of one edit's steps may take; beyond it the memory-flat adjoint is used.
        replay: record and replay; full passes otherwise.

    Attributes:
        editor: may be replaced between steps, by one with another ``max_steps`` for a curriculum.
        names: the parameters that edits move.
        terms: the `Terms` of the last forward pass; None before it, and where all weights are 0 and nothing is edited.

    Raises:
        InvalidInput: a weight is negative or not finite, or the editor cannot be differentiated.

    >>> objective = EditableObjective(model, wp.editors.RMSProp(lr=1e-3), parameters="layer3.*", c_edit=0.1, c_loc=0.1)
    >>> loss = torch.nn.functional.cross_entropy(model(images), labels) + objective(fix, keep=keep)
    >>> loss.backward()
    """

    _network: LiveNetwork
    _recorder: Recorder

    def __init__(
        self,
        model: nn.Module,
        editor: IterativeEditor,
        *,
        parameters: str | Sequence[str] = "*",
        c_edit: float = 0.1,
        c_loc: float = 0.1,
        c_gen: float = 0.0,
        c_eval: float = 0.0,
        base_loss: Loss = F.cross_entropy,
        learn: Sequence[str] = (),
        first_order: bool = False,
        share_locality: bool = True,
        graph_bytes: float = 256e6,
        replay: bool = True,
    ) -> None:
        super().__init__()
        _check(editor, c_edit=c_edit, c_loc=c_loc, c_gen=c_gen, c_eval=c_eval)
        self.model, self.editor, self.base_loss = model, editor, base_loss
        self.weights, self.c_eval = Weights(c_edit, c_loc, c_gen), c_eval
        self.first_order, self.share_locality, self.graph_bytes = first_order, share_locality, graph_bytes
        self.terms: Terms | None = None
        self._patterns, self._replay = parameters, replay
        self._look()
        self.names = self._network.names
        self.rates = LearnedRates(editor, self.names, learn) if learn else None

    def settled_editor(self) -> IterativeEditor:
        """Return the editor with the hyper-parameters that have been learned, as plain numbers."""
        return self.editor if self.rates is None else self.rates.settled(self.editor)

    def forward(
        self,
        constraints: Constraint | Episode | Sequence[Constraint | Episode],
        keep: Locality | None = None,
        batch: tuple[Inputs, Any] | None = None,
    ) -> Tensor:
        """Return the objective, a scalar; without L_base where no `batch` is given.

        Args:
            constraints: the edits; each is tried on its own, from θ.
            keep: on what predictions should stay; the batch's inputs when not given.
            batch: inputs and targets of L_base.

        Raises:
            InvalidInput: there are no constraints, or nothing to keep.
            NotEditable: some operation of the model has no second derivative.
        """
        episodes = episodes_of(constraints)
        if keep is None:
            if batch is None:
                raise InvalidInput("EditableObjective was given nothing to keep; pass keep=Locality(inputs) or a batch")
            keep = Locality(batch[0])
        if not self._network.fits():
            self._look()
        if batch is not None and not any(self.weights):
            self.terms = None
            return self.base_loss(outputs(self.model, batch[0]), batch[1])
        live = self._network.refresh()
        keep = keep.of(episodes[0].constraint)
        if len(keep.parts) > 1 or keep.judge is not None:
            raise InvalidInput(
                "EditableObjective was given several localities, or one with a judge; expected one batch of one output"
            )
        episodes = tuple(self._meant(episode, live) for episode in episodes)
        own = batch is not None and batch[0] is keep.inputs
        merged = batch is not None and own and self._eval_is_train(batch[0])
        kept = self._recorder.whole(live, keep.inputs, answer=merged or (own and self.c_eval > 0))
        keep = keep.fitted(lambda *_, **__: kept.output)
        cases = cases_of(self._recorder, live, episodes, keep, kept, share=self.share_locality)
        trial = Trial(self._network, live, self.weights, self.editor, self.rates, self._unrolling)
        loss, base = trial.loss(cases), None
        if batch is not None:
            answer = outputs(lambda: kept.output, ()) if merged else outputs(self.model, batch[0])
            base = self.base_loss(answer, batch[1])
            loss = base + loss
            if self.c_eval and not merged:
                deployed = kept if own else self._recorder.whole(live, batch[0])
                loss = loss + self.c_eval * self.base_loss(outputs(lambda: deployed.output, ()), batch[1])
        self.terms = Terms.of(base, trial.grades)
        return loss

    def _meant(self, episode: Episode, live: Params) -> Episode:
        """Return an episode whose constraints know what outputs are, which is read off the network once a kind."""
        constraint, also = (
            one if one is None else self._known(one, live) for one in (episode.constraint, episode.also)
        )
        assert constraint is not None
        return Episode(constraint, also)

    def _known(self, constraint: Constraint, live: Params) -> Constraint:
        parts: list[Any] = []
        for part in constraint.conjuncts:
            own = is_dataclass(part) and any(field.name == "likelihood" for field in fields(part))
            if own and part.likelihood is not None and not part.likelihood.complete:
                kind = type(part), repr(part.output)
                if kind not in self._meanings:
                    answer = self._recorder.whole(live, part.batches[0]).output
                    self._meanings[kind] = part.bind(lambda *_, answer=answer, **__: answer).likelihood
                parts.append(replace(cast(Any, part), likelihood=self._meanings[kind]))
            else:
                parts.append(part)
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _look(self) -> None:
        """Make a view of the model with its present dtypes and device."""
        self._network = LiveNetwork(self.model, self._patterns, replay=self._replay)
        self._recorder = Recorder(self._network)
        self._sizes: dict[Any, int] = {}
        self._same: dict[tuple[bool, ...], bool] = {}
        self._meanings: dict[Any, Likelihood | None] = {}

    def _eval_is_train(self, inputs: Inputs) -> bool:
        modes = tuple(module.training for module in self.model.modules())
        if modes not in self._same:
            self._same[modes] = eval_is_train(self.model, inputs)
        return self._same[modes]

    def _unrolling(self, editor: IterativeEditor, problem: Problem, given: Sequence[Tensor]) -> Unrolling:
        """Choose how to differentiate one edit: by size, measured once for each kind of edit."""
        if self.first_order:
            return Unrolled(create_graph=False)
        shown = problem.constraint.batches
        kind = (problem.constraint.kind, *(leaf.shape for inputs in shown for leaf in leaves(inputs)))
        size = self._sizes.get(kind) or step_bytes(editor, problem, given)
        if size:  # 0 where the edit holds already
            self._sizes[kind] = size
        return Unrolled() if size * editor.max_steps <= self.graph_bytes else Adjoint()


def _check(editor: IterativeEditor, **weights: float) -> None:
    if not isinstance(editor, IterativeEditor):
        raise InvalidInput(
            f"EditableObjective was given {editor!r:.80} as editor; expected an IterativeEditor such as "
            "weightpatch.editors.RMSProp(lr=1e-3): only a loop of pure steps can be differentiated"
        )
    if not editor.differentiable:
        raise InvalidInput(
            f"EditableObjective was given {editor!r:.120}, which chooses its steps by looking ahead, and such a choice "
            "cannot be differentiated; leave that out for training, as in Preconditioned(line_search=0)"
        )
    if editor.max_steps < 1:
        raise InvalidInput(f"EditableObjective was given max_steps={editor.max_steps}; expected at least 1 step")
    for name, value in weights.items():
        if not (math.isfinite(value) and value >= 0):
            raise InvalidInput(f"EditableObjective was given {name}={value}; expected a finite number, at least 0")
