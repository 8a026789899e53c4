"""What an edited model answers on a test set: the plain way, and the fast way with the same answers."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from .._calling import Inputs, Params, length, outputs, rows
from ..network import Network
from .engines import Engine, Replayed, Traced
from .screening import answers, margins, settle

__all__ = ["Drift", "FastPredictor", "Prediction", "Predictor", "SlowPredictor"]

_SAMPLE = 500
_SCREENED = 2000  # items below which approximating first is not worth its overhead
_GAIN = 0.6  # the share of the exact time that an approximation may take
_LARGE = 2_000_000  # logits, above which float64 is not worth its time
_NEGLIGIBLE = 2e-3  # seconds for all items, below which nothing is gained


@final
@dataclass(frozen=True, eq=False)
class Prediction:
    """The answers of one model to the whole test set.

    Attributes:
        classes: shape (n,); -1 where a logit is NaN.
        drift: mean KL(before || after) in nats, see `Predictor.drift_items`; NaN where it is not finite.
        exact: how many items were computed exactly, the others being too far from a tie to need it.
    """

    classes: Tensor
    drift: float
    exact: int


class Predictor(ABC):
    """Answers of edited models to one test set.

    Attributes:
        base: the classes that the unedited model answers, shape (n,).
        drift_items: on how many items, at random, the drift comes from exact logits. Where these are not all, it is the
            mean over all items of what rough logits say, corrected by what they are off by on these.
    """

    base: Tensor
    drift_items: int

    @abstractmethod
    def predict(self, params: Params) -> Prediction:
        """Return the answers with these parameters, rounded to the model's dtypes."""


@final
class SlowPredictor(Predictor):
    """Copy the model, load the edited weights, run the whole test set: what every other way has to agree with."""

    def __init__(self, model: nn.Module, network: Network, inputs: Inputs, batch_size: int) -> None:
        self._model, self._network, self._inputs, self._batch_size = model, network, inputs, batch_size
        before = self._logits(network.rounded(network.start))
        self.base, self.drift_items, self._drift = answers(before), len(before), Drift(before)

    def predict(self, params: Params) -> Prediction:
        """Return the answers by a full pass."""
        logits = self._logits(params)
        return Prediction(answers(logits), self._drift.to(logits), len(logits))

    def _logits(self, params: Params) -> Tensor:
        n, size = length(self._inputs), self._batch_size
        with self._network.isolated(), torch.no_grad():
            edited = copy.deepcopy(self._model).eval()
            for name, value in params.items():
                edited.get_parameter(name).copy_(value)
            return torch.cat([outputs(edited, rows(self._inputs, slice(a, a + size))) for a in range(0, n, size)])


