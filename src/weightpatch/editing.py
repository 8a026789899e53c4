"""The driver: sets a problem up, runs an editor, checks the answer itself, and makes the edit and its patch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ._calling import call, describe, unwatched
from ._cost import measured
from .checking import check, effect
from .constraints import All, Constraint, check_consistent
from .editors import Auto, Editor, ladder
from .errors import InvalidInput, NonFinite, ShapeMismatch
from .locality import Locality
from .making import patched
from .network import Network, check_finite
from .outcome import Edit, Result, Solved
from .patches import applied
from .preparing import prepared
from .problem import Problem
from .remembering import noted, recalled, without_patches

__all__ = ["Edit", "Result", "Solved", "edit", "solve"]

_ROUNDS = 16  # searches with ever stricter constraints, until the model as deployed does what is asked


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
        keep: what should stay: half of it is the reference data of `Auto` and a penalty where the editor has a
            `keep_weight`; on the other half, which the search does not see, the edit is judged.
        parameters: which parameters may move, as one or several glob patterns of their names.
        max_drift: refuse an edit that drifts more than this on what is kept, in nats: its result is `over_budget`.
        remember: keep to the demands of the patches that are applied to the model, and write this one's, its inputs
            too, into the patch, as far as their kind can be recorded. An `Auto` has one budget for all these patches
            together then.

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
        asked, unchecked = recalled(model, constraint, device) if remember else (constraint, ())
        for left in unchecked:
            warnings.warn(f"not checked: the demand {left}", stacklevel=2)
        plain = Network(model, parameters)
        with plain.isolated():
            keep = None if keep is None else _ready(keep, constraint, plain)
            _say_unwatched(plain, asked, keep)
            if remember and keep is not None and isinstance(editor, Auto) and applied(model):
                keep = keep.bind(Network(without_patches(model)).before)
        editor, _, network = prepared(model, parameters, editor, keep, asked)
        solved = solve(network, asked, editor, keep, limit)
        made = {
            "editor": repr(editor),
            "settings": {"parameters": parameters if isinstance(parameters, str) else ", ".join(parameters)},
            "constraint": solved.constraint.kind if asked is constraint else constraint.kind,
        }
        if keep is not None:
            if any(effect is not None and math.isnan(effect.drift) for effect in (solved.kept, solved.held_out)):
                with network.isolated():
                    keep.check_finite(network.before)
            keep = _without_asked(keep, solved.constraint, network)  # as it was solved
        patch, solved = patched(model, network, solved, keep, limit, made)
        if patch is not None and remember:
            with network.isolated():
                demands, unrecorded = noted(solved.constraint, constraint, network.before, network.full(solved.params))
            patch = patch.annotated(demands=demands, unrecorded=unrecorded)
            for one in unrecorded:
                warnings.warn(f"the patch does not remember its demand {one.kind}: {one.reason}", stacklevel=2)
    return Edit(
        result=solved.result,
        steps=solved.steps,
        violation=solved.after,
        kept=solved.kept,
        held_out=solved.held_out,
        cost=cost,
        patch=patch,
        constraint=solved.constraint,
        editor=editor,
        certificate=solved.certificate,
        attempts=solved.attempts,
        reality=solved.reality,
        unchecked=unchecked,
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
        keep = None if keep is None else _ready(keep, constraint, network)
        bound, before = _today(network, constraint)
        keep = None if keep is None else _without_asked(keep, bound, network)
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
    now = network.rounded(network.start)
    if before <= 0:
        same = Solved(Result.already_satisfied, now, 0, before, before, None, None, bound)
        found = check(network, same, keep)
        return found if found.result is not Result.satisfied else replace(found, result=Result.already_satisfied)
    seen, unseen = (None, None) if keep is None else keep.split
    problem = Problem(network.start, network.at, bound, seen, unseen, network.narrow, network.given)
    run = editor.run(problem)
    if run.params.keys() != network.start.keys():
        raise InvalidInput(f"{editor!r} returned parameters {sorted(run.params)}; expected {sorted(network.start)}")
    shipped = editor.settled(problem, run)
    judged = None
    if shipped is not run and unseen is not None:  # it has now seen what judges it
        judged = effect(network, network.rounded(run.params), unseen)
    unsure = Solved(
        result=Result.unsatisfied,
        params=shipped.params,
        steps=run.steps,
        before=before,
        after=math.nan,
        kept=None,
        held_out=judged,
        constraint=bound,
        certificate=run.certificate,
        attempts=run.attempts,
        within=shipped.within,
    )
    return check(network, unsure, keep, max_drift)


def _ready(keep: Locality, constraint: Constraint, network: Network) -> Locality:
    """Return what is kept, knowing what its outputs mean."""
    return keep.of(constraint).fitted(network.before)


def _without_asked(keep: Locality, bound: Constraint, network: Network) -> Locality | None:
    """Return what is kept but for the inputs of demands that do not hold: those are to change."""
    if keep.without(bound) is keep:
        return keep
    with torch.no_grad():
        unmet = tuple(part for part in bound.conjuncts if float(part.violation(network.before).max()) > 0)
    return keep.without(All(unmet)) if unmet else keep


def _say_unwatched(network: Network, constraint: Constraint, keep: Locality | None) -> None:
    """Warn of outputs that nothing is asked of, and nothing kept: an edit may change them without a word."""
    if not constraint.batches:
        return
    asked = [part.output for part in constraint.conjuncts] + [part.output for part in (keep.parts if keep else ())]
    try:
        with torch.no_grad():
            others = unwatched(call(network.before, constraint.batches[0]), *asked)
    except (RuntimeError, ValueError, TypeError, IndexError):  # whoever asks it next explains
        return
    if others:
        warnings.warn(
            f"the model also answers {', '.join(map(repr, others[:8]))}, which no demand and no locality watches: an "
            "edit may change that. Keep it too, as keep & wp.Locality(inputs, output=..., likelihood=...), or say "
            "which output is meant: output=...",
            stacklevel=3,
        )


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
    inputs = next(iter(constraint.batches), None)
    if inputs is None or isinstance(error, InvalidInput):
        return
    name, weight = network.first_weight
    error.add_note(
        f"weightpatch called the model on {constraint.kind}'s inputs: {describe(inputs)}; the model's first weight is "
        f"{name} {tuple(weight.shape)} {str(weight.dtype)[6:]} on {weight.device}. "
        "Check the shape, dtype and device of the inputs."
    )


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
