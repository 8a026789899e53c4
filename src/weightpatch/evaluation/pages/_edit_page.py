"""The page of one edit: a pull request for weights, to be read before it is merged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from ..._calling import Function, Name, Output, check_names, length
from ...constraints import Constraint
from ...editing import Edit
from ...likelihoods import Likelihood
from ...network import Network, preserved_rng, structural_clone
from ...patches import Patch
from ...verdict import Limits
from ..comparison import Comparison, compare
from ..curve import STRENGTHS, Curve, between, places, sweep
from ..judging import TestSet, check_targets
from ..report import Report
from ..sentences import patched
from ._changes import Changes, changes
from ._judgement import of_edit
from ._made import facts, made
from ._mistakes import Demand, Mistake, demands, mistakes
from ._pictures import Picture
from ._plots import drawdown_line, slack_line
from ._render import page_path, write
from ._tables import table
from ._words import Names

__all__ = ["edit_page"]

_MISTAKES = 6
_BATCH = 128
_LIMITS = Limits()


def edit_page(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    edit: Edit,
    constraint: Constraint | None = None,
    test: TestSet,
    classes: Sequence[str] = (),
    picture: Picture | None = None,
    tables: Sequence[tuple[str, Report]] = (),
    likelihood: Likelihood | None = None,
    output: Output = None,
    items: Sequence[Name] | None = None,
    asked: Sequence[Name] | None = None,
    limits: Limits = _LIMITS,
) -> Path:
    """Write what an edit did as an HTML page, with every number in a JSON file beside it; return the page's path.

    The patch is measured on the whole test set at eleven strengths; the model is left as it is.

    Args:
        path: where the page goes; the numbers go to the same name with the suffix `.json`.
        model: the model that was edited, without the patch.
        edit: what `weightpatch.edit` returned for it.
        constraint: what was asked; the edit's own when not given.
        test: inputs and what is right, as `compare` takes them, on which to measure what else changed.
        classes: the names of the classes, tags or outputs.
        picture: how to draw one input; see `comparison_page`.
        tables: results of `weightpatch.evaluate` to show beside, each with a title.
        likelihood: what the outputs mean, see `compare`.
        output: which tensor of a structured answer is meant, see `compare`.
        items: what each item of the test set is called where it came from, see `compare`.
        asked: the same of the inputs that the constraint is about, in order; found in the test set when not given.
        limits: what the verdict goes by.

    Raises:
        InvalidInput: the test set cannot be used, or the path is not that of a page.
        MissingExtra: Jinja2 or matplotlib is not installed.
    """
    place = page_path(path)
    check_targets(test[1], length(test[0]))
    check_names(items, length(test[0]), "items of the test set")
    names = Names(classes)
    reading = Reading(likelihood, output, items, asked)
    found = _measure(model, edit, edit.constraint if constraint is None else constraint, test, names, picture, reading)
    seen = changes(found.comparison, test[0], names, picture, found.asked)
    verdict = found.comparison.judge(limits, classes) & edit.judge(limits)
    view = {
        "edit": edit,
        "held": edit.result.held,
        "judged": of_edit(edit, verdict),
        "found": found,
        "changes": seen,
        "lines": _lines(found.curve),
        **made(edit),
        "tables": [table(title, report) for title, report in tables],
    }
    return write(
        place, "edit.html.j2", view, _facts(edit, found, seen, classes, tables, limits) | {"verdict": verdict.to_json()}
    )


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """What the page tells of an edit: demands, the comparison at full strength, the curve (None for no patch)."""

    demands: list[Demand]
    mistakes: list[Mistake]
    asked: frozenset[int]
    comparison: Comparison
    curve: Curve | None


@final
@dataclass(frozen=True)
class Reading:
    """What of a model's answer is meant, what it means, and what items are called."""

    likelihood: Likelihood | None
    output: Output
    items: Sequence[Name] | None
    asked: Sequence[Name] | None


def _measure(
    model: nn.Module,
    edit: Edit,
    constraint: Constraint,
    test: TestSet,
    classes: Names,
    picture: Picture | None,
    reading: Reading,
) -> Measured:
    with preserved_rng(), torch.no_grad():
        before, after, bound, comparison, curve = _both(model, edit.patch, constraint, test, reading)
        comparison = replace(comparison, items=reading.items)
        kinds = demands(constraint, bound, before, after)
        shown, asked = mistakes(bound, before, after, classes, picture, test[0], _MISTAKES, reading.asked)
        shown = [_named(mistake, comparison) for mistake in shown]
    return Measured(kinds, shown, frozenset(asked), comparison, curve)


def _both(
    model: nn.Module, patch: Patch | None, constraint: Constraint, test: TestSet, reading: Reading
) -> tuple[Function, Function, Constraint, Comparison, Curve | None]:
    """Return the model before and after, the bound constraint, and what differs on the test set."""
    if patch is None or patch.gates or not patch.operations:  # a gate has no strength: it acts, or it does not
        same, other = structural_clone(model).eval(), patched(model, patch).eval()
        found = compare(same, other, test, likelihood=reading.likelihood, output=reading.output, batch_size=_BATCH)
        return same, other, constraint.bind(same), found, None
    network = Network(model, places(model, patch))
    bound = constraint.bind(network.before)
    curve, comparison = sweep(network, patch, bound, test, STRENGTHS, _BATCH, reading.likelihood, reading.output)
    return network.before, network.at(between(network, patch, 1.0)), bound, comparison, curve


def _named(mistake: Mistake, comparison: Comparison) -> Mistake:
    known = mistake.item is not None or mistake.row is None
    return mistake if known else replace(mistake, item=comparison.name(mistake.row or 0))


def _lines(curve: Curve | None) -> dict[str, str] | None:
    return None if curve is None else {"slack": slack_line(curve), "drawdown": drawdown_line(curve)}


def _facts(
    edit: Edit,
    found: Measured,
    seen: Changes,
    classes: Sequence[str],
    tables: Sequence[tuple[str, Report]],
    limits: Limits,
) -> dict[str, Any]:
    plain = [{**asdict(card), "picture": None} for card in seen.cards]
    told = [{**asdict(mistake), "picture": None} for mistake in found.mistakes]
    return {
        **facts(edit),
        "classes": list(classes),
        "demands": [asdict(demand) for demand in found.demands],
        "mistakes": [{name: value for name, value in mistake.items() if name != "row"} for mistake in told],
        "comparison": found.comparison.to_json(limits),
        "shown": plain,
        "curve": None if found.curve is None else found.curve.to_json(),
        "evaluations": [{"title": title, "summary": asdict(report.summary)} for title, report in tables],
    }
