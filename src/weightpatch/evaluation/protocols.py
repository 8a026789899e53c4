"""How a set of edits is applied: each on its own, or one on another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from glob import escape
from typing import final

from torch import nn

from .._calling import Params
from ..constraints import Constraint
from ..editing import Result
from ..errors import InvalidInput
from ..network import Network, structural_clone
from .bench import Bench
from .report import Checkpoint, Row, decode_checkpoint, decode_row, encode_row

__all__ = ["Independent", "Protocol", "Sequential"]


class Protocol(ABC):
    """How a set of edits is applied and when the model is measured."""

    @abstractmethod
    def run(self, bench: Bench) -> tuple[list[Row], list[Checkpoint]]:
        """Make what the bench's log does not hold yet; return all rows and checkpoints."""


@final
@dataclass(frozen=True)
class Independent(Protocol):
    """Every edit starts from the unedited model, and each edited model is measured on the whole test set."""

    def run(self, bench: Bench) -> tuple[list[Row], list[Checkpoint]]:
        """Make and measure the edits that the log does not hold yet."""
        rows = [decode_row(line["row"]) for line in bench.log.lines]
        bench.progress(rows)
        for index in range(len(rows), len(bench.edits)):
            rows.append(bench.made(index))
            bench.log.append({"row": encode_row(rows[-1])})
            bench.progress(rows)
        return rows, []


@final
@dataclass(frozen=True)
class Sequential(Protocol):
    """Edits are applied one on another; at each checkpoint all of them are tested again, and the model is measured.

    An edit that fails is applied too, unless its weights are not finite. The last edit is always a checkpoint.

    Args:
        checkpoints: after how many edits the model is measured, increasing.
    """

    checkpoints: tuple[int, ...] = (1, 10, 25, 50, 100)

    def __post_init__(self) -> None:
        points = self.checkpoints
        if any(point < 1 for point in points) or list(points) != sorted(set(points)):
            raise InvalidInput(
                f"Sequential was given checkpoints={points}; expected increasing numbers of edits, at least 1"
            )

    def run(self, bench: Bench) -> tuple[list[Row], list[Checkpoint]]:
        """Make the edits in order; those that the log holds are made again, unmeasured, to arrive at their weights."""
        logged = [decode_row(line["row"]) for line in bench.log.lines if "row" in line]
        found = [decode_checkpoint(line["checkpoint"]) for line in bench.log.lines if "checkpoint" in line]
        points = {point for point in self.checkpoints if point < len(bench.edits)} | {len(bench.edits)}
        done = {point.edits for point in found}
        rows: list[Row] = []
        bound: list[Constraint] = []
        model, network = structural_clone(bench.model), bench.network
        for count in range(1, len(bench.edits) + 1):
            row, solved = bench.make(network, count - 1)
            if count > len(logged):
                bench.log.append({"row": encode_row(row)})
            rows.append(row if count > len(logged) else _checked(row, logged[count - 1]))
            bound.append(solved.constraint)
            if solved.result not in (Result.nonfinite, Result.already_satisfied):
                network = _moved(model, solved.params)
            if count in points - done:
                found.append(_measured(bench, network, bound))
                bench.log.append({"checkpoint": asdict(found[-1])})
            bench.progress(rows)
        return rows, found


def _measured(bench: Bench, network: Network, bound: list[Constraint]) -> Checkpoint:
    params = network.rounded(network.start)
    with network.isolated():
        held = [constraint.satisfied(network.full(params)) for constraint in bound]
    return Checkpoint(len(held), sum(held), bench.impact(params))


def _moved(model: nn.Module, params: Params) -> Network:
    """Give a clone other weights, in memory of its own, and look at it anew."""
    for name, value in params.items():
        model.get_parameter(name).data = value.clone()
    return Network(model, [escape(name) for name in params])


def _checked(row: Row, logged: Row) -> Row:
    """Return the logged row, where making the edit again ended the same way."""
    if (row.result, row.steps) != (logged.result, logged.steps):
        raise InvalidInput(
            f"edit {row.index} ended {logged.result.name} after {logged.steps} steps in the results file, and "
            f"{row.result.name} after {row.steps} when made again: this run cannot be continued here; name another file"
        )
    return logged
