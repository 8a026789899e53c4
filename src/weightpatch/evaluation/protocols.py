"""How a set of edits is applied: each on its own, or one on another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..constraints import All, Classified, Constraint
from ..editing import Result
from ..errors import InvalidInput
from ..network import Network
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

    An edit that fails is applied too, unless its weights are not finite or failed edits are skipped. The last edit is
    always a checkpoint.

    Args:
        checkpoints: after how many edits the model is measured, increasing.
        remember: whether each edit is asked to meet the demands of all earlier ones too. What is kept are the answers
            of the unedited model in any case, so that a budget is that of all edits together.
        skip_failed: leave out edits that fail, as one that ships no unmet demand would; they count as edits and are
            tested, but are not asked of later ones.
    """

    checkpoints: tuple[int, ...] = (1, 10, 25, 50, 100)
    remember: bool = False
    skip_failed: bool = False

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
        asked: list[Constraint] = []  # of later edits
        network = bench.network
        if bench.keep is not None:
            bench = replace(bench, keep=bench.keep.bind(network.before))
        for count in range(1, len(bench.edits) + 1):
            row, solved = bench.make(network, count - 1, _merged(asked) if self.remember else ())
            if count > len(logged):
                bench.log.append({"row": encode_row(row)})
            rows.append(row if count > len(logged) else _checked(row, logged[count - 1]))
            parts = solved.constraint.parts if isinstance(solved.constraint, All) and self.remember else ()
            bound.append(parts[0] if asked and parts else solved.constraint)
            if solved.result.held or not self.skip_failed:
                asked.append(bound[-1])
                if solved.result not in (Result.nonfinite, Result.already_satisfied):
                    network = network.restarted(solved.params)
            if count in points - done:
                found.append(_measured(bench, network, bound))
                bench.log.append({"checkpoint": asdict(found[-1])})
            bench.progress(rows)
        return rows, found


def _merged(bound: Sequence[Constraint]) -> list[Constraint]:
    """Ask of all inputs at once what is asked of each, where they can be joined."""
    groups: dict[tuple[float, torch.Size], list[tuple[Tensor, Tensor]]] = {}
    rest: list[Constraint] = []
    for part in bound:
        if isinstance(part, Classified) and isinstance(part.inputs, Tensor):
            groups.setdefault((part.margin, part.inputs.shape[1:]), []).append((part.inputs, part.labels))
        else:
            rest.append(part)
    joined = []
    for key, pairs in groups.items():
        inputs, labels = (torch.cat(some) for some in zip(*pairs, strict=True))
        joined.append(Classified(inputs, labels, key[0]))
    return [*joined, *rest]


def _measured(bench: Bench, network: Network, bound: list[Constraint]) -> Checkpoint:
    params = network.rounded(network.start)
    with network.isolated():
        held = [constraint.satisfied(network.full(params)) for constraint in bound]
    return Checkpoint(len(held), sum(held), bench.impact(params))


def _checked(row: Row, logged: Row) -> Row:
    """Return the logged row, where making the edit again ended the same way."""
    if (row.result, row.steps) != (logged.result, logged.steps):
        raise InvalidInput(
            f"edit {row.index} ended {logged.result.name} after {logged.steps} steps in the results file, and "
            f"{row.result.name} after {row.steps} when made again: this run cannot be continued here; name another file"
        )
    return logged
