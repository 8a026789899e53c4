"""What a constraint is, and the usual demands: classes, values, and answers that stay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from .._calling import Function, Inputs, check_batch, check_finite_tensor, leaves, length, outputs
from ..errors import ConflictingConstraints, InvalidInput, ShapeMismatch

__all__ = ["All", "Classified", "Constraint", "Kept", "Piece", "Within", "altered", "check_consistent"]


class Piece(NamedTuple):
    """Some demands of a constraint, and what exact editors may know of them.

    Attributes:
        violation: one number per demand, shape (n,), met where at most 0.
        residual: None, or what the violations are squares of, shape (n, k): ``l_i = ||r_i||² - radius²``. Where r is
            affine in what is edited, demands are met exactly, by equations where the radius is 0.
        radius: how long a residual may be.
        rivals: None, or what each violation is the largest of, shape (n, m): those above 0 may be met together.
    """

    violation: Tensor
    residual: Tensor | None = None
    radius: float = 0.0
    rivals: Tensor | None = None


class Constraint(ABC):
    """What must hold; a demand is met where its violation is at most 0 (NaN is not met)."""

    @abstractmethod
    def violation(self, function: Function) -> Tensor:
        """Return one number per demand, shape (n,), differentiable in the function's outputs."""

    def bind(self, function: Function) -> Constraint:
        """Return this constraint with everything that depends on today's answers of `function` fixed."""
        return self

    def pieces(self, function: Function) -> list[Piece]:
        """Return the violations in parts, in order, with their residuals where they have any."""
        return [Piece(self.violation(function))]

    def joined(self, other: Constraint) -> Constraint | None:
        """Return what finds the violations of this and then of `other` in one pass; None where nothing can."""
        return None

    def refined(self, model: nn.Module) -> Constraint | None:
        """Return a stricter constraint where this one holds and yet a model, as deployed, does otherwise; else None.

        Args:
            model: edited, in evaluation mode, of the user's own class: what generates sequences, for one.
        """
        return None

    def met(self, function: Function) -> Tensor:
        """Return which demands hold, shape (n,), bool."""
        with torch.no_grad():
            return self.violation(function) <= 0

    def satisfied(self, function: Function) -> bool:
        """Say whether every demand holds."""
        return bool(self.met(function).all())

    @property
    def kind(self) -> str:
        """Name the kind of demand, as a patch's manifest records it."""
        return type(self).__name__

    def __and__(self, other: Constraint) -> Constraint:
        return All((*_parts(self), *_parts(other)))


