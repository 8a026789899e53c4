"""How much the directions of a layer's outputs matter: the Fisher information of the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from .._calling import Function, Inputs, outputs
from ..errors import InvalidInput, NonFinite
from ..network import is_linear

__all__ = ["categorical", "gaussian"]

Likelihood: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]

_WIDEST = 8192  # outputs a group: their second moments take half a gigabyte


def categorical(answers: Tensor, generator: torch.Generator) -> Tensor:
    """Draw classes from ``softmax(z)`` and return their log-likelihood, (n,): of classifiers, and of sequences' parts.

    Args:
        answers: logits z, (n, ..., classes); one class is drawn at each position.
        generator: on the CPU.
    """
    logs = answers.log_softmax(-1)
    chances = logs.detach().double().exp().flatten(0, -2).cpu()
    drawn = torch.multinomial(chances, 1, generator=generator).to(logs.device)
    return logs.gather(-1, drawn.view(*logs.shape[:-1], 1)).reshape(len(logs), -1).sum(1)


def gaussian(answers: Tensor, generator: torch.Generator) -> Tensor:
    """Draw ``y = f + ε`` with ``ε ~ N(0, 1)`` and return ``-½ ||f - y||²``, (n,): the log-likelihood of a regression.

    Args:
        answers: f, (n, ...), in units of the noise.
        generator: on the CPU.
    """
    noise = torch.randn(answers.shape, generator=generator, dtype=torch.float64, device="cpu").to(answers)
    return -0.5 * (answers - (answers.detach() + noise)).square().reshape(len(answers), -1).sum(1)


@final
class Probes:
    """Adds zeros to the outputs of layers, and the gradients with respect to them to sums.

    Attributes:
        sums: Σ g gᵀ by the name of the layer's weight, (groups, out / groups, out / groups), float64.
    """

    def __init__(self, likelihood: Likelihood, seed: int) -> None:
        self.sums: dict[str, Tensor] = {}
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

    def run(self, function: Function, batch: Inputs, mask: Tensor | None = None) -> None:
        """Run a batch, and add what its layers' outputs matter to the sums: to answers at a mask's positions, if given.

        Raises:
            InvalidInput: the likelihood returned something else than one number an answer, or there is a mask of
                another shape.
            NonFinite: the log-likelihood is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            answers = outputs(function, _normal(batch))
            if mask is not None:
                if mask.shape != answers.shape[: mask.ndim]:
                    raise InvalidInput(
                        f"second_moments was given a mask of shape {tuple(mask.shape)} with a likelihood, and the "
                        f"model answers with shape {tuple(answers.shape)}; expected one entry an answer"
                    )
                answers = answers[mask]
            found = self._likelihood(answers, self._generator)
            if not isinstance(found, Tensor) or found.shape != (len(answers),):
                given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise InvalidInput(
                    f"the likelihood returned {given}; expected a tensor of shape ({len(answers)},), one "
                    "log-likelihood an item, as weightpatch.statistics.categorical returns it"
                )
            if not bool(found.isfinite().all()):
                raise NonFinite("the log-likelihood of the model's answers is NaN or infinite on this data")
            zeros = [zero for _, _, zero in self._zeros]
            grads = torch.autograd.grad(found.sum(), zeros, allow_unused=True) if zeros else []
        for (weight, module, zero), grad in zip(self._zeros, grads, strict=True):
            g = _channels(module, torch.zeros_like(zero) if grad is None else grad).double()
            total = g.mT @ g
            self.sums[weight] = self.sums[weight] + total if weight in self.sums else total
        self._zeros.clear()


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

    if isinstance(batch, Mapping):
        return {name: copied(part) for name, part in batch.items()}
    return tuple(copied(part) for part in batch) if isinstance(batch, tuple) else copied(batch)
