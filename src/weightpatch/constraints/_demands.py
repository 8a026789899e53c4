"""The usual demands: classes, tags, values, and answers that stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from .._calling import Function, Inputs, Output, check_batch, check_finite_tensor, leaves, outputs, rows
from ..errors import InvalidInput, ShapeMismatch
from ..likelihoods import IGNORED, Bernoulli, Categorical, Gaussian, Likelihood, aligned, as_outputs
from ..records import Record
from ._base import Ask, Constraint, Piece, copies
from ._recording import meaning, meant, packed, unpacked

__all__ = ["IGNORED", "Classified", "Kept", "Tagged", "Within"]


@final
@dataclass(frozen=True, eq=False)
class Classified(Constraint):
    """The class of each input beats every other class by `margin`; a tie is not met.

    The violation of one input with logits z and label y is ``margin + max_{c != y} z_c - z_y``: the constraint of
    Sinitsin et al. (ICLR 2020), ``max_c log p_c - log p_y``, without the normaliser, which cancels, and with a slope
    beyond 0. An exact tie counts as the smallest positive number, so that margin 0 asks for the strict winner. Where
    the outputs are probabilities, z are their logarithms.

    Of tokens, or pixels, each with a label that is not -100 is a demand.

    Args:
        inputs: a batch of n items, as the model takes it: a tensor, a tuple of arguments, or a mapping.
        labels: the classes wanted, shape (n,), or (n, ...) for classes of positions, integers; -100 in the latter where
            nothing is asked.
        margin: by how much they win, in logits; at least 0.
        output: which tensor of a structured answer holds the classes.
        likelihood: what that tensor is.
    """

    inputs: Inputs
    labels: Tensor
    margin: float = 0.0
    output: Output = None
    likelihood: Categorical = Categorical()

    def __post_init__(self) -> None:
        n = check_batch(self.inputs, "Classified")
        labels = self.labels
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            given = f"{labels.dtype} tensor" if isinstance(labels, Tensor) else type(labels).__name__
            raise InvalidInput(f"Classified was given labels as {given}; expected a tensor of {n} integers (int64)")
        if labels.shape[:1] != (n,):
            raise ShapeMismatch(
                f"Classified was given {n} inputs and labels of shape {tuple(labels.shape)}; expected ({n},), or "
                f"({n}, ...) for classes of tokens or pixels"
            )
        _check_kind(self, Categorical)
        _check_margin(self)
        if labels.ndim > 1 and not bool((labels != IGNORED).any()):
            raise InvalidInput("Classified was given labels that are -100 everywhere; expected at least one demand")

    def bind(self, function: Function) -> Classified:
        """Fix what the outputs are, where that was left to be read off them."""
        if self.likelihood.of is not None:
            return self
        with torch.no_grad():
            return replace(self, likelihood=self.likelihood.fitted(outputs(function, self.inputs, self.output)))

    def violation(self, function: Function) -> Tensor:
        """Return ``margin + max_{c != y} z_c - z_y`` per demand, shape (demands,)."""
        return self._violation(*self._others(function))

    def pieces(self, function: Function) -> list[Piece]:
        """Return the violations with what they are the largest of: ``margin + z_c - z_y``, (demands, classes)."""
        others, wanted = self._others(function)
        return [Piece(self._violation(others, wanted), rivals=others - wanted[:, None] + self.margin)]

    def _violation(self, others: Tensor, wanted: Tensor) -> Tensor:
        gap = others.amax(1) - wanted
        return gap + self.margin + _ties(gap)

    def _others(self, function: Function) -> tuple[Tensor, Tensor]:
        """Return the logits of the demands, those of the wanted classes -inf, and these, (demands,)."""
        answer = outputs(function, self.inputs, self.output)
        logits = self.likelihood.logits(answer)
        if logits.shape[:-1] != self.labels.shape:
            raise ShapeMismatch(
                f"Classified was given labels of shape {tuple(self.labels.shape)} and the model returned "
                f"{tuple(answer.shape)}; expected one label for each of {tuple(logits.shape[:-1])}"
            )
        index = self.labels.to(logits.device, torch.int64)
        if index.ndim > 1:
            asked = index != IGNORED
            logits, index = logits[asked], index[asked]
        if int(index.min()) < 0 or int(index.max()) >= logits.shape[1]:
            raise InvalidInput(
                f"Classified was given labels between {int(index.min())} and {int(index.max())}; "
                f"the model has {logits.shape[1]} classes, so expected 0 to {logits.shape[1] - 1}"
            )
        return logits.scatter(1, index[:, None], -torch.inf), logits.gather(1, index[:, None]).squeeze(1)

    def alone(self, item: int) -> Classified | None:
        """Ask of one item; None where nothing is asked of it."""
        one = slice(item, item + 1)
        if self.labels.ndim > 1 and not bool((self.labels[one] != IGNORED).any()):
            return None
        return replace(self, inputs=rows(self.inputs, one), labels=self.labels[one])

    def altered(self, make: Callable[[Any], Any]) -> Classified:
        """Ask the copies for the same classes; those of positions stay in their places."""
        made, m = copies(self.inputs, make)
        return replace(self, inputs=made, labels=_repeated(self.labels, m))

    def asks(self) -> Iterator[Ask]:
        """Yield the classes of each item."""
        wanted = self.labels.detach().cpu().double()
        wanted = wanted.masked_fill(wanted == IGNORED, torch.nan) if wanted.ndim > 1 else wanted
        for key, labels in zip(_keys(self), wanted, strict=True):
            yield Ask(key, labels, 0.0, lambda _, label: f"class {int(label)}")

    def record(self) -> Record:
        """Write inputs and labels."""
        tensors, nested = packed(self.inputs)
        scalars = {"margin": float(self.margin), "inputs": nested, **meaning(self.likelihood, self.output)}
        return Record("weightpatch/classified", 1, tensors | {"labels": self.labels}, scalars)

    @classmethod
    def restored(cls, record: Record) -> Classified:
        """Read them."""
        told = record.scalars
        inputs = unpacked(told["inputs"], record.tensors)
        return cls(inputs, record.tensors["labels"].long(), _number(told["margin"]), **meant(told))


@final
@dataclass(frozen=True, eq=False)
class Tagged(Constraint):
    """Tags of multi-label and binary models are on, or off, by `margin`; exactly at the threshold is not met.

    The violation of one tag of logit z is ``margin - z`` where it is to be on, ``margin + z`` where it is to be off.
    Each tag named is a demand; the others may be anything.

    Args:
        inputs: a batch of n items.
        on: the tags that are to be on: their numbers, the same for all items, or a mask of the outputs' shape, bool. Of
            models with one output, (n,) or (n, 1), the tag is number 0.
        off: those that are to be off, likewise.
        margin: by how much, in logits; at least 0.
        output: which tensor of a structured answer holds the tags.
        likelihood: what that tensor is.

    >>> Tagged(torch.zeros(2, 4), on=(0, 2), off=(1,)).kind
    'Tagged'
    """

    inputs: Inputs
    on: Sequence[int] | Tensor = ()
    off: Sequence[int] | Tensor = ()
    margin: float = 0.0
    output: Output = None
    likelihood: Bernoulli = Bernoulli()

    def __post_init__(self) -> None:
        n = check_batch(self.inputs, "Tagged")
        for name in ("on", "off"):
            given = getattr(self, name)
            if isinstance(given, Tensor):
                if given.dtype != torch.bool or given.shape[:1] != (n,):
                    raise ShapeMismatch(
                        f"Tagged was given {name} as {given.dtype} of shape {tuple(given.shape)}; expected numbers of "
                        f"tags, or a mask: bool, ({n}, tags)"
                    )
            elif not all(isinstance(tag, int) and not isinstance(tag, bool) and tag >= 0 for tag in given):
                raise InvalidInput(f"Tagged was given {name}={given!r:.80}; expected numbers of tags, at least 0")
            else:
                object.__setattr__(self, name, tuple(given))
        if not any(bool(t.any()) if isinstance(t, Tensor) else t for t in (self.on, self.off)):
            raise InvalidInput("Tagged was given no tag; expected at least one that is to be on or off")
        _check_kind(self, Bernoulli)
        _check_margin(self)

    def bind(self, function: Function) -> Tagged:
        """Fix what the outputs are, where that was left to be read off them, and which outputs are asked."""
        with torch.no_grad():
            answer = outputs(function, self.inputs, self.output)
        fitted = self.likelihood.fitted(answer)
        on, off = (as_outputs(self._mask(name, answer), answer, fitted.dim) for name in ("on", "off"))
        return replace(self, on=on, off=off, likelihood=fitted)

    def violation(self, function: Function) -> Tensor:
        """Return ``margin - z`` of each tag that is to be on, ``margin + z`` of each to be off, item by item."""
        answer = outputs(function, self.inputs, self.output)
        z, on, off = self.likelihood.logits(answer), self._mask("on", answer), self._mask("off", answer)
        if bool((on & off).any()):
            tag = int((on & off).nonzero()[0][-1])
            raise InvalidInput(f"Tagged was given tag {tag} of one item as on and as off; drop one of them")
        gap = z.where(off, -z)[on | off]
        return gap + self.margin + _ties(gap)

    def _mask(self, name: str, answer: Tensor) -> Tensor:
        """Return which tags are asked, of the shape of the logits, (n, ..., tags)."""
        given, z = getattr(self, name), aligned(answer, answer, self.likelihood.dim)
        if isinstance(given, Tensor):
            mask = aligned(given.to(z.device), answer, self.likelihood.dim)
            if mask.shape != z.shape:
                raise ShapeMismatch(
                    f"Tagged was given {name} of shape {tuple(given.shape)}; expected {tuple(answer.shape)}, that of "
                    "the model's output"
                )
            return mask
        if given and max(given) >= z.shape[-1]:
            raise InvalidInput(
                f"Tagged was given {name}={given}; the model has {z.shape[-1]} tags, so expected 0 to {z.shape[-1] - 1}"
            )
        mask = torch.zeros_like(z, dtype=torch.bool)
        mask[..., list(given)] = True
        return mask

    def alone(self, item: int) -> Tagged | None:
        """Ask of one item; None where nothing is asked of it."""
        one = slice(item, item + 1)
        on, off = (tags[one] if isinstance(tags, Tensor) else tags for tags in (self.on, self.off))
        if not any(bool(tags.any()) if isinstance(tags, Tensor) else tags for tags in (on, off)):
            return None
        return replace(self, inputs=rows(self.inputs, one), on=on, off=off)

    def altered(self, make: Callable[[Any], Any]) -> Tagged:
        """Ask the copies for the same tags."""
        made, m = copies(self.inputs, make)
        on, off = (_repeated(tags, m) if isinstance(tags, Tensor) else tags for tags in (self.on, self.off))
        return replace(self, inputs=made, on=on, off=off)

    def asks(self) -> Iterator[Ask]:
        """Yield the tags of each item, once bound."""
        if not isinstance(self.on, Tensor) or not isinstance(self.off, Tensor):
            return
        wanted = self.on.double().masked_fill(~(self.on | self.off), torch.nan).cpu()
        for key, tags in zip(_keys(self), wanted, strict=True):
            yield Ask(key + b"tags", tags, 0.0, lambda tag, is_on: f"tagged {tag}" if is_on else f"not tagged {tag}")

    def record(self) -> Record:
        """Write inputs and tags."""
        tensors, nested = packed(self.inputs)
        scalars = {"margin": float(self.margin), "inputs": nested, **meaning(self.likelihood, self.output)}
        for name in ("on", "off"):
            given = getattr(self, name)
            if isinstance(given, Tensor):
                tensors[name] = given
            else:
                scalars[name] = list(given)
        return Record("weightpatch/tagged", 1, tensors, scalars)

    @classmethod
    def restored(cls, record: Record) -> Tagged:
        """Read them."""
        told = record.scalars
        on, off = (record.tensors[n] if n in record.tensors else told[n] for n in ("on", "off"))
        inputs = unpacked(told["inputs"], record.tensors)
        return cls(inputs, on, off, _number(told["margin"]), **meant(told))  # type: ignore[arg-type]


@final
@dataclass(frozen=True, eq=False)
class Within(Constraint):
    """Each output lies within a squared distance of its target: ``||f(x) - y||^2 - tolerance``.

    To ask for the target itself, give as tolerance the square of what rounding may leave: weights in float32 reach an
    output of size s to about 1e-6 s, those in bfloat16 to about 2e-2 s. 0 asks for it bit for bit, which rounding
    hardly ever grants.

    Args:
        inputs: a batch of n items.
        targets: what the model should return, shape (n, ...), that of its output.
        tolerance: the squared distance allowed per item, in squared units of the output; at least 0.
        output: which tensor of a structured answer holds the numbers.
        likelihood: of these numbers: what is kept is measured by it.
    """

    inputs: Inputs
    targets: Tensor
    tolerance: float
    output: Output = None
    likelihood: Gaussian = Gaussian()

    def __post_init__(self) -> None:
        n = check_batch(self.inputs, "Within")
        if not isinstance(self.targets, Tensor) or self.targets.shape[:1] != (n,):
            given = tuple(self.targets.shape) if isinstance(self.targets, Tensor) else type(self.targets).__name__
            raise ShapeMismatch(f"Within was given {n} inputs and targets {given}; expected one target per input")
        check_finite_tensor(self.targets, "the targets of Within")
        _check_kind(self, Gaussian)
        if not 0 <= self.tolerance < float("inf"):
            raise InvalidInput(f"Within was given tolerance={self.tolerance}; expected a finite number, at least 0")

    def violation(self, function: Function) -> Tensor:
        """Return ``||f(x) - y||^2 - tolerance`` per input, shape (n,)."""
        return self._residual(function).square().sum(1) - self.tolerance

    def pieces(self, function: Function) -> list[Piece]:
        """Return the violations with what they are squares of: ``f(x) - y``, shape (n, outputs)."""
        residual = self._residual(function)
        return [Piece(residual.square().sum(1) - self.tolerance, residual, math.sqrt(self.tolerance))]

    def _residual(self, function: Function) -> Tensor:
        answer = outputs(function, self.inputs, self.output)
        if answer.shape != self.targets.shape:
            raise ShapeMismatch(
                f"Within was given targets of shape {tuple(self.targets.shape)}; "
                f"the model returns {tuple(answer.shape)}"
            )
        return (answer - self.targets.to(answer)).reshape(len(answer), -1)

    def alone(self, item: int) -> Within:
        """Ask of one item."""
        one = slice(item, item + 1)
        return replace(self, inputs=rows(self.inputs, one), targets=self.targets[one])

    def altered(self, make: Callable[[Any], Any]) -> Within:
        """Ask the copies for the same targets."""
        made, m = copies(self.inputs, make)
        return replace(self, inputs=made, targets=_repeated(self.targets, m))

    def asks(self) -> Iterator[Ask]:
        """Yield the targets."""
        radius = math.sqrt(self.tolerance)
        for key, target in zip(_keys(self), self.targets.detach().cpu().double(), strict=True):
            yield Ask(key + b"numbers", target, radius, lambda _, value: f"within {radius:.3g} of {value:.4g}")

    def record(self) -> Record:
        """Write inputs and targets."""
        tensors, nested = packed(self.inputs)
        scalars = {"tolerance": float(self.tolerance), "inputs": nested, **meaning(self.likelihood, self.output)}
        return Record("weightpatch/within", 1, tensors | {"targets": self.targets}, scalars)

    @classmethod
    def restored(cls, record: Record) -> Within:
        """Read them."""
        told = record.scalars
        inputs = unpacked(told["inputs"], record.tensors)
        return cls(inputs, record.tensors["targets"], _number(told["tolerance"]), **meant(told))


@final
@dataclass(frozen=True, eq=False)
class Kept(Constraint):
    """The model's answers of today to these inputs stay the same.

    The driver binds it: the answers are those of the unedited model, in evaluation mode. Classes stay by at least
    `margin` logits, and so do tags; numbers stay within the likelihood's tolerance.

    Args:
        inputs: a batch of n items.
        margin: by how much classes and tags win, in logits; at least 0.
        output: which tensor of a structured answer is kept.
        likelihood: what that tensor is; `Gaussian` needs a tolerance here, or takes it from the spread of the answers.
    """

    inputs: Inputs
    margin: float = 0.0
    output: Output = None
    likelihood: Likelihood = Categorical()

    def __post_init__(self) -> None:
        check_batch(self.inputs, "Kept")
        _check_margin(self)

    def violation(self, function: Function) -> Tensor:
        """Refuse: today's answers are not known before `bind`."""
        raise InvalidInput("Kept does not know today's answers yet; call kept.bind(model) first (wp.edit does it)")

    def bind(self, function: Function) -> Constraint:
        """Return `Classified`, `Tagged` or `Within` with what `function` answers now."""
        with torch.no_grad():
            today = outputs(function, self.inputs, self.output).detach()
        likelihood, about = self.likelihood.fitted(today), {"output": self.output}
        if isinstance(likelihood, Categorical):
            return Classified(self.inputs, likelihood.answer(today), self.margin, likelihood=likelihood, **about)
        if isinstance(likelihood, Bernoulli):
            on = as_outputs(likelihood.answer(today) == 1, today, likelihood.dim)
            return Tagged(self.inputs, on, ~on, self.margin, likelihood=likelihood, **about)
        if isinstance(likelihood, Gaussian):
            tolerance = likelihood.tolerance
            least = min(tolerance) if isinstance(tolerance, tuple) else float(tolerance or 0.0)
            return Within(self.inputs, today, least**2, likelihood=likelihood, **about)
        raise InvalidInput(
            f"Kept was given likelihood={likelihood!r:.60}; expected Categorical, Bernoulli or Gaussian: what else "
            "should stay goes into keep=wp.Locality(inputs, likelihood=...), or into a constraint of your own"
        )