@final
@dataclass(frozen=True, eq=False)
class All(Constraint):
    """Every demand of every part."""

    parts: tuple[Constraint, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise InvalidInput("All was given no constraint; expected at least one, as in Classified(...) & Kept(...)")

    def violation(self, function: Function) -> Tensor:
        """Concatenate the parts' violations, shape (sum of n,); neighbours that go together are asked in one pass."""
        return torch.cat([some.violation(function) for some in self._passes])

    def pieces(self, function: Function) -> list[Piece]:
        """Return those of every part, in a pass of its own: who asks for pieces differentiates one after another."""
        return [piece for part in self.parts for piece in part.pieces(function)]

    @cached_property
    def _passes(self) -> list[Constraint]:
        """The parts, neighbours joined."""
        found: list[Constraint] = []
        for part in _parts(self):
            both = found[-1].joined(part) if found else None
            found = [*found, part] if both is None else [*found[:-1], both]
        return found

    def bind(self, function: Function) -> Constraint:
        """Bind every part."""
        return All(tuple(part.bind(function) for part in self.parts))

    def refined(self, model: nn.Module) -> Constraint | None:
        """Refine every part; None where no part changes."""
        made = [part.refined(model) for part in self.parts]
        if not any(made):
            return None
        return All(tuple(part if more is None else more for part, more in zip(self.parts, made, strict=True)))

    @property
    def kind(self) -> str:
        """Name the parts, as in `Classified & Kept`."""
        return " & ".join(part.kind for part in self.parts)


@final
@dataclass(frozen=True, eq=False)
class Classified(Constraint):
    """The class of each input beats every other class by `margin`; a tie is not met.

    The violation of one input with logits z and label y is ``margin + max_{c != y} z_c - z_y``: the constraint of
    Sinitsin et al. (ICLR 2020), ``max_c log p_c - log p_y``, without the normaliser, which cancels, and with a slope
    beyond 0. An exact tie counts as the smallest positive number, so that margin 0 asks for the strict winner.

    Args:
        inputs: a batch of n items, as the model takes it: a tensor, a tuple of arguments, or a mapping.
        labels: the classes wanted, shape (n,), integers.
        margin: by how much they win, in logits; at least 0.
    """

    inputs: Inputs
    labels: Tensor
    margin: float = 0.0

    def __post_init__(self) -> None:
        n = check_batch(self.inputs, "Classified")
        labels = self.labels
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            given = f"{labels.dtype} tensor" if isinstance(labels, Tensor) else type(labels).__name__
            raise InvalidInput(f"Classified was given labels as {given}; expected a tensor of {n} integers (int64)")
        if labels.shape != (n,):
            raise ShapeMismatch(
                f"Classified was given {n} inputs and labels of shape {tuple(labels.shape)}; expected ({n},)"
            )
        if not 0 <= self.margin < float("inf"):
            raise InvalidInput(
                f"Classified was given margin={self.margin}; expected a finite number of logits, at least 0"
            )

    def violation(self, function: Function) -> Tensor:
        """Return ``margin + max_{c != y} z_c - z_y`` per input, shape (n,)."""
        return self._violation(*self._others(function))

    def pieces(self, function: Function) -> list[Piece]:
        """Return the violations with what they are the largest of: ``margin + z_c - z_y``, shape (n, classes)."""
        others, wanted = self._others(function)
        return [Piece(self._violation(others, wanted), rivals=others - wanted[:, None] + self.margin)]

    def _violation(self, others: Tensor, wanted: Tensor) -> Tensor:
        gap = others.amax(1) - wanted
        return gap + self.margin + torch.finfo(gap.dtype).tiny * (gap == 0).to(gap.dtype)

    def _others(self, function: Function) -> tuple[Tensor, Tensor]:
        """Return the logits, those of the wanted classes -inf, and these, (n,)."""
        logits = _logits(function, self.inputs, len(self.labels))
        index = self.labels.to(logits.device, torch.int64)[:, None]
        if int(index.min()) < 0 or int(index.max()) >= logits.shape[1]:
            raise InvalidInput(
                f"Classified was given labels between {int(index.min())} and {int(index.max())}; "
                f"the model has {logits.shape[1]} classes, so expected 0 to {logits.shape[1] - 1}"
            )
        return logits.scatter(1, index, -torch.inf), logits.gather(1, index).squeeze(1)


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
    """

    inputs: Inputs
    targets: Tensor
    tolerance: float

    def __post_init__(self) -> None:
        n = check_batch(self.inputs, "Within")
        if not isinstance(self.targets, Tensor) or len(self.targets) != n:
            given = tuple(self.targets.shape) if isinstance(self.targets, Tensor) else type(self.targets).__name__
            raise ShapeMismatch(f"Within was given {n} inputs and targets {given}; expected one target per input")
        check_finite_tensor(self.targets, "the targets of Within")
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
        answer = outputs(function, self.inputs)
        if answer.shape != self.targets.shape:
            raise ShapeMismatch(
                f"Within was given targets of shape {tuple(self.targets.shape)}; "
                f"the model returns {tuple(answer.shape)}"
            )
        return (answer - self.targets.to(answer)).reshape(len(answer), -1)


@final
@dataclass(frozen=True, eq=False)
class Kept(Constraint):
    """The model's answers of today to these inputs stay the same classes, winning by at least `margin` logits.

    The driver binds it: the answers are those of the unedited model, in evaluation mode.
    """

    inputs: Inputs
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_batch(self.inputs, "Kept")

    def violation(self, function: Function) -> Tensor:
        """Refuse: today's answers are not known before `bind`."""
        raise InvalidInput("Kept does not know today's answers yet; call kept.bind(model) first (wp.edit does it)")

    def bind(self, function: Function) -> Classified:
        """Return `Classified` with the classes that `function` answers now."""
        with torch.no_grad():
            labels = _logits(function, self.inputs, None).argmax(1)
        return Classified(self.inputs, labels, self.margin)


def altered(constraint: Constraint, make: Callable[[Any], Any]) -> Constraint:
    """Ask of altered copies of the inputs what is asked of the inputs.

    Args:
        constraint: `Classified`, `Within`, or several of these.
        make: makes m altered copies of n inputs, (m·n, ...), copy after copy.

    Raises:
        InvalidInput: a constraint of another kind, or `make` returned another number of items (`ShapeMismatch`).

    >>> from weightpatch.tasks.images import shifts
    >>> wp.edit(model, fix & altered(fix, shifts))
    Edit(satisfied, ...)
    """
    if isinstance(constraint, All):
        return All(tuple(altered(part, make) for part in constraint.parts))
    if not isinstance(constraint, (Classified, Within)):
        raise InvalidInput(f"altered was given for demands of kind {constraint.kind}; expected Classified or Within")
    inputs, n = make(constraint.inputs), length(constraint.inputs)
    m, rest = divmod(length(inputs), n)
    if m == 0 or rest:
        raise ShapeMismatch(
            f"altered returned {length(inputs)} items for {n}; expected m times as many, copy after copy"
        )
    if isinstance(constraint, Classified):
        return replace(constraint, inputs=inputs, labels=constraint.labels.repeat(m))
    targets = constraint.targets
    return replace(constraint, inputs=inputs, targets=targets.repeat(m, *[1] * (targets.ndim - 1)))


def check_consistent(constraint: Constraint) -> None:
    """Raise `ConflictingConstraints` when one input is asked to be two classes, naming the demands."""
    wanted: dict[bytes, tuple[int, int]] = {}
    demand = 0
    for part in _parts(constraint):
        if not isinstance(part, Classified):
            continue
        for row, label in enumerate(part.labels.tolist()):
            key = b"".join(_bytes_of(leaf[row]) for leaf in leaves(part.inputs))
            first, other = wanted.setdefault(key, (demand, label))
            if other != label:
                raise ConflictingConstraints(
                    f"demands {first} and {demand} ask the same input to be class {other} and class {label}; "
                    "drop one of them"
                )
            demand += 1


def _parts(constraint: Constraint) -> Iterator[Constraint]:
    if isinstance(constraint, All):
        for part in constraint.parts:
            yield from _parts(part)
    else:
        yield constraint


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().tobytes()  # one number's stride may be any


def _logits(function: Function, inputs: Inputs, n: int | None) -> Tensor:
    logits = outputs(function, inputs)
    if logits.ndim != 2 or logits.shape[1] < 2 or (n is not None and len(logits) != n):
        raise ShapeMismatch(
            f"the model returned shape {tuple(logits.shape)}; a class constraint expects logits of shape "
            f"({n if n is not None else 'n'}, classes) with at least 2 classes"
        )
    return logits
