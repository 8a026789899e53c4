"""What a network is trained on: items by their number, so that a stopped run finds the same ones again."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Generator, Tensor

from .._calling import Inputs, length, rows
from ..errors import InvalidInput
from .samplers import Alter

__all__ = ["Items", "TrainingData"]


class TrainingData(ABC):
    """Numbered training items. Subclass it for data that does not fit into memory."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the items."""

    @abstractmethod
    def batch(self, index: Tensor, generator: Generator) -> tuple[Inputs, Any]:
        """Return inputs and targets of some items.

        Args:
            index: which, shape (n,), int64.
            generator: all randomness, of augmentation for one, comes from it; on the CPU.
        """


@final
@dataclass(frozen=True, eq=False)
class Items(TrainingData):
    """Items in memory.

    Args:
        inputs: a batch of n items.
        targets: what L_base compares the outputs with, shape (n, ...).
        augment: makes a randomly changed batch of a batch: (inputs, generator) to inputs.

    Raises:
        InvalidInput: there are no items, or not one target an item.
    """

    inputs: Inputs
    targets: Tensor
    augment: Alter | None = None

    def __post_init__(self) -> None:
        if not len(self) or len(self.targets) != len(self):
            raise InvalidInput(
                f"Items was given {len(self)} inputs and {len(self.targets)} targets; expected as many, at least 1"
            )

    def __len__(self) -> int:
        return length(self.inputs)

    def batch(self, index: Tensor, generator: Generator) -> tuple[Inputs, Tensor]:
        """Return inputs, changed where there is an `augment`, and targets."""
        inputs = rows(self.inputs, index)
        return (inputs if self.augment is None else self.augment(inputs, generator)), self.targets[index]


def derived_seed(*parts: int | str) -> int:
    """Return a seed that depends on all parts; 63 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def derived(*parts: int | str) -> Generator:
    """Return a CPU generator whose seed depends on all parts."""
    return torch.Generator().manual_seed(derived_seed(*parts))


def batch_index(items: int, size: int, number: int, seed: int) -> Tensor:
    """Return the items of one batch: every epoch a new random order, whose last, smaller batch is left out.

    Args:
        items: how many there are.
        size: of a batch; at most `items`.
        number: of the batch, from 0 and through all epochs.
        seed: of the orders.
    """
    epoch, place = divmod(number, items // size)
    order = torch.randperm(items, generator=derived(seed, "order", epoch), device="cpu")
    return order[place * size : (place + 1) * size]
