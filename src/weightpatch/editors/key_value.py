"""Write new values under keys of linear layers, in closed form: ROME, MEMIT, EMMET, AlphaEdit, UltraEdit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from .._calling import Function, Params
from ..errors import InvalidInput
from ..network import Seen, moved
from ..problem import Problem
from ._closed_form import NormalisedGradient, alike, closed_form
from .adam import Adam
from .base import Editor, Solution
from .metric import Metric

_PATIENCE = 3  # rounds of a search that make nothing better


@final
@dataclass(frozen=True)
class KeyValue(Editor):
    """Change ``W`` so that its keys K get the values they lack, R, and what else goes through it stays: one formula.

    ``Δ = argmin ||Δ K - R||² + λ tr(Δ C Δᵀ) = R (Kᵀ H K + s I)⁻¹ Kᵀ H`` with ``H = C⁻¹ / λ``, columns as in the papers.
    A key is what a layer is given at one position of the constraint's inputs, and R what its output there has to gain.
    The presets set these terms, and nothing else:

    ========== ============================== ============================= ==========================================
    preset     H                              s                             R
    ========== ============================== ============================= ==========================================
    rome       C⁻¹ of reference keys          0: equality, ``Δ K = R``      searched; one key makes Δ of rank one
    emmet      C⁻¹                            0                             searched; many keys
    memit      C⁻¹ / λ                        1: least squares              searched at the last layer, spread over all
    alphaedit  P / λ, P onto the directions   1                             searched and spread
               without reference keys
    ultraedit  I / λ                          1                             one normalised gradient, at each layer
    ========== ============================== ============================= ==========================================

    So ROME is EMMET for one key, and AlphaEdit is MEMIT with a projector for C⁻¹. Demands that hold already, such as
    those of patches that are on the model, have keys with R = 0: AlphaEdit's previous keys, without a hidden cache.

    Values are moved as in the papers: a vector is added to the output of a module at the chosen positions, by a tap in
    a copy of the model, and an editor of the library moves these vectors alone until the constraint holds. To search
    through the edited layer instead (``W + V (Kᵀ H K + s I)⁻¹ Kᵀ H`` with V free) would need no way to move outputs;
    but keys have to be seen for it all the same, and a value could not be spread over layers. What it would know, how
    the edit acts at other positions, is found out by another round here.

    Keys that are the same share one value, as the prompt that several sequences of a demand begin with does.

    A round finds values and solves for the layers in turn: with n layers to go each takes 1 / n of what the value still
    lacks, measured anew. Where the constraint does not hold then, since least squares fall short, or since other
    positions have moved too, the next round starts from there. The papers make one round. Sums are in float64, and
    biases stay.

    Source: ROME, Meng et al., NeurIPS 2022; MEMIT, Meng et al., ICLR 2023; EMMET, Gupta et al. 2024; AlphaEdit, Fang et
    al., ICLR 2025; UltraEdit, Gu et al. 2025.

    Args:
        layers: linear layers by name, in the order in which the model calls them; their weights have to be among the
            parameters that may move. `torch.nn.Linear`, and the transposed `Conv1D` of transformers.
        metric: C or P for each layer, from `weightpatch.statistics`; C = I when not given.
        exact: whether s is 0; keys that ask for different values of the same key then get what lies between.
        weight: λ, in keys: how many times a reference key counts as much as one of the edit; above 0.
        values: the editor that looks for the values, whose units are those of the output, or `NormalisedGradient`.
        at: the module whose output is moved; the layer itself when not given. With several layers it has to be given:
            what their outputs add up to, as the transformer block of the last one does.
        positions: which position of a sequence (n, length, width) makes a key: one for all items, counted from the end
            where negative, or one for each item, in order; all of them, and all items of a classifier, when not given.
        max_steps: the most rounds.

    Raises:
        InvalidInput: a setting cannot be used; when run, a layer is not called, or its weight may not move.

    >>> from weightpatch.statistics import second_moments
    >>> from weightpatch.tasks import text
    >>> language = text.load("language-model")
    >>> layers = ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")
    >>> texts = language.kept(["Water is", "Good"], [" made of hydrogen", " morning"])
    >>> moments = second_moments(language.model, texts, parameters=[f"{layer}.weight" for layer in layers])
    >>> editor = KeyValue.memit(layers, moments.metric(), at="transformer.h.1")
    >>> wp.edit(language.model, language.says("Water is made of hydrogen and", " oxygen"), editor)
    Edit(satisfied, ...)
    """

    layers: tuple[str, ...]
    metric: Metric | None = None
    exact: bool = False
    weight: float = 1.0
    values: Editor | NormalisedGradient = field(default_factory=lambda: Adam(lr=0.1, max_steps=100))
    at: str | None = None
    positions: int | tuple[int, ...] | None = None
    max_steps: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.layers, tuple) or not self.layers or not all(isinstance(n, str) for n in self.layers):
            raise InvalidInput(f"KeyValue was given layers={self.layers!r}; expected a tuple of at least one name")
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise InvalidInput(f"KeyValue was given metric={self.metric!r:.80}; expected a Metric or None")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InvalidInput(f"KeyValue was given weight={self.weight}; expected a finite number above 0")
        if not isinstance(self.values, (Editor, NormalisedGradient)):
            raise InvalidInput(
                f"KeyValue was given values={self.values!r:.80}; expected an editor such as Adam(lr=0.1), or "
                "NormalisedGradient(lr=1e-3)"
            )
        if len(self.layers) > 1 and self.at is None and isinstance(self.values, Editor):
            raise InvalidInput(
                f"KeyValue was given {len(self.layers)} layers and no at; name the module whose output theirs add up "
                "to, as the transformer block of the last one"
            )
        chosen = (self.positions,) if self.positions is None or isinstance(self.positions, int) else self.positions
        if not isinstance(chosen, tuple) or not all(p is None or isinstance(p, int) for p in chosen):
            raise InvalidInput(f"KeyValue was given positions={chosen!r:.80}; expected a whole number or a tuple")
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise InvalidInput(f"KeyValue was given max_steps={self.max_steps!r}; expected an integer, at least 1")

    @classmethod
    def rome(cls, layer: str, metric: Metric, *, positions: int | tuple[int, ...] | None = None) -> KeyValue:
        """Return ROME: equality at one layer."""
        return cls((layer,), _given(metric), exact=True, positions=positions)

    @classmethod
    def emmet(
        cls,
        layers: str | Sequence[str],
        metric: Metric,
        *,
        at: str | None = None,
        positions: int | tuple[int, ...] | None = None,
    ) -> KeyValue:
        """Return EMMET: equality for a batch."""
        return cls(_tuple(layers), _given(metric), exact=True, at=at, positions=positions)

    @classmethod
    def memit(
        cls,
        layers: str | Sequence[str],
        metric: Metric,
        weight: float = 1.0,
        *,
        at: str | None = None,
        positions: int | tuple[int, ...] | None = None,
    ) -> KeyValue:
        """Return MEMIT: least squares against reference keys; the paper's weight is 15,000 on GPT-J."""
        return cls(_tuple(layers), _given(metric), weight=weight, at=at, positions=positions)

    @classmethod
    def alphaedit(
        cls,
        layers: str | Sequence[str],
        metric: Metric,
        weight: float = 1.0,
        *,
        at: str | None = None,
        positions: int | tuple[int, ...] | None = None,
    ) -> KeyValue:
        """Return AlphaEdit: least squares in the directions that reference keys leave free.

        Raises:
            InvalidInput: the metric is no projector: it has no `energy`.
        """
        if not isinstance(metric, Metric) or any(layer.energy is None for layer in metric.layers.values()):
            raise InvalidInput(f"AlphaEdit was given {metric!r:.80}; expected a projector: moments.metric(energy=0.99)")
        return cls(_tuple(layers), metric, weight=weight, at=at, positions=positions)

    @classmethod
    def ultraedit(
        cls,
        layers: str | Sequence[str],
        lr: float = 1e-3,
        weight: float = 1.0,
        *,
        positions: int | tuple[int, ...] | None = None,
        max_steps: int = 100,
    ) -> KeyValue:
        """Return UltraEdit: one gradient a round, no statistics; the paper makes one round over a large batch."""
        values = NormalisedGradient(lr)
        return cls(_tuple(layers), None, weight=weight, values=values, positions=positions, max_steps=max_steps)

    @property
    def taps(self) -> tuple[str, ...]:
        """The layers, and where their values are moved."""
        return tuple(dict.fromkeys((*self.layers, self.at or self.layers[-1])))

    def run(self, problem: Problem) -> Solution:
        """Find values and solve for the weights, round after round, until the constraint holds or nothing moves.

        Where it never holds, what the round came to that left the fewest demands violated is returned.
        """
        names = [f"{layer}.weight" for layer in self.layers]
        missing = [name for name in names if name not in problem.start]
        if missing:
            raise InvalidInput(
                f"KeyValue moves {', '.join(names)}; {', '.join(missing)} may not move: add it to parameters=. A tied "
                "weight goes by its first name, and a parametrised one has none"
            )
        part = problem.part(names)
        params, steps, since = part.start, 0, 0
        best: tuple[float, float, Params] | None = None
        for made in range(self.max_steps + 1):
            with torch.no_grad():
                violation = part.violation(params)
            unmet, total = float((violation > 0).sum()), float(violation.relu().sum())
            if not math.isfinite(total):
                break
            if made and (best is None or (unmet, total) < best[:2]):
                best, since = (unmet, total, params), 0
            if not unmet or made == self.max_steps or since == self._patience or problem.expired:
                break
            changed, searched = self._round(part, params)
            steps, since = steps + searched + len(names), since + 1
            if all(torch.equal(changed[name], params[name]) for name in names):
                break
            params = changed
        return Solution({**problem.start, **(params if best is None else best[2])}, steps)

    @property
    def _patience(self) -> int:
        """After how many rounds without a better one to stop: a gradient's are small, and many."""
        return self.max_steps if isinstance(self.values, NormalisedGradient) else _PATIENCE

    def _round(self, problem: Problem, params: Params) -> tuple[Params, int]:
        """Return the parameters after one round, and the steps of the search."""
        seen = self._look(problem, params)
        rows = self._rows(seen)
        if isinstance(self.values, NormalisedGradient):
            for layer, gradient in self._gradients(problem, params, seen).items():
                keys = seen.inputs(layer)[rows].double()
                params = self._written(params, layer, seen, rows, self.values.residuals(keys, gradient[rows].double()))
            return params, 0
        at = self.at or self.layers[-1]
        values, steps = self._searched(self.values, problem, params, seen, rows)
        for place, layer in enumerate(self.layers):
            seen = seen if place == 0 else self._look(problem, params)
            lacking = values - seen.outputs(at)[rows].double()
            params = self._written(params, layer, seen, rows, lacking / (len(self.layers) - place))
        return params, steps

    def _look(self, problem: Problem, params: Params) -> Seen:
        """Return what the modules are given and answer for the constraint's inputs."""
        seen = Seen()
        with torch.no_grad():
            problem.constraint.violation(moved(problem.at(params), seen))
        for name in self.taps:
            if name not in seen.answered:
                raise InvalidInput(
                    f"KeyValue did not see {name!r}: it is not called for the constraint's inputs, or the model has no "
                    "taps; choose another module, and pass the editor to wp.edit or evaluate"
                )
            if len(seen.outputs(name)) != len(seen.inputs(self.layers[0])):
                raise InvalidInput(
                    f"{name} is called on {len(seen.outputs(name))} rows, {self.layers[0]} on "
                    f"{len(seen.inputs(self.layers[0]))}; expected modules that see the same positions"
                )
        return seen

    def _rows(self, seen: Seen) -> Tensor:
        """Return which rows of all that a layer is given are keys, (m,)."""
        given = seen.given[self.layers[0]]
        if self.positions is None:
            return torch.arange(len(seen.inputs(self.layers[0])), device=given[0].device)
        if any(x.ndim < 3 for x in given):
            raise InvalidInput(
                f"KeyValue was given positions={self.positions}; {self.layers[0]} is given {tuple(given[0].shape)}, in "
                "which there is no position to choose: leave positions out"
            )
        lengths = [x.shape[1:-1].numel() for x in given for _ in range(len(x))]
        chosen = (self.positions,) * len(lengths) if isinstance(self.positions, int) else self.positions
        if len(chosen) != len(lengths) or any(not -n <= p < n for p, n in zip(chosen, lengths, strict=True)):
            raise InvalidInput(
                f"KeyValue was given positions={self.positions}; the constraint has {len(lengths)} items of "
                f"{min(lengths)} to {max(lengths)} positions. Give one for each item, or one for all; demands of "
                "applied patches count as items too, unless remember=False"
            )
        starts = accumulate([0, *lengths[:-1]])
        places = [start + p % n for start, p, n in zip(starts, chosen, lengths, strict=True)]
        return torch.tensor(places, device=given[0].device)

    def _searched(
        self, editor: Editor, problem: Problem, params: Params, seen: Seen, rows: Tensor
    ) -> tuple[Tensor, int]:
        """Return the values that an editor finds, (m, out), float64, and its steps.

        Args:
            editor: moves what is added.
            problem: the layers' weights.
            params: where they are.
            seen: what goes on there.
            rows: the keys.
        """
        where = self.at or self.layers[-1]
        name, outputs = f"the output of {where}", seen.outputs(where)
        like = next(iter(params.values()))
        which = alike(seen.inputs(self.layers[-1])[rows])

        def at(given: Params) -> Function:
            added = like.new_zeros(outputs.shape).index_add(0, rows, given[name][which])
            return moved(problem.at(_tracked(params)), Seen({where: added}))

        start = like.new_zeros(int(which.max()) + 1, outputs.shape[1])
        found = editor.run(Problem({name: start}, at, problem.constraint))
        return outputs[rows].double() + found.params[name].detach().double()[which], found.steps

    def _gradients(self, problem: Problem, params: Params, seen: Seen) -> dict[str, Tensor]:
        """Return the gradient of the violation in each layer's outputs, at all rows."""
        like = next(iter(params.values()))
        added = {name: like.new_zeros(seen.outputs(name).shape).requires_grad_() for name in self.layers}
        with torch.enable_grad():
            violation = problem.constraint.violation(moved(problem.at(_tracked(params)), Seen(added)))
            grads = torch.autograd.grad(violation.relu().sum(), list(added.values()), materialize_grads=True)
        return dict(zip(added, grads, strict=True))

    def _written(self, params: Params, layer: str, seen: Seen, rows: Tensor, residuals: Tensor) -> Params:
        """Return the parameters with one layer changed."""
        name, keys = f"{layer}.weight", seen.inputs(layer)[rows].double()
        weight = params[name]
        if residuals.shape[1] != seen.outputs(layer).shape[1]:
            raise InvalidInput(
                f"{layer} answers {seen.outputs(layer).shape[1]} numbers, {self.at} {residuals.shape[1]}; expected "
                "layers whose outputs add up to that of the module at which values are moved"
            )
        delta = closed_form(keys, residuals, self._preconditioned(name, keys), exact=self.exact)
        delta = delta.mT if layer in seen.transposed else delta
        if delta.shape != weight.shape:
            raise InvalidInput(f"{name} is {tuple(weight.shape)}; expected {tuple(delta.shape)}, of a linear layer")
        return {**params, name: (weight.double() + delta).to(weight.dtype)}

    def _preconditioned(self, name: str, keys: Tensor) -> Tensor:
        """Return ``Kᵀ H``, (m, width)."""
        if self.metric is None:
            return keys / self.weight
        if name not in self.metric.layers:
            raise InvalidInput(
                f"the metric has no statistics for {name}, only for {', '.join(self.metric.layers)[:200]}; collect "
                "them with weightpatch.statistics.second_moments"
            )
        product: Tensor = keys @ self.metric.layers[name].inverse(keys, with_bias=False)[0] / self.weight
        return product


def _tuple(layers: str | Sequence[str]) -> tuple[str, ...]:
    return (layers,) if isinstance(layers, str) else tuple(layers)


def _given(metric: object) -> Metric:
    if not isinstance(metric, Metric):
        raise InvalidInput(
            f"a preset of KeyValue was given metric={metric!r:.80}; expected weightpatch.statistics."
            "second_moments(model, inputs).metric(). KeyValue itself takes C = I where none is given"
        )
    return metric


def _tracked(params: Params) -> Params:
    """Return the same with gradients asked for: passes keep no graph where no parameter asks."""
    return {name: value.detach().requires_grad_() for name, value in params.items()}
