"""What a protocol works with: makes one edit of a set, and measures one edited model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from .._calling import Inputs, Name, Params
from .._cost import measured
from ..constraints import All, Constraint, altered
from ..editing import Result, Solved, solve
from ..editors import Editor
from ..locality import Locality
from ..network import Network, preserved_rng
from .judging import Judged
from .log import Log
from .predictor import Prediction, Predictor
from .report import Impact, Row

__all__ = ["Bench"]


def _silent(rows: Sequence[Row]) -> None:
    pass


@final
@dataclass(frozen=True, eq=False)
class Bench:
    """One run: a model, its edits, a test set and the log of what is done.

    Attributes:
        model: the user's model; nothing changes it.
        network: a view of it, shared by all edits that start from it.
        edits: the constraints, one an edit.
        editor: what makes the edits.
        keep: what an editor should keep, or None.
        altered: makes m altered copies of a batch of n inputs, (m·n, ...), copy after copy; or None.
        predictor: answers of edited models to the test set.
        targets: what is right, as the predictor's likelihood takes it.
        log: what is done already.
        progress: is told the rows so far.
        items: what each edit is about.
    """

    model: nn.Module
    network: Network
    edits: Sequence[Constraint]
    editor: Editor
    keep: Locality | None
    altered: Callable[[Inputs], Inputs] | None
    predictor: Predictor
    targets: Tensor
    log: Log
    progress: Callable[[Sequence[Row]], None] = field(default=_silent)
    items: Sequence[Name] | None = None

    def make(self, network: Network, index: int, earlier: Sequence[Constraint] = ()) -> tuple[Row, Solved]:
        """Make one edit of the set; return its row, without impact, and the weights that were found.

        With earlier demands, the constraint that was solved is ``All((this, *earlier))``.
        """
        asked = All((self.edits[index], *earlier)) if earlier else self.edits[index]
        with _seeded(index, network.device):
            with measured(network.device) as cost:
                solved = solve(network, asked, self.editor, self.keep)
            held_already = solved.result is Result.already_satisfied
            generality = None if held_already else self._generality(network, index, solved.params)
        violation = solved.after if math.isfinite(solved.after) else None
        told = (violation, cost.seconds, cost.peak_bytes, generality, None)
        return Row(index, solved.result, solved.steps, *told, None if self.items is None else self.items[index]), solved

    def made(self, index: int) -> Row:
        """Make one edit of the unedited model and measure it on the test set."""
        row, solved = self.make(self.network, index)
        if solved.result is Result.already_satisfied:
            return replace(row, impact=self._impact(Prediction(self.predictor.base, 0.0, 0)))
        return replace(row, impact=self.impact(solved.params))

    def impact(self, params: Params) -> Impact:
        """Measure the model with these parameters on the test set."""
        return self._impact(self.predictor.predict(params))

    @cached_property
    def base(self) -> Judged:
        """The unedited model beside itself."""
        found = self.predictor
        return Judged(found.base, found.base, self.targets, found.likelihood)

    def _impact(self, found: Prediction) -> Impact:
        judged = self.base.against(found.outputs)
        positions, changed = int(judged.counts.sum()), int(judged.changed.sum())
        share = changed / positions if judged.changed.ndim > 1 else None
        drift = found.drift if math.isfinite(found.drift) else None
        return Impact(judged.errors()[1], judged.flips, drift, share)

    def _generality(self, network: Network, index: int, params: Params) -> float | None:
        if self.altered is None:
            return None
        edit = self.edits[index]  # what says nothing of copies, as what is kept, counts only where it is all
        known = tuple(part for part in edit.conjuncts if type(part).altered is not Constraint.altered)
        copies = altered(All(known) if known else edit, self.altered)
        with network.isolated():
            return float(copies.met(network.full(params)).double().mean())


@contextmanager
def _seeded(seed: int, device: torch.device) -> Any:
    """Make whatever is random in one edit depend on its place alone, so that a run that is continued stays the same."""
    with preserved_rng(device):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield
