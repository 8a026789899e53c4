"""What an edited model answers on a test set: the plain way, and the fast way with the same answers."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from .._calling import Inputs, Params, length, outputs, rows
from ..likelihoods import Categorical, Likelihood
from ..network import Network
from .engines import Engine, Replayed, Traced
from .judging import Asked
from .screening import Screen, settle
from .steps import fits

__all__ = ["Drift", "FastPredictor", "Prediction", "Predictor", "SlowPredictor"]

_SAMPLE = 500
_SCREENED = 2000  # items below which approximating first is not worth its overhead
_GAIN = 0.6  # the share of the exact time that an approximation may take
_USUAL = 1e3  # weights above which, and
_GROWN = 64  # times the largest of a tensor, above which what some items err by in bfloat16 says nothing of others
_LARGE = 2_000_000  # logits, above which float64 is not worth its time
_EQUAL = 1e-4  # of the largest output: how far those of a trace may be off
_FEW = 64  # items on which the rounding of passes that are not traced is seen
_NEGLIGIBLE = 2e-3  # seconds for all items, below which nothing is gained


@final
@dataclass(frozen=True, eq=False)
class Prediction:
    """What one model answers to the whole test set.

    Attributes:
        outputs: (n, ..., k): its answers, and with them what changed and what is wrong, are those of full passes;
            numbers are off by rounding.
        drift: mean KL(before || after) in nats, see `Predictor.drift_items`; NaN where it is not finite.
        exact: how many items were computed exactly, the others being too far from another answer to need it.
    """

    outputs: Tensor
    drift: float
    exact: int


class Predictor(ABC):
    """Answers of edited models to one test set.

    Attributes:
        base: the outputs of the unedited model, (n, ..., k), with the answers of full passes.
        likelihood: what they mean, fitted on them.
        drift_items: on how many items, at random, the drift comes from exact outputs. Where these are not all, it is
            the mean over all items of what rough outputs say, corrected by what they are off by on these.
    """

    base: Tensor
    likelihood: Likelihood
    drift_items: int

    @abstractmethod
    def predict(self, params: Params) -> Prediction:
        """Return the answers with these parameters, rounded to the model's dtypes."""


@final
class SlowPredictor(Predictor):
    """Copy the model, load the edited weights, run the whole test set: what every other way has to agree with."""

    def __init__(
        self, model: nn.Module, network: Network, inputs: Inputs, batch_size: int, *, asked: Asked | None = None
    ) -> None:
        self._model, self._network, self._inputs, self._batch_size = model, network, inputs, batch_size
        self._asked = Asked() if asked is None else asked
        self.base = self._outputs(network.rounded(network.start))
        self.likelihood, counts = self._asked.read(self.base)
        self.drift_items, self._drift = len(self.base), Drift(self.base, self.likelihood, counts)

    def predict(self, params: Params) -> Prediction:
        """Return the answers by a full pass."""
        found = self._outputs(params)
        return Prediction(found, self._drift.to(found), len(found))

    def _outputs(self, params: Params) -> Tensor:
        n, size, output = length(self._inputs), self._batch_size, self._asked.output
        with self._network.isolated(), torch.no_grad():
            edited = copy.deepcopy(self._model).eval()
            for name, value in params.items():
                edited.get_parameter(name).copy_(value)
            parts = (rows(self._inputs, slice(a, a + size)) for a in range(0, n, size))
            return torch.cat([outputs(edited, part, output) for part in parts])