def _ties(gap: Tensor) -> Tensor:
    """Return the smallest positive number where nobody wins."""
    return torch.finfo(gap.dtype).tiny * (gap == 0).to(gap.dtype)


def _repeated(tensor: Tensor, m: int) -> Tensor:
    return tensor.repeat(m, *[1] * (tensor.ndim - 1))


def _keys(constraint: Any) -> Iterator[bytes]:
    """Yield what identifies each input, and the output that is asked about."""
    about = repr(constraint.output).encode() if not callable(constraint.output) else str(id(constraint.output)).encode()
    parts = [leaf for leaf in leaves(constraint.inputs) if leaf.ndim]
    n = len(parts[0])
    for row in range(n):
        yield b"".join(bytes_of(leaf[row] if len(leaf) == n else leaf) for leaf in parts) + about


def bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's values."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().tobytes()  # one number's stride may be any


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"a number is {value!r:.40}")
    return float(value)


def _check_margin(constraint: Any) -> None:
    if not 0 <= constraint.margin < float("inf"):
        raise InvalidInput(
            f"{constraint.kind} was given margin={constraint.margin}; expected a finite number of logits, at least 0"
        )


def _check_kind(constraint: Any, kind: type[Likelihood]) -> None:
    if not isinstance(constraint.likelihood, kind):
        raise InvalidInput(
            f"{constraint.kind} was given likelihood={constraint.likelihood!r:.60}; expected a {kind.__name__}"
        )
