"""The driver: sets a problem up, runs an editor, checks the answer itself, and makes the edit and its patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, final

import torch
from torch import Tensor, nn

from ._calling import Inputs, Params, describe
from ._cost import Cost, measured
from .constraints import Constraint, check_consistent
from .editors import Attempt, Auto, Certificate, Editor, ladder
from .errors import EditFailed, InvalidInput, NonFinite, ShapeMismatch
from .gates import Gate
from .locality import Locality
from .network import GATE, Network, check_finite
from .patches import Patch, applied, base_fingerprint
from .preparing import prepared
from .problem import Problem
from .records import Plain
from .remembering import noted, recalled, without_patches

__all__ = ["Edit", "Result", "Solved", "edit", "solve"]

_ROUNDS = 16  # searches with ever stricter constraints, until the model as deployed does what is asked


class Result(Enum):
    """How an edit ended; the value is advice."""

    satisfied = "every demand is met on the final weights"
    already_satisfied = "every demand was met before the edit; nothing was changed"
    unsatisfied = (
        "some demand is not met; allow more steps, a larger learning rate, more parameters, or a smaller margin"
    )
    stalled = (
        "some demand is not met and the editor changed no weight: its gradient is 0, or its step is smaller than the "
        "model's dtype resolves; try a larger learning rate, other parameters, or allow at least one step"
    )
    infeasible = (
        "the demands contradict each other: no values of these parameters meet them all; certificate.infeasible says "
        "which, drop one of them or allow more parameters"
    )
    over_budget = (
        "every demand is met, but more changes on what is kept than max_drift or the editor's budget allow; ask for "
        "less, allow other parameters, or use an editor that is more local"
    )
    nonfinite = "the edited weights or outputs are NaN or infinite; try a smaller learning rate"

    @property
    def held(self) -> bool:
        """Whether every demand is met, and no budget broken."""
        return self in (Result.satisfied, Result.already_satisfied)


@final
@dataclass(frozen=True, eq=False)
class Solved:
    """One editor's answer to one constraint, checked by a full pass on weights rounded to the model's own dtype.

    Attributes:
        result: how it ended.
        params: the edited parameters, rounded to the model's dtypes.
        steps: how many updates were made.
        before: the largest violation before the edit.
        after: the largest violation on `params`.
        drift: KL(before || after) on the kept inputs, nats; None without them.
        constraint: the constraint with today's answers bound.
        certificate: what an exact editor can say about its answer.
        attempts: what a ladder tried, in turn.
        within: whether the editor's own budget is kept.
        refined: a stricter constraint, where the demands hold and yet the model as deployed does otherwise.
    """

    result: Result
    params: Params
    steps: int
    before: float
    after: float
    drift: float | None
    constraint: Constraint
    certificate: Certificate | None = None
    attempts: tuple[Attempt, ...] = ()
    within: bool = True
    refined: Constraint | None = None


@final
@dataclass(frozen=True, eq=False)
class Edit:
    """One attempt's outcome; the model itself is as it was.

    Attributes:
        result: how it ended; `result.value` is advice.
        steps: how many updates the editor made.
        violation: the largest violation on the final weights; met where at most 0.
        drift: KL(before || after) on the kept inputs, nats; None without them.
        cost: seconds and peak memory.
        patch: what changed, or None where the outcome is not finite.
        constraint: what was asked, with today's answers bound.
        editor: what looked for it.
        certificate: what an exact editor can say about its answer.
        attempts: what a ladder, as `Auto`, tried, in turn; ``print(*found.attempts, sep="\\n")`` explains its choice.
    """

    result: Result
    steps: int
    violation: float
    drift: float | None
    cost: Cost
    patch: Patch | None
    constraint: Constraint
    editor: Editor
    certificate: Certificate | None = None
    attempts: tuple[Attempt, ...] = ()

    def raise_for_result(self) -> Edit:
        """Return self when the constraint holds, else raise `EditFailed` with the advice."""
        if self.result.held:
            return self
        raise EditFailed(
            f"the edit is {self.result.name} after {self.steps} steps (violation {self.violation:.4g}, "
            f"expected at most 0): {self.result.value}"
        )

    def __repr__(self) -> str:
        parts = [self.result.name, f"steps={self.steps}", f"violation={self.violation:.3g}"]
        if self.drift is not None:
            parts.append(f"drift={self.drift:.2g}")
        if self.patch is not None:
            parts.append(f"{len(self.patch.operations)} tensors, {_size(self.patch.nbytes)}")
        return f"Edit({', '.join(parts)})"


def edit(
    model: nn.Module,
    constraint: Constraint,
    editor: Editor | None = None,
    *,
    keep: Locality | None = None,
    parameters: str | Sequence[str] = "*",
    max_drift: float | None = None,
    remember: bool = True,
) -> Edit:
    """Look for weights of `model` that meet `constraint`; the model itself is left bit for bit as it is.

    The search runs in evaluation mode on a structural clone. The final weights, as the patch composes them and in the
    model's own dtype, are checked again by a full pass before the edit is called satisfied.

    Args:
        model: any eager module, in any mode.
        constraint: what must become true.
        editor: how; when not given `editors.Auto()`, a ladder that ends with a gate, where `keep` is given, and
            `editors.ladder()` where it is not.
        keep: what should stay: measured as `drift`, a penalty where the editor has a `keep_weight`, and the reference
            data of `Auto`.
        parameters: which parameters may move, as one or several glob patterns of their names.
        max_drift: refuse an edit that drifts more than this on what is kept, in nats: its result is `over_budget`.
        remember: keep to the demands of the patches that are applied to the model, and write this one's, its inputs
            too, into the patch; where inputs are tensors and demands are of kind `Classified` or `Within`. An `Auto`
            has one budget for all these patches together then.

    Raises:
        ConflictingConstraints: an applied patch demands another class of the same input.
        InvalidInput: a value, shape, label or pattern cannot be used, or the model or its answers are not finite.
        NotEditable: a chosen parameter cannot be edited.
    """
    editor = ladder() if editor is None and keep is None else Auto() if editor is None else editor
    _check_arguments(model, constraint, editor, keep)
    limit = _limit(max_drift, keep)
    check_finite(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with measured(device) as cost:
        asked = recalled(model, constraint, device) if remember else constraint
        if remember and keep is not None and isinstance(editor, Auto) and applied(model):
            keep = keep.bind(Network(without_patches(model)).before)
        editor, _, network = prepared(model, parameters, editor, keep)
        solved = solve(network, asked, editor, keep, limit)
        patterns = [parameters] if isinstance(parameters, str) else parameters
        made = {
            "editor": repr(editor),
            "settings": {"parameters": ", ".join(patterns)},
            "constraint": solved.constraint.kind if asked is constraint else constraint.kind,
        }
        patch, solved = _patch(model, network, solved, keep, limit, made)
        if patch is not None and remember:
            with network.isolated():
                demands, unrecorded = noted(solved.constraint, constraint, network.before, network.full(solved.params))
            patch = patch.annotated(demands=demands, unrecorded=unrecorded)
    return Edit(
        solved.result,
        solved.steps,
        solved.after,
        solved.drift,
        cost,
        patch,
        solved.constraint,
        editor,
        solved.certificate,
        solved.attempts,
    )


def solve(
    network: Network,
    constraint: Constraint,
    editor: Editor,
    keep: Locality | None = None,
    max_drift: float = math.inf,
) -> Solved:
    """Run `editor` on one constraint and check its answer; many edits of one model share one `network`.

    Where the demands hold on the edited weights and the model as deployed does otherwise (`Constraint.refined`), the
    search begins anew with the stricter constraint.
    """
    with network.isolated():
        bound, before = _today(network, constraint)
        steps, solved = 0, None
        for _ in range(_ROUNDS):
            solved = _solve(network, bound, editor, keep, max_drift)
            steps += solved.steps
            if solved.refined is None:
                break
            bound = solved.refined
        assert solved is not None
        return replace(solved, steps=steps, before=before)


def _solve(network: Network, bound: Constraint, editor: Editor, keep: Locality | None, max_drift: float) -> Solved:
    """Run `editor` once on a constraint with today's answers bound."""
    with torch.no_grad():
        before = float(bound.violation(network.before).max())
    if before <= 0:
        refined = bound.refined(network.deployed(network.start))
        result, drift = (
            Result.already_satisfied if refined is None else Result.unsatisfied,
            None if keep is None else 0.0,
        )
        now = network.rounded(network.start)
        return Solved(result, now, 0, before, before, drift, bound, refined=refined)
    found = editor.run(Problem(network.start, network.at, bound, keep, network.narrow, network.given))
    if found.params.keys() != network.start.keys():
        raise InvalidInput(f"{editor!r} returned parameters {sorted(found.params)}; expected {sorted(network.start)}")
    facts = (found.certificate, found.attempts, found.within)
    unchecked = Solved(Result.unsatisfied, found.params, found.steps, before, math.nan, None, bound, *facts)
    return check(network, unchecked, keep, max_drift)


