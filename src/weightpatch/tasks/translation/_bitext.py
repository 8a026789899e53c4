"""Sentence pairs as training data: batches of similar lengths, cut into subwords anew every time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Generator, Tensor

from weightpatch.tasks.translation._pairs import Pairs
from weightpatch.training import TrainingData

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

IGNORED = -100


@final
@dataclass(frozen=True, eq=False)
class Bitext(TrainingData):
    """Pairs for the training loop, where an item is a whole batch around one pair: use ``batch_size=1``.

    A batch is the pair and random ones of similar length, about `tokens` target tokens in all. Subwords are sampled
    (subword regularisation, Kudo 2018), where `alpha` is above 0.

    Args:
        pairs: what is trained on.
        pieces: the SentencePiece model of both languages.
        ids: the vocabulary, piece to number.
        tokens: about how many target tokens a batch has.
        alpha: how close to the best segmentation samples are; 0 takes the best one.
        longest: pairs with more subwords in either language are left out.
    """

    pairs: Pairs
    pieces: SentencePieceProcessor
    ids: dict[str, int]
    tokens: int = 3000
    alpha: float = 0.0
    longest: int = 120
    _order: Tensor = field(init=False, repr=False)
    _lengths: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = torch.tensor(
            [
                [len(self.pieces.encode(text, out_type=str)) + 1 for text in texts]
                for texts in (self.pairs.german, self.pairs.english)
            ],
            device="cpu",
        )
        order = (sizes[1] * 1000 + sizes[0]).argsort(stable=True)
        order = order[sizes.amax(0)[order] <= self.longest]
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "_lengths", sizes[1][order])

    def __len__(self) -> int:
        return len(self._order)

    def batch(self, index: Tensor, generator: Generator) -> tuple[dict[str, Tensor], Tensor]:
        """Return model inputs and labels, (n, length), padding labels being -100."""
        place = int(index[0])
        count = min(max(self.tokens // int(self._lengths[place]), 1), 256)
        begin = max(0, min(place - 2 * count, len(self) - 4 * count))
        end = min(begin + 4 * count, len(self))
        count = max(min(count, self.tokens // int(self._lengths[end - 1])), 1)
        near = begin + torch.randperm(end - begin, generator=generator, device="cpu")[: count - 1]
        rows = self._order[torch.cat([torch.tensor([place], device="cpu"), near])].tolist()
        if self.alpha:
            import sentencepiece

            sentencepiece.set_random_generator_seed(int(torch.randint(2**31, (1,), generator=generator, device="cpu")))
        source = padded([self._encode(self.pairs.german[row]) for row in rows], self.ids["<pad>"])
        target = padded([self._encode(self.pairs.english[row]) for row in rows], IGNORED)
        start = torch.full((len(target), 1), self.ids["<pad>"], device="cpu")
        before = torch.cat([start, target[:, :-1]], 1)
        inputs = {
            "input_ids": source,
            "attention_mask": (source != self.ids["<pad>"]).long(),
            "decoder_input_ids": before.where(before != IGNORED, self.ids["<pad>"]),
        }
        return inputs, target

    def _encode(self, text: str) -> list[int]:
        sampled: dict[str, Any] = {"enable_sampling": True, "alpha": self.alpha, "nbest_size": -1} if self.alpha else {}
        pieces = self.pieces.encode(text, out_type=str, **sampled)
        return [*(self.ids.get(piece, self.ids["<unk>"]) for piece in pieces), self.ids["</s>"]]


def padded(rows: list[list[int]], value: int) -> Tensor:
    """Return rows of different lengths as one tensor, (n, longest), int64."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device="cpu")
