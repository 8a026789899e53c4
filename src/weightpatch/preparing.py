"""What an editor needs before it can run: the rungs of a ladder, room for gates and taps in a copy of the model."""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape

from torch import nn

from ._calling import check_batch
from .constraints import Constraint
from .editors import Auto, Editor
from .editors.base import parts
from .editors.metric import Metric
from .errors import InvalidInput
from .likelihoods import Categorical, Likelihood
from .locality import Locality
from .network import GATE, Network, is_linear, is_transposed, select, with_slots, with_taps
from .statistics import called, on_path, second_moments

__all__ = ["prepared"]

_WIDEST = 4096  # inputs, or outputs, of a layer whose second moments are taken unasked: their inverse takes a second


def prepared(
    model: nn.Module,
    parameters: str | Sequence[str],
    editor: Editor,
    keep: Locality | None,
    constraint: Constraint | None = None,
) -> tuple[Editor, nn.Module, Network]:
    """Return the editor, a model with the room for gates that it needs, and a view of it; the model itself stays.

    Args:
        model: the user's.
        parameters: which may move.
        editor: an `Auto` without rungs gets its usual ones, from the half of `keep` that a search may see.
        keep: what should stay, knowing what its outputs mean.
        constraint: what is asked, or one of several edits: layers are those that its answers depend on; all layers when
            not given.
    """
    if isinstance(editor, Auto) and not editor.rungs:
        if keep is None:
            raise InvalidInput(f"{editor!r} needs something to keep; pass keep=wp.Locality(inputs)")
        editor = _completed(editor, model, parameters, keep.split[0], constraint)
    taps = _taps(editor)
    if not editor.slots and not taps:
        return editor, model, Network(model, parameters)
    names = _places(model, select(model, parameters))
    for layer, count in editor.slots.items():
        model = with_slots(model, layer, count)
        names.append(f"{escape(layer)}.{GATE}.*")
    return editor, model, Network(with_taps(model, taps) if taps else model, names)  # judged without taps


def _places(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return patterns for all places of these parameters: a tied one has several."""
    own = dict(model.named_parameters())
    chosen = {id(own[name]) for name in names}
    return [escape(name) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in chosen]


def _taps(editor: Editor) -> list[str]:
    """Return the modules that an editor, or one inside of it, looks at."""
    return list(dict.fromkeys(name for part in parts(editor) if isinstance(part, Editor) for name in part.taps))


def _completed(
    auto: Auto, model: nn.Module, parameters: str | Sequence[str], keep: Locality, constraint: Constraint | None
) -> Auto:
    """Give the ladder its usual rungs for this model, with statistics of what is kept."""
    weights, sides = dict(model.named_parameters()), _sides(model)
    asked = weights if constraint is None else on_path(model, constraint)
    late = [name for name in called(model, keep.inputs, parameters=parameters) if sides[name][1] < _WIDEST]
    late = [name for name in late if name in asked]
    readouts = [name for name in called(model, keep.inputs) if weights[name].ndim == 2 and name in asked]
    metric = _metric(model, late[-4:], keep) if late else None
    gate = _layer(model, weights[readouts[-1]]) if readouts else None
    return Auto.late(metric, gate=gate, budget=auto.budget, altered=auto.altered)


def _metric(model: nn.Module, names: Sequence[str], keep: Locality) -> Metric:
    """Return the metric of these layers on what is kept: two-sided where there are more answers than outputs.

    Of fewer answers most directions of the outputs would not be seen, and seem free. A likelihood that cannot be
    sampled says nothing of the outputs.
    """
    sides, chosen = _sides(model), [escape(name) for name in names]
    answers = min(
        check_batch(part.inputs, "Locality") if part.mask is None else int(part.mask.sum()) for part in keep.parts
    )
    meanings = [part.likelihood or Categorical() for part in keep.parts]
    seen = all(sides[name][0] <= min(answers, _WIDEST) for name in names)
    seen = seen and all(type(meaning).sample is not Likelihood.sample for meaning in meanings)
    first, *more = (
        second_moments(model, part, parameters=chosen, likelihood=meaning if seen else None)
        for part, meaning in zip(keep.parts, meanings, strict=True)
    )
    return sum(more, first).metric()


def _sides(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return how many outputs and inputs a layer with such a weight has."""
    turned = {id(module.weight) for module in model.modules() if is_transposed(module)}
    found = {}
    for name, weight in model.named_parameters():
        sides = (len(weight), weight[0].numel()) if weight.ndim > 1 and len(weight) else (weight.numel(), 1)
        found[name] = sides[::-1] if id(weight) in turned else sides
    return found


def _layer(model: nn.Module, weight: nn.Parameter) -> str | None:
    """Return the linear layer with this weight: a tied one is first named after the embedding that shares it."""
    found = [n for n, module in model.named_modules() if is_linear(module) and module.weight is weight]
    return found[-1] if found else None
