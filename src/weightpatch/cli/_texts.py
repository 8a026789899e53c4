"""Texts on the command line: what is asked, files of it, and files of other texts with their references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidInput

_KEPT = 64  # texts that hold an edit back where it is not said; each step runs them all


@dataclass(frozen=True)
class Texts:
    """Texts, with references for all of them or for none, and the lines of their file, from 1."""

    texts: tuple[str, ...] = ()
    references: tuple[str, ...] | None = None
    lines: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, chosen: Sequence[int]) -> Texts:
        """Return some of them."""
        told = None if self.references is None else tuple(self.references[i] for i in chosen)
        return Texts(tuple(self.texts[i] for i in chosen), told, tuple(self.lines[i] for i in chosen))

    def without(self, sources: Sequence[str]) -> Texts:
        """Return those that are not asked about."""
        return self.rows([i for i, text in enumerate(self.texts) if text not in sources])

    def split(self, wanted: int | None) -> tuple[Texts, Texts]:
        """Split off texts, at most half of them, that hold an edit back; what changes is measured on the others."""
        import torch

        n = min(_KEPT if wanted is None else wanted, len(self) // 2)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
        return self.rows(order[:n]), self.rows(sorted(order[n:]))


def read_texts(path: Path) -> Texts:
    """Read a file of one text a line, or one text, a tab and its reference a line; empty lines do not count."""
    try:
        whole = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}; expected a text file in UTF-8, one text a line") from error
    lines = {number: line for number, line in enumerate(whole, 1) if line.strip()}
    if not lines:
        raise InvalidInput(
            f"{path} is empty; expected one text a line, with a tab and its reference where there is one"
        )
    cells, numbers = [line.split("\t") for line in lines.values()], tuple(lines)
    widths = {len(row) for row in cells}
    if widths - {1, 2} or len(widths) > 1:
        odd = next(i for i, row in enumerate(cells) if len(row) != len(cells[0]) or len(row) > 2)
        raise InvalidInput(
            f"line {numbers[odd]} of {path} has {len(cells[odd]) - 1} tabs and the first one "
            f"{len(cells[0]) - 1}; expected one text a line, and either a tab and its reference on every line or none"
        )
    texts = tuple(row[0].strip() for row in cells)
    return Texts(texts, tuple(row[1].strip() for row in cells) if widths == {2} else None, numbers)


@dataclass(frozen=True)
class Mistakes:
    """Texts that are answered wrongly, what they should be answered by, and on which lines of their file they stand."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    lines: tuple[int, ...]


def read_mistakes(path: Path) -> Mistakes:
    """Read a file of JSON lines, each an object with texts as "source" and "target"; other keys do not count."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f'{path} cannot be read: {error}; expected JSON lines such as {{"source": "...", "target": "..."}}'
        ) from error
    found = [(*_mistake(line, number, path), number) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidInput(f'{path} is empty; expected JSON lines such as {{"source": "...", "target": "..."}}')
    sources, targets, places = zip(*found, strict=True)
    return Mistakes(sources, targets, places)


def _mistake(line: str, number: int, path: Path) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidInput(f"line {number} of {path} is not JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise InvalidInput(f"line {number} of {path} is a JSON {type(row).__name__}; expected an object")
    for name in ("source", "target"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            given = f"{row[name]!r:.40} as" if name in row else "no"
            raise InvalidInput(f'line {number} of {path} has {given} "{name}"; expected a text')
    return row["source"], row["target"]


def check_asked(sources: Sequence[str], targets: Sequence[str]) -> None:
    """Check that every source has its target."""
    if not sources or len(sources) != len(targets):
        raise InvalidInput(
            f"--source was given {len(sources)} times and --target {len(targets)} times; expected one --target for "
            "each --source, in the same order"
        )
    for name, texts in (("--source", sources), ("--target", targets)):
        if not all(text.strip() for text in texts):
            raise InvalidInput(f"{name} was given an empty text; expected at least one word")
