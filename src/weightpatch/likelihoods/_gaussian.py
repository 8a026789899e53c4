"""Numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from ..errors import InvalidInput
from ._base import Likelihood
from ._shapes import aligned, check_alike, check_targets, events

__all__ = ["Gaussian"]

_TOLERANCE = 0.1  # of the spread of kept outputs: from here on a number counts as changed


@final
@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Numbers: outputs are the mean of a normal distribution of standard deviation σ.

    Args:
        scale: σ, in units of the outputs: of all, or one for each of the k outputs. When not given, the standard
            deviation of the outputs that are kept.
        tolerance: by how much an output may move before its answer counts as changed, in the same units, likewise of
            all or of each. When not given, a tenth of that standard deviation.
        dim: the dimension of the k outputs of a position; when not given the last one, and 1 for outputs of four and
            more dimensions. Outputs of shape (n,) are one number.
    """

    scale: float | tuple[float, ...] | None = None
    tolerance: float | tuple[float, ...] | None = None
    dim: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("scale", 0.0), ("tolerance", -1.0)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, Tensor):
                value = tuple(value.tolist()) if value.ndim else float(value)
                object.__setattr__(self, name, value)
            numbers = value if isinstance(value, tuple) else (value,)
            if (
                not all(
                    isinstance(v, (int, float)) and (least < v if least == 0 else v >= 0) and v < math.inf
                    for v in numbers
                )
                or not numbers
            ):
                wanted = "above 0" if least == 0 else "of at least 0"
                raise InvalidInput(
                    f"Gaussian was given {name}={value!r}; expected a finite number {wanted}, in units of the outputs, "
                    "or one for each output"
                )

    @property
    def error_name(self) -> str:
        """What `figure` is called."""
        return "RMSE"

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be read off outputs."""
        return self.scale is not None and self.tolerance is not None

    def fitted(self, outputs: Tensor) -> Gaussian:
        """Take what is not given from the spread of these outputs.

        Raises:
            InvalidInput: the outputs have no spread.
        """
        if self.complete:
            return self
        laid = events(outputs.detach().double(), self.dim).flatten(0, -2)
        spread = laid.std(0, correction=0)
        if not bool((spread > 0).all()) or not bool(spread.isfinite().all()):
            raise InvalidInput(
                f"{self!r} takes what it lacks from the spread of the outputs, and that of {len(laid)} outputs here is "
                f"{[round(float(s), 6) for s in spread[:8]]}; keep more inputs, or write "
                "likelihood=Gaussian(scale, tolerance) in units of the outputs"
            )
        tolerance = self.tolerance if self.tolerance is not None else _plain(_TOLERANCE * spread)
        return replace(self, scale=self.scale if self.scale is not None else _plain(spread), tolerance=tolerance)

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return ``Σ Δ² / 2σ²``, (n, ...), nats."""
        check_alike(self, before, after)
        moved = events(after - before, self.dim) / self._of("scale", after)
        return 0.5 * moved.square().sum(-1)

    def answer(self, outputs: Tensor) -> Tensor:
        """Return the numbers, (n, ..., k)."""
        return events(outputs, self.dim)

    def changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return where any output moved by more than its tolerance, or became NaN, (n, ...)."""
        check_alike(self, before, after)
        moved = events(after - before, self.dim).abs()
        same = (moved <= self._of("tolerance", moved)) | (events(before, self.dim).isnan() & moved.isnan())
        return ~same.all(-1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of a position's outputs, of those whose targets are not NaN; inf for NaN."""
        values = events(outputs.double().nan_to_num(torch.inf, torch.inf, -torch.inf), self.dim)
        given = aligned(targets.to(outputs.device), outputs, self.dim)
        check_targets(self, given, values.shape, whole=False)
        return (values - given.double()).square().nanmean(-1)

    def figure(self, mean: float) -> float:
        """Return the root of a mean squared error, in units of the outputs."""
        return math.sqrt(mean) if mean >= 0 else mean

    def log_prob(self, outputs: Tensor, answers: Tensor) -> Tensor:
        """Return ``-½ Σ (y - f)² / σ²``, (n, ...), without the constant."""
        return -0.5 * ((events(outputs, self.dim) - answers) / self._of("scale", outputs)).square().sum(-1)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Draw ``y = f + σ ε``, ε ~ N(0, 1), (n, ..., k)."""
        laid = events(outputs.detach(), self.dim)
        noise = torch.randn(laid.shape, generator=generator, dtype=torch.float64, device="cpu").to(laid)
        return laid + self._of("scale", laid) * noise

    def margin(self, outputs: Tensor, before: Tensor) -> Tensor:
        """Return how far the moves are from their tolerance."""
        moved = events(outputs - before, self.dim).abs()
        return (moved - self._of("tolerance", moved)).abs().amin(-1)

    def reach(self, error: Tensor) -> Tensor:
        """Return the largest error."""
        return events(error, self.dim).abs().amax(-1)

    def _of(self, name: str, like: Tensor) -> Tensor:
        value = getattr(self, name)
        if value is None:
            raise InvalidInput(
                f"{self!r} has no {name}, in units of the outputs; write likelihood=Gaussian(scale, tolerance), "
                "or have it taken from the spread of what is kept: keep=wp.Locality(inputs, likelihood=Gaussian())"
            )
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _plain(values: Tensor) -> float | tuple[float, ...]:
    found = tuple(float(value) for value in values)
    return found[0] if len(found) == 1 else found
