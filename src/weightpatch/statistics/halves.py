"""Two halves of the items, so that what one half says can be checked on the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._calling import Inputs, rows
from ..errors import InvalidInput
from ..locality import digests

__all__ = ["halved"]


def halved(batch: Inputs, mask: Tensor | None) -> Iterator[tuple[int, Inputs, Tensor | None]]:
    """Yield a batch's items of either half: which half, 0 or 1, these items, and their rows of the mask.

    The half is the last bit of the item's digest, so that it does not depend on how data are cut into batches and
    shards, and that copies of an item are never on both sides. It is another bit than those by which `Locality.split`
    goes. A batch that cannot be taken apart by rows is in one half as a whole.
    """
    sides = torch.tensor([digest[-1] & 1 for digest in digests(batch)], device="cpu")
    try:
        parts = [
            (side, rows(batch, index), None if mask is None else mask[index.to(mask.device)])
            for side in (0, 1)
            if len(index := (sides == side).nonzero().squeeze(1))
        ]
    except (InvalidInput, IndexError):
        yield int(sides.sum()) & 1, batch, mask
        return
    yield from parts
