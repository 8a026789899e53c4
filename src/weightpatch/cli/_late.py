"""What may move in a text model of any architecture, where it is not said."""

from __future__ import annotations

from collections.abc import Mapping
from glob import escape
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..constraints import Constraint

_LATE = 3  # matrices before the readout that are looked at: a feed-forward block has two or three


def late_weights(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return patterns of the last feed-forward weights before the readout, in a model of any architecture.

    Of the last three matrices that the model multiplies with before its last one, those that are not square: a
    feed-forward block widens and narrows again, attention mostly does not. All three where each is square.

    Args:
        model: any eager module.
        inputs: of one item, as keyword arguments.
    """
    import torch
    from torch import nn

    from ..network import structural_clone

    clone, seen = structural_clone(model), dict[str, tuple[int, ...]]()
    names = {id(parameter): name for name, parameter in clone.named_parameters()}

    def noting(weight: Tensor) -> Any:
        def note(*_: Any) -> None:
            seen.pop(names[id(weight)], None)
            seen[names[id(weight)]] = tuple(weight.shape)

        return note

    for module in clone.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            module.register_forward_hook(noting(weight))
    with torch.no_grad():
        clone(**inputs)
    late = dict(list(seen.items())[:-1][-_LATE:]) or seen
    if not late:
        raise InvalidInput("the model has no matrices that it calls as modules; say with --parameters what may move")
    chosen = [name for name, shape in late.items() if shape[0] != shape[1]] or list(late)
    return tuple(escape(name) for name in chosen)


def inputs_of(constraint: Constraint) -> Mapping[str, Any]:
    """Return a batch that a demand gives the model."""
    return dict(constraint.batches[0])