def check(network: Network, solved: Solved, keep: Locality | None, max_drift: float = math.inf) -> Solved:
    """Grade parameters by a full pass, in the model's own dtype, on the bound constraint, and as deployed."""
    params, refined = network.rounded(solved.params), None
    with torch.no_grad():
        after = float(solved.constraint.violation(network.full(params)).max())
        finite = math.isfinite(after) and all(bool(p.isfinite().all()) for p in params.values())
        drift = None if keep is None or not finite else _drift(network, params, keep)
    if not finite:
        result = Result.nonfinite
    elif after <= 0 and (refined := solved.constraint.refined(network.deployed(params))) is not None:
        result = Result.unsatisfied
    elif after <= 0:
        kept = solved.within and (drift is None or drift <= max_drift)
        result = Result.satisfied if kept else Result.over_budget
    elif solved.certificate is not None and solved.certificate.affine and solved.certificate.infeasible:
        result = Result.infeasible
    elif all(torch.equal(p, q) for p, q in zip(params.values(), network.rounded(network.start).values(), strict=True)):
        result = Result.stalled
    else:
        result = Result.unsatisfied
    return replace(solved, result=result, params=params, after=after, drift=drift, refined=refined)


def _drift(network: Network, params: Params, keep: Locality) -> float:
    moved = [name for name, start in network.rounded(network.start).items() if not torch.equal(start, params[name])]
    if not moved and keep.answers is None:
        return 0.0
    at = network.narrow(moved)
    return float(keep.drift(*(at({name: some[name] for name in moved}) for some in (network.start, params))))