@final
class FastPredictor(Predictor):
    """Run only what an edit can change, roughly first where that is faster, and exactly wherever it matters.

    What precedes the edited layers is recorded once. The rest runs on it with batch normalisation folded into
    convolutions, first in bfloat16 where this is measured to be faster; items that this could answer wrongly run again
    in float32 (see `settle`). Where that is closer to a tie than rounding resolves, a full pass of the item's batch
    answers. Models that cannot be traced run as they are, with what precedes the edit replayed.

    Args:
        model: the model, which is not touched.
        network: the same, with the parameters that may change.
        inputs: of the test set, n items.
        batch_size: of full passes.
        drift_items: how many items the drift was estimated on in the run that is continued; None for a new run.

    Attributes:
        untraced_because: why the model runs as it is; empty where it is traced.
    """

    def __init__(
        self, model: nn.Module, network: Network, inputs: Inputs, batch_size: int, drift_items: int | None = None
    ) -> None:
        self._network, self._inputs, self._batch_size, n = network, inputs, batch_size, length(inputs)
        sample = torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")[:_SAMPLE]
        self._sample = sample.sort().values.to(network.device)
        with self._network.isolated(), torch.no_grad():
            start = network.rounded(network.start)
            self._fine = self._engine(model, start)
            self._coarse = None if drift_items == n else self._faster(start, n, wanted=drift_items is not None)
            self.drift_items = n if self._coarse is None else len(self._sample)
            logits = self._fine.over(self._fine.weights(start))
            self.base, self._drift = self._untied(start, logits), Drift(logits)
            if self._coarse is not None:
                self._coarse_drift = Drift(self._coarse.over(self._coarse.weights(start)))

    def predict(self, params: Params) -> Prediction:
        """Return the answers, as a full pass gives them."""
        with self._network.isolated(), torch.no_grad():
            if not all(bool(value.isfinite().all()) for value in params.values()):
                # Fused rectifiers turn NaN into 0, where the model's own hand it on.
                logits = torch.cat([self._full(params, i) for i in range(-(-len(self.base) // self._batch_size))])
                return Prediction(answers(logits), self._drift.to(logits), len(logits))
            weights = self._fine.weights(params)
            if self._coarse is None:
                logits = self._fine.over(weights)
                return Prediction(self._untied(params, logits), self._drift.to(logits), len(logits))
            coarse = self._coarse.over(self._coarse.weights(params))
            logits, known = settle(coarse, lambda index: self._fine.some(weights, index), self._sample)
            return Prediction(self._untied(params, logits), self._corrected(coarse, logits), int(known.sum()))

    def _corrected(self, coarse: Tensor, logits: Tensor) -> float:
        """Estimate the drift with the rough one as control variate: where nothing changed, both are 0."""
        rough = self._coarse_drift.each(coarse)
        exact = self._drift.each(logits[self._sample], self._sample)
        return float(rough.mean() + (exact - rough[self._sample]).mean())

    def _untied(self, params: Params, logits: Tensor) -> Tensor:
        """Answer as a full pass of their batches does what is as close to a tie as the order of rounding decides."""
        classes = answers(logits)
        tied = (~(margins(logits) > self._rounding * logits.abs().amax())).nonzero().squeeze(1)
        for number in sorted(set((tied // self._batch_size).tolist())):
            found = answers(self._batch(params, number))
            classes[number * self._batch_size :][: len(found)] = found
        return classes

    def _full(self, params: Params, number: int) -> Tensor:
        start = number * self._batch_size
        return outputs(self._network.full(params), rows(self._inputs, slice(start, start + self._batch_size)))

    def _engine(self, model: nn.Module, start: Params) -> Engine:
        """Return the fastest engine that gives the same logits, and note how far it rounds from them."""
        exact, self.untraced_because = self._full(start, 0), ""
        first = torch.arange(len(exact), device=exact.device)
        try:
            traced = Traced.of(model, self._network, self._inputs, self._batch_size)
            self._rounding = _rounding(traced.some(traced.weights(start), first), exact)
            self._batch = traced.batch if torch.equal(traced.batch(start, 0), exact) else self._full
            if self._rounding < 1e-3:
                return traced
            self.untraced_because = f"its logits are off by {self._rounding / 10:.1g} of the largest"
        except Exception as error:  # whatever goes wrong on the fast way, the plain one is left
            self.untraced_because = f"{type(error).__name__}: {error}"
        replayed = Replayed(self._network, self._inputs, self._batch_size, self._sample)
        self._rounding = _rounding(replayed.some(start, first[:64]), exact[:64])
        self._batch = replayed.batch
        return replayed

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


def _rounding(logits: Tensor, exact: Tensor) -> float:
    """Return ten times the error of logits without an edit, relative to the largest: what counts as a tie."""
    return max(1e-6, 10 * float((logits - exact).abs().max() / exact.abs().max()))


@final
class Drift:
    """Mean KL(before || after) in nats, from one set of logits (n, classes) to many others.

    ``KL = h(after) - h(before)`` with ``h(z) = log Σ exp z - Σ p z`` and p the probabilities before; exactly 0 where
    nothing changed. In float64 where that is quick, since both sides are large.
    """

    def __init__(self, before: Tensor) -> None:
        self._dtype = torch.float64 if before.numel() <= _LARGE else before.dtype
        self._p = before.to(self._dtype).softmax(1)
        self._certain = bool((self._p > 0).all())
        self._before = self._cross(before, self._p)

    def to(self, after: Tensor) -> float:
        """Return the mean over all items; NaN where that is not finite."""
        return float(self.each(after).mean())

    def each(self, after: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """Return the divergence of each of the items in `index`, whose logits these are, shape (len(index),)."""
        return self._cross(after, self._p[index]) - self._before[index]

    def _cross(self, logits: Tensor, p: Tensor) -> Tensor:
        z = logits.to(self._dtype)
        finite = z if self._certain else z.where(p > 0, 0)  # p = 0 adds nothing, also at -inf
        return z.logsumexp(1) - (p * finite).sum(1)


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
