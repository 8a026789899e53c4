"""The German–English sentence pairs that come with weightpatch: LibreOffice's help and interface (MPL-2.0)."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, final, overload

from weightpatch.errors import InvalidInput

SHIPPED = files("weightpatch.tasks.translation") / "shipped"


@final
@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations, side by side.

    Attributes:
        german: n sentences.
        english: their translations, n.
    """

    german: tuple[str, ...]
    english: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.german or len(self.german) != len(self.english):
            raise InvalidInput(
                f"Pairs was given {len(self.german)} sentences and {len(self.english)} translations; "
                "expected as many, at least 1"
            )

    def __len__(self) -> int:
        return len(self.german)

    @overload
    def __getitem__(self, index: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> tuple[str, str] | Pairs:
        if isinstance(index, slice):
            return Pairs(self.german[index], self.english[index])
        return self.german[index], self.english[index]


def libreoffice(split: Literal["train", "validation", "test"] = "test") -> Pairs:
    """Load pairs of LibreOffice's help and interface texts; the held-out splits are of the help alone.

    No training pair resembles a held-out one, and no held-out one another: their sets of words overlap by a Jaccard
    index below 0.6 in both languages (made by ``scripts/translation_data.py``). 42,699 pairs for training, 1,000 for
    validation, 2,000 for testing. Mozilla Public License 2.0; see ``shipped/NOTICE``.
    """
    path = SHIPPED / f"{split}.de-en.tsv.gz"
    if not path.is_file():
        raise InvalidInput(f"libreoffice was given split={split!r}; expected train, validation or test")
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    german, english = zip(*(line.split("\t") for line in lines), strict=True)
    return Pairs(german, english)
