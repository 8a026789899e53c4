"""Second moments of what layers are given and of their outputs' gradients: sums that add up, files, metrics."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..editors import LayerMetric, Metric
from ..errors import InvalidInput
from ..patches import fingerprint
from ..patches.files import write
from .layers import LayerMoments, read, tensors, told
from .shrinkage import OUTPUTS, UNKNOWN, estimated

__all__ = ["Moments"]

_FORMAT = "weightpatch moments 2"


@final
@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of several layers, of one model on some data.

    Sums in float64: those of shards, added with ``+``, are those of all data, up to the rounding of a sum.

    Attributes:
        layers: by the name of the weight.
        fingerprint: of the weights of the model, see `weightpatch.patches.fingerprint`.
        items: over how many items.
    """

    layers: Mapping[str, LayerMoments]
    fingerprint: str
    items: int

    def __repr__(self) -> str:
        sides = ", inputs and outputs" if self.two_sided else ""
        return f"<Moments of {len(self.layers)} layers on {self.items} items{sides}>"

    @property
    def two_sided(self) -> bool:
        """Whether the outputs were measured too."""
        return all(layer.fisher is not None for layer in self.layers.values())

    def __add__(self, other: Moments) -> Moments:
        alike = self.layers.keys() == other.layers.keys() and self.two_sided == other.two_sided
        if self.fingerprint != other.fingerprint or not alike:
            raise InvalidInput(
                f"moments of {list(self.layers)} and of {list(other.layers)} cannot be added; expected the same layers "
                "of the same weights, and a likelihood for both or for neither"
            )
        layers = {name: layer + other.layers[name] for name, layer in self.layers.items()}
        return Moments(layers, self.fingerprint, self.items + other.items)

    def metric(
        self, shrinkage: float | None = None, energy: float | None = None, *, output_shrinkage: float | None = None
    ) -> Metric:
        """Return the metric ``||Δ||² = E ||Δ x||²``, or two-sided ``E (gᵀ Δ x)²``, for `Preconditioned` and others.

        It is two-sided where the outputs were measured too.

        Args:
            shrinkage: how much of the mean eigenvalue of E[x xᵀ] is added to all: what is spent on directions that the
                reference data does not show. The smaller it is, the more an edit relies on these being free; the
                larger, the more all directions count alike. When not given, `estimated` for each layer: it falls as
                data grows. The metric's ``repr`` tells it.
            energy: edits stay in the directions that hold no more than 1 - energy of the inputs' energy together; in
                those all count alike. The metric itself when not given.
            output_shrinkage: how much of the mean eigenvalue of E[g gᵀ] is added to all: the larger it is, the more all
                directions of the outputs count alike; ``math.inf`` makes a metric of the inputs alone. When not given
                0.1, which is no estimate: gradients of sampled answers have heavy tails, and halves of them disagree.

        Raises:
            InvalidInput: a number is out of range, or there are no moments of the outputs.
        """
        positive = all(value is None or value > 0 for value in (shrinkage, output_shrinkage)) and shrinkage != math.inf
        if not positive or (energy is not None and not 0 < energy < 1):
            raise InvalidInput(
                f"metric was given shrinkage={shrinkage}, energy={energy}, output_shrinkage={output_shrinkage}; "
                "expected a positive shrinkage or None, an energy between 0 and 1 or None, and a positive "
                "output_shrinkage or None"
            )
        if output_shrinkage is not None and output_shrinkage != math.inf:
            self._check_outputs()
        outwards = math.inf if not self.two_sided else output_shrinkage or OUTPUTS
        return Metric({name: self._layer(layer, shrinkage, energy, outwards) for name, layer in self.layers.items()})

    def _layer(
        self, layer: LayerMoments, shrinkage: float | None, energy: float | None, outwards: float
    ) -> LayerMetric:
        fisher = None if layer.fisher is None or outwards == math.inf else layer.fisher / self.items
        if fisher is not None and not fisher.any():
            fisher = None  # the predictions do not depend on this layer
        if shrinkage is None:
            shrinkage = UNKNOWN if energy is not None else estimated(layer)  # a projector has none
        shrunk = (shrinkage, energy, fisher, outwards)
        second, power = layer.total / layer.count, layer.power / layer.count
        return LayerMetric(layer.weight, layer.bias, second, power, *shrunk, transposed=layer.transposed)

    def _check_outputs(self) -> None:
        if not self.two_sided:
            raise InvalidInput(
                "a two-sided metric needs moments of the outputs; measure them with "
                "second_moments(..., likelihood=weightpatch.likelihoods.Categorical())"
            )
        dead = [name for name, layer in self.layers.items() if layer.fisher is not None and not layer.fisher.any()]
        if dead:
            raise InvalidInput(
                f"the model's predictions do not depend on the outputs of {', '.join(dead[:3])}; choose other layers"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        facts = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "items": str(self.items),
            "layers": json.dumps({name: told(layer) for name, layer in self.layers.items()}),
        }
        parts = {key: tensor for name, layer in self.layers.items() for key, tensor in tensors(name, layer)}
        write(path, [save({name: tensor.cpu().contiguous() for name, tensor in parts.items()}, facts)])

    @staticmethod
    def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Moments:
        """Read such a file.

        Args:
            path: of the file.
            model: refuse the file where it was made with other weights than these.

        Raises:
            InvalidInput: not such a file, or not of these weights.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts, parts = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if facts.get("format") != _FORMAT:
                raise InvalidInput(f"{path} is no file of moments; expected what Moments.save wrote")
            layers = {name: read(name, layer, parts) for name, layer in json.loads(facts["layers"]).items()}
            found = Moments(layers, facts["fingerprint"], int(facts["items"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"{path} cannot be read as moments: {error}") from error
        if model is not None and fingerprint(model) != found.fingerprint:
            raise InvalidInput(f"{path} was made with other weights than this model has; run second_moments again")
        return found
