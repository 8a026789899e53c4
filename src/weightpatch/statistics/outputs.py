"""How much the directions of a layer's outputs matter: the Fisher information of the model's own predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._calling import Function, Inputs, Output, outputs
from ..errors import InvalidInput, NonFinite
from ..likelihoods import Likelihood
from ..network import is_linear

__all__ = ["Probes"]

_WIDEST = 8192  # outputs a group: their second moments take half a gigabyte
_IMAGES = 4  # dimensions of outputs from which on a likelihood that names no dimension takes k to be the second


@final
class Probes:
    """Adds zeros to the outputs of layers, to have the gradients with respect to them."""

    def __init__(self, likelihood: Likelihood, seed: int, output: Output = None) -> None:
        self._output = output
        self._likelihood, self._generator = likelihood, torch.Generator().manual_seed(seed)
        self._zeros: list[tuple[str, nn.Module, Tensor]] = []

    def probed(self, weight: str, module: nn.Module, output: Tensor) -> Tensor:
        """Return the output, with a gradient."""
        channels = output.shape[-1 if is_linear(module) else 1] // getattr(module, "groups", 1)
        if channels > _WIDEST:
            raise InvalidInput(
                f"the layer of {weight} has {channels} outputs, and the second moments of their gradients would be a "
                f"matrix of that side; expected at most {_WIDEST}: choose other layers, or leave out the likelihood"
            )
        zeros = torch.zeros_like(output).requires_grad_()
        self._zeros.append((weight, module, zeros))
        return output + zeros

    def run(self, function: Function, batch: Inputs, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Run a batch and return Σ g gᵀ by the name of the layer's weight; of a mask's positions only, if there is one.

        Each is (groups, out / groups, out / groups), float64.

        Raises:
            InvalidInput: the likelihood returned something else than one number a position, or there is a mask of
                another shape.
            NonFinite: the log-likelihood is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            answers = outputs(function, _normal(batch), self._output)
            found = self._log_prob(answers, mask)
            zeros = [zero for _, _, zero in self._zeros]
            grads = torch.autograd.grad(found.sum(), zeros, allow_unused=True) if zeros else []
        sums: dict[str, Tensor] = {}
        for (weight, module, zero), grad in zip(self._zeros, grads, strict=True):
            g = _channels(module, torch.zeros_like(zero) if grad is None else grad).double()
            total = g.mT @ g
            sums[weight] = sums[weight] + total if weight in sums else total
        self._zeros.clear()
        return sums

    def _log_prob(self, answers: Tensor, mask: Tensor | None) -> Tensor:
        """Return the log-likelihood of one drawn answer at every position that counts."""
        if mask is not None and _last(self._likelihood, answers) and mask.shape == answers.shape[:-1]:
            answers, mask = answers[mask].reshape(-1, *[1] * (answers.ndim - 2), answers.shape[-1]), None
        if not bool(answers.isfinite().all()) and bool(self._likelihood.divergence(answers, answers).isnan().any()):
            raise NonFinite(
                "the model answers some of this data with NaN or infinity, of which nothing can be drawn: keep other "
                "items, or leave these positions out with a mask"
            )
        found = self._likelihood.log_prob(answers, self._likelihood.sample(answers.detach(), self._generator))
        if not isinstance(found, Tensor) or not found.ndim or len(found) != len(answers):
            given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InvalidInput(
                f"{self._likelihood!r}.log_prob returned {given}; expected a tensor of shape ({len(answers)}, ...), "
                "one log-likelihood a position"
            )
        if mask is not None and mask.shape != found.shape:
            raise InvalidInput(
                f"second_moments was given a mask of shape {tuple(mask.shape)} with {self._likelihood!r}, and the "
                f"model's predictions have shape {tuple(answers.shape)}, {tuple(found.shape)} of them; expected one "
                "entry of the mask a prediction"
            )
        found = found if mask is None else found[mask]
        if not bool(found.isfinite().all()):
            raise NonFinite("the log-likelihood of the model's answers is NaN or infinite on this data")
        return found


def _last(likelihood: Likelihood, answers: Tensor) -> bool:
    """Say whether the k numbers of a position are surely on the last dimension."""
    dim = getattr(likelihood, "dim", None)
    return answers.ndim < _IMAGES if dim is None else dim in (-1, answers.ndim - 1)


def _channels(module: nn.Module, outputs: Tensor) -> Tensor:
    """Return a layer's outputs, or their gradients, as (groups, positions, out / groups)."""
    if is_linear(module):
        return outputs.detach().flatten(0, -2)[None]
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    n, channels = outputs.shape[:2]
    parts = outputs.detach().reshape(n, module.groups, channels // module.groups, -1)
    return parts.permute(1, 0, 3, 2).reshape(module.groups, -1, channels // module.groups)


def _normal(batch: Inputs) -> Any:
    """Replace tensors that were made in inference mode, which have no gradients, by copies."""

    def copied(part: Any) -> Any:
        return part.clone() if isinstance(part, Tensor) and part.is_inference() else part

    return pytree.tree_map(copied, dict(batch) if isinstance(batch, Mapping) else batch)