def _today(network: Network, constraint: Constraint) -> tuple[Constraint, float]:
    """Bind the constraint to today's answers and measure its violation, with the model's own complaints explained."""
    try:
        bound = constraint.bind(network.before)
        check_consistent(bound)
        with torch.no_grad():
            violation = bound.violation(network.before)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        _explain(error, network, constraint)
        raise
    if not isinstance(violation, Tensor) or violation.ndim != 1 or not len(violation):
        given = tuple(violation.shape) if isinstance(violation, Tensor) else type(violation).__name__
        raise ShapeMismatch(
            f"{constraint.kind}.violation returned {given}; expected a tensor of shape (n,), one number per demand"
        )
    if not bool(violation.isfinite().all()):
        raise NonFinite(
            f"the unedited model violates {constraint.kind} by NaN or infinity; "
            "its outputs on these inputs are not finite"
        )
    return bound, float(violation.max())


def _explain(error: Exception, network: Network, constraint: Constraint) -> None:
    inputs: Inputs | None = getattr(constraint, "inputs", None)
    if inputs is None or isinstance(error, InvalidInput):
        return
    name, weight = network.first_weight
    error.add_note(
        f"weightpatch called the model on {constraint.kind}'s inputs: {describe(inputs)}; the model's first weight is "
        f"{name} {tuple(weight.shape)} {str(weight.dtype)[6:]} on {weight.device}. "
        "Check the shape, dtype and device of the inputs."
    )


def _patch(
    model: nn.Module,
    network: Network,
    solved: Solved,
    keep: Locality | None,
    max_drift: float,
    made: dict[str, Any],
) -> tuple[Patch | None, Solved]:
    """Make the patch and grade the weights it composes to; make an exact one where rounding lost the demand."""
    if solved.result is Result.nonfinite:
        return None, solved
    base, own = network.rounded(network.start), dict(model.state_dict())
    plain = {name: value for name, value in solved.params.items() if f".{GATE}." not in name}
    gates = {name: value for name, value in solved.params.items() if name not in plain}
    facts: dict[str, Any] = {
        "fingerprint": base_fingerprint(model),
        "requires": (ids := tuple(patch.id for patch in applied(model))),
        "context": ids,
        **made,
    }
    for exact in (False, True):
        patch = Patch.between(own, plain, gates=_gates(gates), exact=exact, **facts)
        composed = {**base, **gates, **{name: value.to(network.device) for name, value in patch.result(own).items()}}
        graded = solved
        if not all(torch.equal(composed[name], value) for name, value in solved.params.items()):
            with network.isolated():
                graded = check(network, replace(solved, params=composed), keep, max_drift)
        if graded.result is solved.result:
            break
    metrics: dict[str, Plain] = {"result": graded.result.name, "steps": graded.steps}
    metrics |= {"violation": graded.after} | ({} if graded.drift is None else {"drift": graded.drift})
    return patch.annotated(metrics=metrics), graded


def _gates(params: Params) -> dict[str, Gate]:
    """Return the gates that are in use, by layer."""
    found = {}
    for name, radii in params.items():
        layer, _, part = name.rpartition(f".{GATE}.")
        if part == "radii" and bool((used := radii >= 0).any()):
            keys, values = (params[f"{layer}.{GATE}.{other}"][used] for other in ("keys", "values"))
            found[layer] = Gate(keys, radii[used], values)
    return found


def _check_arguments(model: nn.Module, constraint: Constraint, editor: Editor, keep: Locality | None) -> None:
    for value, kind, hint in (
        (model, nn.Module, "a torch module"),
        (constraint, Constraint, "a constraint such as weightpatch.constraints.Classified(inputs, labels)"),
        (editor, Editor, "an editor such as weightpatch.editors.RMSProp(lr=1e-3)"),
    ):
        if not isinstance(value, kind):
            raise InvalidInput(f"edit was given {type(value).__name__} ({value!r:.80}); expected {hint}")
    if keep is not None and not isinstance(keep, Locality):
        raise InvalidInput(f"edit was given keep={type(keep).__name__}; expected weightpatch.Locality(inputs) or None")


def _limit(max_drift: float | None, keep: Locality | None) -> float:
    if max_drift is None:
        return math.inf
    if keep is None or not max_drift >= 0:
        raise InvalidInput(
            f"edit was given max_drift={max_drift} and keep={keep!r:.40}; expected nats, at least 0, and a Locality"
        )
    return max_drift


def _size(nbytes: int) -> str:
    return (
        f"{nbytes} B"
        if nbytes < 1000
        else f"{nbytes / 1000:.1f} kB"
        if nbytes < 1_000_000
        else f"{nbytes / 1e6:.1f} MB"
    )