@final
class FastPredictor(Predictor):
    """Run only what an edit can change, roughly first where that is faster, and exactly wherever it matters.

    What precedes the edited layers is recorded once. The rest runs on it with batch normalisation folded into
    convolutions, first in bfloat16 where answers alone matter and this is measured to be faster; items that this could
    answer wrongly run again in float32 (see `settle`). Where that is closer to another answer than rounding resolves, a
    full pass of the item's batch answers; where a likelihood does not say how close that is, full passes answer all.
    Models that cannot be traced run as they are, with what precedes the edit replayed.

    Args:
        model: the model, which is not touched.
        network: the same, with the parameters that may change.
        inputs: of the test set, n items.
        batch_size: of full passes.
        drift_items: how many items the drift was estimated on in the run that is continued; None for a new run.
        asked: what is right and what outputs mean; classes when not given.

    Attributes:
        untraced_because: why the model runs as it is; empty where it is traced.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        inputs: Inputs,
        batch_size: int,
        drift_items: int | None = None,
        *,
        asked: Asked | None = None,
    ) -> None:
        self._network, self._inputs, self._batch_size, n = network, inputs, batch_size, length(inputs)
        self._asked = Asked() if asked is None else asked
        sample = torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")[:_SAMPLE]
        self._sample = sample.sort().values.to(network.device)
        with self._network.isolated(), torch.no_grad():
            start = network.rounded(network.start)
            self._fine = self._engine(model, start)
            finely = self._finely(start)
            found = exact = self._whole(start, self._full) if finely is None else finely
            if finely is not None and not self._asked.discrete:
                exact = self._whole(start, self._batch)
            self.likelihood, counts = self._asked.read(exact)
            self._says = self.likelihood.margin(found[:1], exact[:1]) is not None
            if not self._says:
                found = exact = self._whole(start, self._batch)
            self._tie = self._resolved() if self._says else 0.0
            self._screen = Screen(self.likelihood, exact)
            self._drift = Drift(found, self.likelihood, counts)
            screened = self._says and self._asked.discrete
            self.base = self._untied(start, found.clone()) if screened and finely is not None else exact
            self._coarse, self._most = None, _limits(start)
            usual = all(bool(_size(value) <= _USUAL) for value in model.parameters())
            if screened and usual and drift_items != n:
                self._coarse = self._faster(start, n, wanted=drift_items is not None)
            self.drift_items = n if self._coarse is None else len(self._sample)
            if self._coarse is not None:
                self._coarse_drift = Drift(self._coarse.over(self._coarse.weights(start)), self.likelihood, counts)

    def predict(self, params: Params) -> Prediction:
        """Return the answers, as a full pass gives them."""
        with self._network.isolated(), torch.no_grad():
            told = None if self._coarse is None else self._roughly(self._coarse, params)
            if told is not None:
                return told
            found = self._finely(params) if self._says else None
            if found is None:
                found = self._whole(params, self._full if self._says else self._batch)
                return Prediction(found, self._drift.to(found), len(found))
            drift = self._drift.to(found)
            return Prediction(self._untied(params, found), drift, len(found))

    def _roughly(self, engine: Engine, params: Params) -> Prediction | None:
        """Return the answers from rough outputs, and from exact ones where it matters; None where they are too rough.

        How far they are off is seen on a sample, and says nothing where one number may overflow, or where weights are
        so large that a few outputs hang on few values.
        """
        weights = self._fine.weights(params)
        grown = any(bool(_size(value) > self._most[name]) for name, value in params.items())
        if grown or not self._far_from_overflow(weights, params):
            return None
        coarse = engine.over(engine.weights(params))
        if not bool(coarse.isfinite().all()):
            return None
        found, known = settle(coarse, lambda index: self._fine.some(weights, index), self._sample, self._screen)
        if not bool(found.isfinite().all()):
            return None
        drift = self._corrected(coarse, found)
        return Prediction(self._untied(params, found), drift, int(known.sum()))

    def _finely(self, params: Params) -> Tensor | None:
        """Return all outputs, to rounding; None where a number may overflow, of which other operations make another."""
        weights = self._fine.weights(params)
        if not self._far_from_overflow(weights, params):
            return None
        found = self._fine.over(weights)
        return found if bool(found.isfinite().all()) else None

    def _far_from_overflow(self, weights: Any, params: Params) -> bool:
        return all(bool(fits(value)) for value in params.values()) and self._fine.fits(weights)

    def _corrected(self, coarse: Tensor, found: Tensor) -> float:
        """Estimate the drift with the rough one as control variate: where nothing changed, both are 0."""
        rough = self._coarse_drift.each(coarse)
        exact = self._drift.each(found[self._sample], self._sample)
        return float(rough.mean() + (exact - rough[self._sample]).mean())

    def _untied(self, params: Params, found: Tensor) -> Tensor:
        """Replace what is as close to another answer as the order of rounding decides by full passes of its batches."""
        tied = (~(self._screen.margin(found) > self._tie * found.abs().amax())).nonzero().squeeze(1)
        for number in sorted(set((tied // self._batch_size).tolist())):
            exact = self._batch(params, number)
            found[number * self._batch_size :][: len(exact)] = exact
        return found

    def _whole(self, params: Params, batch: Callable[[Params, int], Tensor]) -> Tensor:
        return torch.cat([batch(params, i) for i in range(-(-length(self._inputs) // self._batch_size))])

    def _full(self, params: Params, number: int) -> Tensor:
        some = rows(self._inputs, slice(number * self._batch_size, (number + 1) * self._batch_size))
        return outputs(self._network.full(params), some, self._asked.output)

    def _engine(self, model: nn.Module, start: Params) -> Engine:
        """Return the fastest engine that gives the same outputs, and note how far it rounds from them."""
        exact, self.untraced_because, output = self._full(start, 0), "", self._asked.output
        first, largest = torch.arange(len(exact), device=exact.device), exact.abs().max().clamp_min(1e-30)
        try:
            traced = Traced.of(model, self._network, self._inputs, self._batch_size, output)
            self._error = (traced.some(traced.weights(start), first) - exact) / largest
            self._batch = traced.batch if torch.equal(traced.batch(start, 0), exact) else self._full
            if (off := float(self._error.abs().max())) < _EQUAL:
                return traced
            finite = math.isfinite(off)
            self.untraced_because = f"its outputs are off by {off:.1g} of the largest" if finite else "it overflows"
        except Exception as error:  # whatever goes wrong on the fast way, the plain one is left
            self.untraced_because = f"{type(error).__name__}: {error}"
        replayed = Replayed(self._network, self._inputs, self._batch_size, self._sample, output)
        self._error = (replayed.some(start, first[:_FEW]) - exact[:_FEW]) / largest
        self._batch = replayed.batch
        return replayed

    def _resolved(self) -> float:
        """Return ten times the error of outputs without an edit, relative to the largest: what counts as a tie."""
        error = self._error.nan_to_num(0.0)
        return max(1e-6, 10 * max(float(error.abs().max()), float(self.likelihood.reach(error).max())))

    def _faster(self, start: Params, n: int, *, wanted: bool) -> Engine | None:
        """Return a bfloat16 engine where it is faster, or is wanted anyway; else None."""
        if n < _SCREENED or any(value.dtype != torch.float32 for value in start.values()):
            return None
        try:
            rough = self._fine.rough()
            if rough is None:
                return None
            coarse = _seconds_an_item(rough, start)
        except Exception:
            return None
        fine = _seconds_an_item(self._fine, start)
        return rough if wanted or (fine * n > _NEGLIGIBLE and coarse < _GAIN * fine) else None


def _size(value: Tensor) -> Tensor:
    return value.float().abs().amax() if value.numel() else value.new_zeros(())


def _limits(start: Params) -> dict[str, Tensor]:
    """Return up to which size the weights of each tensor are near those of the unedited model."""
    own = {name: _size(value) for name, value in start.items()}
    largest = torch.stack(list(own.values())).amax()
    return {name: (_GROWN * value.where(value > 0, largest)).clamp_max(_USUAL) for name, value in own.items()}


@final
class Drift:
    """Mean KL(before || after) of a position in nats, from one set of outputs (n, ..., k) to many others.

    For classes ``KL = h(after) - h(before)``, ``h(z) = log Σ exp z - Σ p z``, with p the probabilities before: 0
    where nothing changed, exactly. In float64 where that is quick, since both sides are large.

    Args:
        before: outputs of the unedited model.
        likelihood: what they mean, fitted; classes when not given.
        counts: which positions count, (n, ...); all when not given.
    """

    def __init__(self, before: Tensor, likelihood: Likelihood | None = None, counts: Tensor | None = None) -> None:
        self._dtype = torch.float64 if before.numel() <= _LARGE else before.dtype
        self._likelihood = Categorical().fitted(before) if likelihood is None else likelihood
        self._counts = counts
        if not isinstance(self._likelihood, Categorical):
            self._before = before.to(self._dtype)
            return
        self._p = self._likelihood.logits(before.to(self._dtype)).softmax(-1)
        self._certain = bool((self._p > 0).all())
        self._before = self._cross(before, self._p)

    def to(self, after: Tensor) -> float:
        """Return the mean over all items; NaN where that is not finite."""
        return float(self.each(after).mean())

    def each(self, after: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """Return the divergence of each of the items in `index`, whose outputs these are, (len(index),).

        Of several positions it is their sum, in units that make the mean over all items that over all positions.
        """
        if isinstance(self._likelihood, Categorical):
            found = self._cross(after, self._p[index]) - self._before[index]
        else:
            found = self._likelihood.divergence(self._before[index], after.to(self._dtype))
        if self._counts is None:
            return found.reshape(len(found), -1).mean(1)
        counted = found.where(self._counts[index], 0.0).reshape(len(found), -1).sum(1)
        return counted * (len(self._counts) / self._counts.sum())

    def _cross(self, outputs: Tensor, p: Tensor) -> Tensor:
        assert isinstance(self._likelihood, Categorical)
        z = self._likelihood.logits(outputs.to(self._dtype))
        finite = z if self._certain else z.where(p > 0, 0)  # p = 0 adds nothing, also at -inf
        return z.logsumexp(-1) - (p * finite).sum(-1)


def _seconds_an_item(engine: Engine, params: Params) -> float:
    """Time one pass: the CPU time of this thread where that is the device, which other work on the machine spares."""
    weights, times = engine.weights(params), []
    for _ in range(4):
        started = _clock(params)
        items = len(engine.first(weights))
        times.append((_clock(params) - started) / items)
    return min(times[1:])


def _clock(params: Params) -> float:
    device = next(iter(params.values())).device
    if device.type == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
