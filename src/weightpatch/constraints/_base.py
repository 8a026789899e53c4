"""What a constraint is, what it says of its own kind, and several joined to one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from .._calling import Function, Inputs, Output, length
from ..errors import ConflictingConstraints, InvalidInput, ShapeMismatch
from ..likelihoods import Likelihood
from ..records import Record

__all__ = ["All", "Ask", "Constraint", "Piece", "altered", "check_consistent"]


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


class Ask(NamedTuple):
    """What is asked of one input, so that two demands that contradict each other are found.

    Attributes:
        key: identifies what is asked about: bytes of the input, and of the output.
        wanted: the answer as numbers, float64, any shape; NaN where anything may be.
        radius: how far the answer may be from it.
        shown: what is wanted at one place, given the place in the flattened answer and the number, for errors.
    """

    key: bytes
    wanted: Tensor
    radius: float
    shown: Callable[[int, float], str]


class Constraint(ABC):
    """What must hold; a demand is met where its violation is at most 0 (NaN is not met).

    To make one, write `violation`, differentiable in what the function returns. The rest is what a constraint knows of
    its own kind; each has a default that is right for a constraint that says nothing.

    Attributes:
        likelihood: what the outputs mean that are asked about; None where the constraint does not say.
        output: which tensor of a structured answer is asked about: key, attribute, place or function; see `outputs`.
    """

    likelihood: Likelihood | None = None
    output: Output = None

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

    @property
    def conjuncts(self) -> tuple[Constraint, ...]:
        """What this is joined of."""
        return (self,)

    @property
    def batches(self) -> tuple[Inputs, ...]:
        """The batches that the model is called on, one after another; by default its attribute `inputs`."""
        inputs = getattr(self, "inputs", None)
        return () if inputs is None else (inputs,)

    def alone(self, item: int) -> Constraint | None:
        """Return what is asked of one item of the batch alone; None where that is nothing, or cannot be told."""
        return None

    def altered(self, make: Callable[[Any], Any]) -> Constraint:
        """Return what is asked of altered copies of the inputs: `make` makes m of n inputs, copy after copy."""
        raise InvalidInput(
            f"altered copies were asked of demands of kind {self.kind}, which does not say what they are; "
            "expected Classified, Tagged or Within, or a constraint that has a method `altered`"
        )

    def asks(self) -> Iterator[Ask]:
        """Yield what is asked, so that contradictions are found."""
        return iter(())

    def record(self) -> Record:
        """Return this constraint as data, from which `restored` makes it again; see `register`.

        Raises:
            InvalidInput: it cannot be recorded; the message says why.
        """
        raise InvalidInput("its kind does not say how it is recorded: write `record` and `restored`, and register it")

    @classmethod
    def restored(cls, record: Record) -> Constraint:
        """Return the constraint of a record of this kind."""
        raise InvalidInput(f"{cls.__name__} does not read records; write its `restored`")

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
        return All((*self.conjuncts, *other.conjuncts))


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
        for part in self.conjuncts:
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
    def conjuncts(self) -> tuple[Constraint, ...]:
        """The parts, and the parts of these."""
        return tuple(part for whole in self.parts for part in whole.conjuncts)

    @property
    def batches(self) -> tuple[Inputs, ...]:
        """Those of every part."""
        return tuple(batch for part in self.parts for batch in part.batches)

    def altered(self, make: Callable[[Any], Any]) -> Constraint:
        """Return every part's."""
        return All(tuple(part.altered(make) for part in self.parts))

    def asks(self) -> Iterator[Ask]:
        """Yield those of every part."""
        for part in self.parts:
            yield from part.asks()

    @property
    def kind(self) -> str:
        """Name the parts, as in `Classified & Kept`."""
        return " & ".join(part.kind for part in self.parts)


def altered(constraint: Constraint, make: Callable[[Any], Any]) -> Constraint:
    """Ask of altered copies of the inputs what is asked of the inputs.

    Args:
        constraint: one that knows what it asks of copies, as `Classified`, `Tagged`, `Within`, or several of these.
        make: makes m altered copies of n inputs, (m·n, ...), copy after copy.

    Raises:
        InvalidInput: a constraint of another kind, or `make` returned another number of items (`ShapeMismatch`).

    >>> from weightpatch.tasks.images import shifts
    >>> wp.edit(model, fix & altered(fix, shifts))
    Edit(satisfied, ...)
    """
    return constraint.altered(make)


def copies(inputs: Inputs, make: Callable[[Any], Any]) -> tuple[Any, int]:
    """Return altered copies of a batch, and how many of each item there are."""
    made, n = make(inputs), length(inputs)
    m, rest = divmod(length(made), n)
    if m == 0 or rest:
        raise ShapeMismatch(f"altered returned {length(made)} items for {n}; expected m times as many, copy after copy")
    return made, m


def check_consistent(constraint: Constraint) -> None:
    """Raise `ConflictingConstraints` when one input is asked for two answers, naming the demands."""
    seen: defaultdict[bytes, list[tuple[int, Ask]]] = defaultdict(list)
    for demand, ask in enumerate(constraint.asks()):
        for other, earlier in seen[ask.key]:
            if earlier.wanted.shape != ask.wanted.shape:
                continue
            apart = (earlier.wanted - ask.wanted).nan_to_num(0.0).flatten()
            if float(apart.norm()) > earlier.radius + ask.radius:
                place = int(apart.abs().argmax())
                told = [one.shown(place, float(one.wanted.flatten()[place])) for one in (earlier, ask)]
                raise ConflictingConstraints(
                    f"demands {other} and {demand} ask the same input to be {told[0]} and {told[1]}; drop one of them"
                )
        seen[ask.key].append((demand, ask))
