"""What a network's outputs mean: the distribution of an answer that they parametrise.

Constraints, localities, statistics, comparisons and reports ask a likelihood what an answer is, when it changed and how
far two predictions are apart. To add one, subclass `Likelihood` and write `divergence` and `answer`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InvalidInput, ShapeMismatch

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Of"]

IGNORED = -100  # a target where nothing is asked, as torch's losses have it
_IMAGES = 4  # dimensions of outputs from which on classes are on dimension 1, as torch's losses have them
_SUMS = 1e-5  # how far float32 probabilities of one position are from a sum of 1
_HALVES = 4e-3  # the same of float16 and bfloat16
_MANY = 32  # outputs that all lie in [0, 1] by no accident
_TOLERANCE = 0.1  # of the spread of kept outputs: from here on a number counts as changed


class Of(Enum):
    """What numbers stand for probabilities."""

    logits = "logits"
    probabilities = "probabilities"
    log_probabilities = "log_probabilities"

    def __repr__(self) -> str:
        return f"Of.{self.name}"


class Likelihood(ABC):
    """The distribution of an answer, one at each *position*: an item, a token of a sequence, a pixel of an image.

    Outputs have shape (n, ..., k): k numbers a position. What is returned for each position has shape (n, ...). A
    likelihood without `log_prob` and `sample` gives no two-sided statistics; one without `margin` and `reach` is
    measured by exact passes.
    """

    @property
    def name(self) -> str:
        """What reports call it, with its units."""
        return repr(self)

    @property
    def error_name(self) -> str:
        """What `figure` is called."""
        return "loss"

    @property
    def unit(self) -> str:
        """The unit of `figure`."""
        return ""

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be read off outputs."""
        return True

    @property
    def discrete(self) -> bool:
        """Whether the loss depends on the answer alone, from 0 where that is right to 1 where nothing of it is."""
        return False

    def fitted(self, outputs: Tensor) -> Likelihood:
        """Return this likelihood with everything fixed that was left to be read off outputs, such as a scale."""
        return self

    @abstractmethod
    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return KL(before || after) of each position in nats, shape (n, ...), differentiable in `after`."""

    @abstractmethod
    def answer(self, outputs: Tensor) -> Tensor:
        """Return what a user of the model reads, (n, ...); one whose answers have k parts overrides `changed` too."""

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return at which positions the answer is another one, (n, ...), bool."""
        return self.answer(before) != self.answer(after)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return how wrong each position is, (n, ...), float64; NaN where the target does not count."""
        raise InvalidInput(f"{self!r} does not say what an error is; write its `loss(outputs, targets)`")

    def figure(self, mean: float) -> float:
        """Return the figure that reports print, of a mean loss."""
        return mean

    def log_prob(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return the log-likelihood of answers, (n, ...), differentiable in `outputs`."""
        raise InvalidInput(f"{self!r} has no log-likelihood; write its `log_prob(outputs, answers)` and `sample`")

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw answers, in the form that `log_prob` takes; the generator is on the CPU."""
        raise InvalidInput(f"{self!r} cannot be sampled; write its `sample(outputs, generator)` and `log_prob`")

    def margin(self, outputs: Tensor, before: Tensor) -> Tensor | None:
        """Return how far each position is from changing its verdict `changed`, (n, ...); None where it does not say."""
        return None

    def reach(self, error: Tensor) -> Tensor:
        """Return by how much errors of the outputs, (n, ..., k), move `margin` at most, (n, ...)."""
        raise InvalidInput(f"{self!r} has a margin and no reach; write its `reach(error)`")


@final
@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of several classes at each position; the answer is the likeliest class.

    Args:
        dim: the dimension of the classes; when not given the last one, and 1 for outputs of four and more dimensions,
            as of an image's pixels (n, classes, height, width).
        of: what the outputs are; when not given probabilities where no output is negative and each position's sum is 1,
            else logits.

    >>> Categorical(of=Of.probabilities).answer(torch.tensor([[0.2, 0.8]]))
    tensor([1])
    """

    dim: int | None = None
    of: Of | None = None

    @property
    def error_name(self) -> str:
        """What `figure` is called."""
        return "error"

    @property
    def unit(self) -> str:
        """The unit of `figure`."""
        return "%"

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be read off outputs."""
        return self.of is not None

    @property
    def discrete(self) -> bool:
        """True: an answer is right or wrong."""
        return True

    def fitted(self, outputs: Tensor) -> Categorical:
        """Fix the dimension and what the outputs are."""
        if self.of is not None:
            return self
        dim = _dimension(outputs, self.dim)
        return Categorical(dim, self._of(_laid(self, outputs, dim)))

    def logits(self, outputs: Tensor) -> Tensor:
        """Return logits with the classes on the last dimension, (n, ..., classes); differentiable.

        Those of probabilities are their logarithms, of 0 that of the smallest number.
        """
        laid = _laid(self, outputs, _dimension(outputs, self.dim))
        return laid.clamp_min(torch.finfo(laid.dtype).tiny).log() if self._of(laid) is Of.probabilities else laid

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return the probabilities of the classes, on the last dimension; NaN for all of a position with a NaN."""
        return self.logits(outputs).softmax(-1)

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return ``Σ_c p_c (log p_c - log q_c)``, (n, ...), nats."""
        _check_alike(self, before, after)
        p, q = (self.logits(outputs).log_softmax(-1) for outputs in (before, after))
        possible = p > -torch.inf  # a class of probability 0 adds nothing, also where both sides are -inf
        return (p.exp() * (p.where(possible, 0) - q.where(possible, 0))).sum(-1)

    def answer(self, outputs: Tensor) -> Tensor:
        """Return the likeliest class of each position, (n, ...); -1, which is no class, where an output is NaN."""
        laid = _laid(self, outputs, _dimension(outputs, self.dim))
        best, index = laid.max(-1)
        return index.where(~best.isnan(), -1)

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return where the class is another one, (n, ...)."""
        _check_alike(self, before, after)
        return self.answer(before) != self.answer(after)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1 where the class is wrong and 0 where it is right; NaN where the target is -100: ignored."""
        answers = self.answer(outputs)
        _check_targets(self, targets, answers.shape, whole=True)
        targets = targets.to(answers.device)
        classes = outputs.shape[_dimension(outputs, self.dim)]
        asked = targets != IGNORED
        if bool(((targets >= classes) | (targets < 0) & asked).any()):
            raise InvalidInput(
                f"targets go from {int(targets[asked].min())} to {int(targets.max())}; the model has {classes} "
                f"classes, so expected 0 to {classes - 1}, or {IGNORED} where nothing is asked"
            )
        return (answers != targets).double().masked_fill(~asked, torch.nan)

    def figure(self, mean: float) -> float:
        """Return the share of wrong answers, in percent."""
        return 100 * mean

    def log_prob(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return ``log p`` of classes (n, ...)."""
        return self.logits(outputs).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a class at each position."""
        chances = self.logits(outputs.detach()).double().softmax(-1)
        drawn = torch.multinomial(chances.flatten(0, -2).cpu(), 1, generator=generator)
        return drawn.view(chances.shape[:-1]).to(outputs.device)

    def margin(self, outputs: Tensor, before: Tensor) -> Tensor:
        """Return by how much the best class beats the second, in units of the outputs."""
        best = _laid(self, outputs, _dimension(outputs, self.dim)).topk(2, -1).values
        return best[..., 0] - best[..., 1]

    def reach(self, error: Tensor) -> Tensor:
        """Return the largest difference of two errors."""
        laid = _laid(self, error, _dimension(error, self.dim))
        return laid.amax(-1) - laid.amin(-1)

    def _of(self, laid: Tensor) -> Of:
        return self.of or (Of.probabilities if _sums_to_one(laid) else Of.logits)


@final
@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Tags that are on or off independently of each other: multi-label models, and binary ones of one output.

    Args:
        of: what the outputs are, logits or probabilities; when not given probabilities where many outputs all lie in
            [0, 1], else logits.
        dim: the dimension of the tags; when not given the last one, and 1 for outputs of four and more dimensions.
            Outputs of shape (n,) are one tag.
    """

    of: Of | None = None
    dim: int | None = None

    @property
    def error_name(self) -> str:
        """What `figure` is called."""
        return "tags wrong"

    @property
    def unit(self) -> str:
        """The unit of `figure`."""
        return "%"

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be read off outputs."""
        return self.of is not None

    @property
    def discrete(self) -> bool:
        """True: an answer is right or wrong."""
        return True

    def fitted(self, outputs: Tensor) -> Bernoulli:
        """Fix the dimension and what the outputs are.

        Raises:
            InvalidInput: few outputs that all lie in [0, 1] can be either.
        """
        if self.of is not None:
            return self
        of = self._of(outputs)
        return Bernoulli(of, self.dim if outputs.ndim == 1 else _dimension(outputs, self.dim))

    def logits(self, outputs: Tensor) -> Tensor:
        """Return logits with the tags on the last dimension, (n, ..., tags); differentiable."""
        laid, of = _events(outputs, self.dim), self._of(outputs)
        if of is Of.probabilities:
            tiny = torch.finfo(laid.dtype)
            return laid.clamp_min(tiny.tiny).log() - (1 - laid).clamp_min(tiny.tiny).log()
        return laid if of is Of.logits else laid - torch.log(-torch.expm1(laid.clamp_max(-1e-38)))

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return the probability of each tag to be on, (n, ..., tags)."""
        return self.logits(outputs).sigmoid()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the sum over tags of ``p log(p/q) + (1-p) log((1-p)/(1-q))``, (n, ...), nats."""
        _check_alike(self, before, after)
        a, b = self.logits(before), self.logits(after)
        on, off = F.logsigmoid(a) - F.logsigmoid(b), F.logsigmoid(-a) - F.logsigmoid(-b)
        p = a.sigmoid()
        return (p * on.where(p > 0, 0) + (1 - p) * off.where(p < 1, 0)).sum(-1)

    def answer(self, outputs: Tensor) -> Tensor:
        """Return which tags are on, p > ½, (n, ..., tags), as 0 and 1; -1 where an output is NaN."""
        z = self.logits(outputs)
        return (z > 0).long().masked_fill(z.isnan(), -1)

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return where any tag changed, (n, ...)."""
        _check_alike(self, before, after)
        return (self.answer(before) != self.answer(after)).any(-1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the share of tags that are wrong; targets are 0 or 1, and -100 where nothing is asked."""
        answers = self.answer(outputs)
        given = aligned(targets.to(answers.device), outputs, self.dim)
        _check_targets(self, given, answers.shape, whole=False)
        given = given.long()
        if bool(((given != 0) & (given != 1) & (given != IGNORED)).any()):
            raise InvalidInput(
                f"targets of tags go from {int(given.min())} to {int(given.max())}; expected 0 for off, 1 for on, and "
                f"{IGNORED} where nothing is asked"
            )
        counts = given != IGNORED
        wrong = ((answers != given) & counts).double().sum(-1)
        asked = counts.sum(-1)
        return (wrong / asked).masked_fill(asked == 0, torch.nan)

    def figure(self, mean: float) -> float:
        """Return the share of wrong tags, in percent."""
        return 100 * mean

    def log_prob(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return the sum over tags of the log-probability of answers (n, ..., tags)."""
        z = self.logits(outputs)
        return F.logsigmoid(z.where(answers > 0, -z)).sum(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw every tag."""
        p = self.logits(outputs.detach()).double().sigmoid().cpu()
        return (torch.rand(p.shape, generator=generator, dtype=p.dtype, device="cpu") < p).long().to(outputs.device)

    def margin(self, outputs: Tensor, before: Tensor) -> Tensor:
        """Return how far the tag nearest to the threshold is from it, in units of the outputs."""
        laid = _events(outputs, self.dim)
        edge = {Of.logits: 0.0, Of.probabilities: 0.5, Of.log_probabilities: math.log(0.5)}[self._of(outputs)]
        return (laid - edge).abs().amin(-1)

    def reach(self, error: Tensor) -> Tensor:
        """Return the largest error."""
        return _events(error, self.dim).abs().amax(-1)

    def _of(self, outputs: Tensor) -> Of:
        if self.of is not None:
            return self.of
        inside = bool(((outputs >= 0) & (outputs <= 1)).all())
        if inside and outputs.numel() < _MANY:
            raise InvalidInput(
                f"Bernoulli was given {outputs.numel()} outputs that all lie between 0 and 1, which may be logits or "
                "probabilities; say which: likelihood=Bernoulli(of=Of.logits) or Bernoulli(of=Of.probabilities)"
            )
        return Of.probabilities if inside else Of.logits


@final
@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Numbers: outputs are the mean of a normal distribution of standard deviation σ.

    Args:
        scale: σ, in units of the outputs: of all, or one for each of the k outputs. When not given, the standard
            deviation of the outputs that are kept.
        tolerance: by how much an output may move before its answer counts as changed, in the same units, likewise of
            all or of each. When not given, a tenth of that standard deviation.
        dim: the dimension of the k outputs of a position; when not given the last one, and 1 for outputs of four and
            more dimensions. Outputs of shape (n,) are one number.
    """

    scale: float | tuple[float, ...] | None = None
    tolerance: float | tuple[float, ...] | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("scale", 0.0), ("tolerance", -1.0)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, Tensor):
                value = tuple(value.tolist()) if value.ndim else float(value)
                object.__setattr__(self, name, value)
            numbers = value if isinstance(value, tuple) else (value,)
            if (
                not all(
                    isinstance(v, (int, float)) and (least < v if least == 0 else v >= 0) and v < math.inf
                    for v in numbers
                )
                or not numbers
            ):
                wanted = "above 0" if least == 0 else "of at least 0"
                raise InvalidInput(
                    f"Gaussian was given {name}={value!r}; expected a finite number {wanted}, in units of the outputs, "
                    "or one for each output"
                )

    @property
    def error_name(self) -> str:
        """What `figure` is called."""
        return "RMSE"

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be read off outputs."""
        return self.scale is not None and self.tolerance is not None

    def fitted(self, outputs: Tensor) -> Gaussian:
        """Take what is not given from the spread of these outputs.

        Raises:
            InvalidInput: the outputs have no spread.
        """
        if self.complete:
            return self
        laid = _events(outputs.detach().double(), self.dim).flatten(0, -2)
        spread = laid.std(0, correction=0)
        if not bool((spread > 0).all()) or not bool(spread.isfinite().all()):
            raise InvalidInput(
                f"{self!r} takes what it lacks from the spread of the outputs, and that of {len(laid)} outputs here is "
                f"{[round(float(s), 6) for s in spread[:8]]}; keep more inputs, or write "
                "likelihood=Gaussian(scale, tolerance) in units of the outputs"
            )
        tolerance = self.tolerance if self.tolerance is not None else _plain(_TOLERANCE * spread)
        return replace(self, scale=self.scale if self.scale is not None else _plain(spread), tolerance=tolerance)

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return ``Σ Δ² / 2σ²``, (n, ...), nats."""
        _check_alike(self, before, after)
        moved = _events(after - before, self.dim) / self._of("scale", after)
        return 0.5 * moved.square().sum(-1)

    def answer(self, outputs: Tensor) -> Tensor:
        """Return the numbers, (n, ..., k)."""
        return _events(outputs, self.dim)

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return where any output moved by more than its tolerance, or became NaN, (n, ...)."""
        _check_alike(self, before, after)
        moved = _events(after - before, self.dim).abs()
        same = (moved <= self._of("tolerance", moved)) | (_events(before, self.dim).isnan() & moved.isnan())
        return ~same.all(-1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of a position's outputs, of those whose targets are not NaN; inf for NaN."""
        values = _events(outputs.double().nan_to_num(torch.inf, torch.inf, -torch.inf), self.dim)
        given = aligned(targets.to(outputs.device), outputs, self.dim)
        _check_targets(self, given, values.shape, whole=False)
        return (values - given.double()).square().nanmean(-1)

    def figure(self, mean: float) -> float:
        """Return the root of a mean squared error, in units of the outputs."""
        return math.sqrt(mean) if mean >= 0 else mean

    def log_prob(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return ``-½ Σ (y - f)² / σ²``, (n, ...), without the constant."""
        return -0.5 * ((_events(outputs, self.dim) - answers) / self._of("scale", outputs)).square().sum(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw ``y = f + σ ε``, ε ~ N(0, 1), (n, ..., k)."""
        laid = _events(outputs.detach(), self.dim)
        noise = torch.randn(laid.shape, generator=generator, dtype=torch.float64, device="cpu").to(laid)
        return laid + self._of("scale", laid) * noise

    def margin(self, outputs: Tensor, before: Tensor) -> Tensor:
        """Return how far the moves are from their tolerance."""
        moved = _events(outputs - before, self.dim).abs()
        return (moved - self._of("tolerance", moved)).abs().amin(-1)

    def reach(self, error: Tensor) -> Tensor:
        """Return the largest error."""
        return _events(error, self.dim).abs().amax(-1)

    def _of(self, name: str, like: Tensor) -> Tensor:
        value = getattr(self, name)
        if value is None:
            raise InvalidInput(
                f"{self!r} has no {name}, in units of the outputs; write likelihood=Gaussian(scale, tolerance), "
                "or have it taken from the spread of what is kept: keep=wp.Locality(inputs, likelihood=Gaussian())"
            )
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def plain(likelihood: Likelihood) -> dict[str, Any] | None:
    """Return a likelihood of this module as scalars and lists, for files; None for one that a user wrote."""
    if isinstance(likelihood, (Categorical, Bernoulli)):
        of = None if likelihood.of is None else likelihood.of.name
        return {"kind": type(likelihood).__name__.lower(), "dim": likelihood.dim, "of": of}
    if isinstance(likelihood, Gaussian):
        numbers = {name: getattr(likelihood, name) for name in ("scale", "tolerance")}
        return {"kind": "gaussian", "dim": likelihood.dim} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()
        }
    return None


def unplain(content: Any) -> Likelihood:
    """Read what `plain` returned; anything else is `InvalidInput`."""
    try:
        kind, dim = content["kind"], content["dim"]
        if dim is not None and type(dim) is not int:
            raise ValueError(f"dim is {dim!r}")
        if kind in ("categorical", "bernoulli"):
            of = None if content["of"] is None else Of[content["of"]]
            return Categorical(dim, of) if kind == "categorical" else Bernoulli(of, dim)
        if kind == "gaussian":
            scale, tolerance = (
                tuple(value) if isinstance(value, list) else value for value in (content["scale"], content["tolerance"])
            )
            return Gaussian(scale, tolerance, dim)
        raise ValueError(f"kind is {kind!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"this is no likelihood that weightpatch wrote: {error}") from error


def _dimension(outputs: Tensor, dim: int | None) -> int:
    if dim is None:
        return 1 if outputs.ndim >= _IMAGES else -1
    return dim


def _events(outputs: Tensor, dim: int | None) -> Tensor:
    """Return outputs with a position's numbers on the last dimension, (n, ..., k); those of shape (n,) as (n, 1)."""
    if outputs.ndim <= 1:
        return outputs.reshape(-1, 1)
    return outputs.movedim(_dimension(outputs, dim), -1)


def aligned(targets: Tensor, outputs: Tensor, dim: int | None) -> Tensor:
    """Return targets of the shape of the outputs, dimensions of 1 aside, as their answers are laid out, (n, ..., k)."""
    same = [size for size in targets.shape if size != 1] == [size for size in outputs.shape if size != 1]
    return _events(targets.reshape(outputs.shape), dim) if same else targets


def as_outputs(laid: Tensor, outputs: Tensor, dim: int | None) -> Tensor:
    """Return what is laid out with a position's numbers last, (n, ..., k), in the shape of the outputs."""
    return laid.reshape(outputs.shape) if outputs.ndim <= 1 else laid.movedim(-1, _dimension(outputs, dim))


def _laid(likelihood: Likelihood, outputs: Tensor, dim: int) -> Tensor:
    if outputs.ndim < 2 or not -outputs.ndim <= dim < outputs.ndim or outputs.shape[dim] < 2:
        raise ShapeMismatch(
            f"{likelihood!r} was asked about outputs of shape {tuple(outputs.shape)}; expected at least 2 classes on "
            f"dimension {dim}. For numbers write likelihood=Gaussian(), for one output that says yes or no Bernoulli()"
        )
    return outputs.movedim(dim, -1)


def _sums_to_one(laid: Tensor) -> bool:
    laid = laid.detach()
    if not laid.numel() or not bool((laid >= 0).all()):
        return False
    halved = any(torch.equal(laid.to(half).to(laid.dtype), laid) for half in (torch.float16, torch.bfloat16))
    return bool(((laid.double().sum(-1) - 1).abs() <= (_HALVES if halved else _SUMS)).all())


def _plain(values: Tensor) -> float | tuple[float, ...]:
    found = tuple(float(value) for value in values)
    return found[0] if len(found) == 1 else found


def _check_alike(likelihood: Likelihood, before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape:
        raise ShapeMismatch(
            f"{likelihood!r} was asked to compare outputs of shapes {tuple(before.shape)} and {tuple(after.shape)}; "
            "expected two equal shapes"
        )


def _check_targets(likelihood: Likelihood, targets: Tensor, shape: torch.Size, *, whole: bool) -> None:
    if targets.shape != shape or (whole and (targets.is_floating_point() or targets.dtype == torch.bool)):
        raise ShapeMismatch(
            f"{likelihood!r} was given targets {str(targets.dtype)[6:]}{tuple(targets.shape)}; expected "
            f"{'integers ' if whole else ''}{tuple(shape)}, those of the answers"
        )
