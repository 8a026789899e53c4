"""Sequence classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from weightpatch._calling import check_classes
from weightpatch.constraints import Classified
from weightpatch.errors import InvalidInput
from weightpatch.locality import Locality

__all__ = ["TextClassifier"]


@final
@dataclass(frozen=True, eq=False)
class TextClassifier:
    """A classifier of texts, as any ``AutoModelForSequenceClassification`` gives it.

    Args:
        model: returns logits (n, classes).
        tokenizer: its own.
    """

    model: nn.Module
    tokenizer: Any

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
        config: Any = self.model.config
        names = {name: number for number, name in config.id2label.items()}
        unknown = [label for label in labels if isinstance(label, str) and label not in names]
        if unknown:
            raise InvalidInput(f"there is no class {unknown[0]!r}; expected one of {', '.join(names)}")
        wanted = torch.tensor([names[label] if isinstance(label, str) else label for label in labels], device="cpu")
        check_classes(wanted, "classified", len(names))
        return Classified(self.inputs(texts), wanted, margin)

    def kept(self, texts: Sequence[str]) -> Locality:
        """Return what should stay: the class probabilities of n texts."""
        return Locality(self.inputs(texts))
