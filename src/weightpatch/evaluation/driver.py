"""The driver of a set of edits: checks what it is given, continues where a run was stopped, and makes the report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .._calling import Name, Output, check_batch, check_names
from .._identity import identity
from .._terminal import bar
from ..constraints import Constraint
from ..editing import Result
from ..editors import Editor
from ..errors import InvalidInput
from ..likelihoods import Likelihood
from ..locality import Locality
from ..network import Network, check_finite
from ..preparing import prepared
from .bench import Bench
from .judging import Asked, TestSet, check_targets
from .log import Log
from .predictor import FastPredictor
from .protocols import Independent, Protocol
from .report import Report, Row

__all__ = ["evaluate"]

_FORMAT = 2


def evaluate(
    model: nn.Module,
    edits: Sequence[Constraint],
    editor: Editor,
    *,
    test: TestSet,
    parameters: str | Sequence[str] = "*",
    keep: Locality | None = None,
    altered: Callable[[Any], Any] | None = None,
    protocol: Protocol | None = None,
    likelihood: Likelihood | None = None,
    output: Output = None,
    items: Sequence[Name] | None = None,
    results: str | Path | None = None,
    batch_size: int = 250,
    progress: bool = True,
) -> Report:
    """Make many edits of one model and measure what each does to a test set; the model is left as it is.

    Every edit is checked on its final weights in the model's own dtype. The answers on the test set are those of a full
    pass of the edited model, but only what the edit can change is computed; see `FastPredictor`.

    Args:
        model: any eager module, in any mode.
        edits: what must become true, one constraint an edit.
        editor: how.
        test: the test set: inputs of n items, and what is right, as `compare` takes it: classes (n, ...), integers, or
            tags or numbers of the shape of the outputs.
        parameters: which parameters may move, as one or several glob patterns of their names.
        keep: what should stay, for editors that have a `keep_weight`.
        altered: makes m altered copies of n inputs, (m·n, ...), copy after copy, to measure the generality of edits; it
            may draw from the global random generators, which are seeded by the edit's place and put back afterwards.
        protocol: `Independent()` when not given, or `Sequential()` for edits applied one on another.
        likelihood: what the outputs mean; `Categorical()` when not given, where the targets are integers, one for each
            position.
        output: which tensor of a structured answer the test set is about; see `compare`.
        items: what each edit is about, for its row of the report: a row of your data, or a file.
        results: a file of JSON lines, written edit by edit; a run that was stopped continues from it.
        batch_size: test items in one full pass.
        progress: show a progress bar where the output is a terminal.

    Raises:
        InvalidInput: an argument cannot be used, or `results` holds another run.
        NotEditable: a chosen parameter cannot be edited.
    """
    protocol = Independent() if protocol is None else protocol
    _check(model, edits, editor, protocol, batch_size)
    check_names(items, len(edits), "edits")
    inputs, targets = test
    check_targets(targets, check_batch(inputs, "evaluate"))
    check_finite(model)
    whole, given, kept = model, editor, keep
    if keep is not None:
        plain = Network(model, parameters)
        with plain.isolated():
            keep = keep.of(edits[0]).fitted(plain.before)
    editor, model, network = prepared(model, parameters, editor, keep, edits[0])
    header: dict[str, Any] = {}
    if results is not None:
        header = _header(whole, network, edits, given, test, kept, altered, protocol)
        header |= {"likelihood": identity(likelihood), "output": identity(output)}
    with Log(results, header) as log, bar("editing", len(edits), 0, progress) as show:
        asked = Asked(targets, likelihood, output)
        predictor = FastPredictor(model, network, inputs, batch_size, log.header.get("drift_items"), asked=asked)
        if predictor.untraced_because:
            reason = predictor.untraced_because
            warnings.warn(f"{type(whole).__name__} is judged as it is, which takes longer: {reason}", stacklevel=2)
        log.start(drift_items=predictor.drift_items)
        targets = targets.to(predictor.base.device)

        def told(rows: Sequence[Row]) -> None:
            show(len(rows), _told(rows))

        bench = Bench(model, network, edits, editor, keep, altered, predictor, targets, log, told, items)
        rows, checkpoints = protocol.run(bench)
    patterns = (parameters,) if isinstance(parameters, str) else tuple(parameters)
    return Report(
        repr(editor),
        patterns,
        repr(protocol),
        len(targets),
        predictor.drift_items,
        bench.base.errors()[0],
        tuple(rows),
        tuple(checkpoints),
        predictor.likelihood.name,
        predictor.likelihood.error_name,
        predictor.likelihood.unit,
    )


def _check(model: nn.Module, edits: Sequence[Constraint], editor: Editor, protocol: Protocol, batch_size: int) -> None:
    for name, value, kind, hint in (
        ("model", model, nn.Module, "a torch module"),
        ("editor", editor, Editor, "an editor such as weightpatch.editors.RMSProp(lr=1e-3)"),
        ("protocol", protocol, Protocol, "Independent() or Sequential() of weightpatch.evaluation"),
    ):
        if not isinstance(value, kind):
            raise InvalidInput(f"evaluate was given {name}={value!r:.80}; expected {hint}")
    if not edits or not all(isinstance(item, Constraint) for item in edits):
        raise InvalidInput("evaluate was given edits that are not a sequence of at least one constraint, one an edit")
    if batch_size < 1:
        raise InvalidInput(f"evaluate was given batch_size={batch_size}; expected a number of test items, at least 1")


def _header(
    model: nn.Module,
    network: Network,
    edits: Sequence[Constraint],
    editor: Editor,
    test: TestSet,
    keep: Locality | None,
    altered: Callable[[Any], Any] | None,
    protocol: Protocol,
) -> dict[str, Any]:
    """Return what two runs must share for one to continue the other."""
    return {
        "format": _FORMAT,
        "model": identity(model),
        "parameters": list(network.names),
        "edits": identity(list(edits), whole=True),
        "editor": identity(editor),
        "test": identity(test, whole=True),
        "keep": identity(keep),
        "altered": identity(altered),
        "protocol": identity(protocol),
    }


def _told(rows: Sequence[Row]) -> str:
    real = [row for row in rows[-1000:] if row.result is not Result.already_satisfied]
    return f"{sum(row.result is Result.satisfied for row in real) / len(real):.0%} hold" if real else ""
