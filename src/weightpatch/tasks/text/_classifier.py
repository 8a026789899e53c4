"""Sequence classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from weightpatch._calling import check_classes
from weightpatch.constraints import Classified, Tagged, Within
from weightpatch.errors import InvalidInput
from weightpatch.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Of
from weightpatch.locality import Locality

__all__ = ["TextClassifier"]


@final
@dataclass(frozen=True, eq=False)
class TextClassifier:
    """A model that gives one answer a text, as any ``AutoModelForSequenceClassification`` does.

    What its outputs mean follows from the configuration's `problem_type`, as in transformers: classes, tags
    ("multi_label_classification") or numbers ("regression", and one output where nothing is said).

    Args:
        model: returns logits (n, classes), (n, tags), or numbers (n, k).
        tokenizer: its own.
    """

    model: nn.Module
    tokenizer: Any

    @property
    def likelihood(self) -> Likelihood:
        """What the outputs mean."""
        config: Any = self.model.config
        said = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
        kinds: dict[str, Likelihood] = {
            "single_label_classification": Categorical(-1, Of.logits),
            "multi_label_classification": Bernoulli(Of.logits, -1),
            "regression": Gaussian(),
        }
        return kinds[said]

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the model's inputs for n texts, padded."""
        found = self.tokenizer(list(texts), return_tensors="pt", padding=True)
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in found.items()}

    def classified(self, texts: Sequence[str], labels: Sequence[str | int], margin: float = 0.1) -> Classified:
        """Ask for the classes of n texts.

        Args:
            texts: n of them.
            labels: by name or number.
            margin: by how much they win, in logits.
        """
        self._check("classified", Categorical)
        wanted = torch.tensor(self._numbers(labels), device="cpu")
        check_classes(wanted, "classified", len(self._names))
        return Classified(self.inputs(texts), wanted, margin)

    def tagged(
        self, texts: Sequence[str], on: Sequence[str | int] = (), off: Sequence[str | int] = (), margin: float = 0.1
    ) -> Tagged:
        """Ask for tags of n texts to be on or off.

        Args:
            texts: n of them.
            on: tags by name or number, the same for all texts.
            off: likewise.
            margin: in logits.
        """
        self._check("tagged", Bernoulli)
        return Tagged(
            self.inputs(texts), self._numbers(on), self._numbers(off), margin, likelihood=Bernoulli(Of.logits)
        )

    def within(self, texts: Sequence[str], targets: Tensor, tolerance: float) -> Within:
        """Ask for the numbers of n texts.

        Args:
            texts: n of them.
            targets: (n, k), as the model answers.
            tolerance: the squared distance allowed per text.
        """
        self._check("within", Gaussian)
        return Within(self.inputs(texts), targets, tolerance)

    def kept(self, texts: Sequence[str]) -> Locality:
        """Return what should stay: the answers to n texts."""
        return Locality(self.inputs(texts), likelihood=self.likelihood)

    @property
    def _names(self) -> dict[str, int]:
        config: Any = self.model.config
        return {name: number for number, name in config.id2label.items()}

    def _numbers(self, labels: Sequence[str | int]) -> list[int]:
        names = self._names
        unknown = [label for label in labels if isinstance(label, str) and label not in names]
        if unknown:
            raise InvalidInput(f"there is no class {unknown[0]!r}; expected one of {', '.join(names)}")
        return [names[label] if isinstance(label, str) else label for label in labels]

    def _check(self, asked: str, kind: type[Likelihood]) -> None:
        if not isinstance(self.likelihood, kind):
            fit = {Categorical: "classified", Bernoulli: "tagged", Gaussian: "within"}[type(self.likelihood)]
            config: Any = self.model.config
            raise InvalidInput(
                f"{asked} was asked of a model of problem_type={config.problem_type!r} with {config.num_labels} "
                f"outputs; expected {fit}"
            )
