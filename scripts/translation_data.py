"""Makes the shipped translation pairs: splits them, and keeps what resembles a held-out sentence out of training.

    python scripts/translation_data.py libreoffice-help.de-en.tsv.gz libreoffice-ui.de-en.tsv.gz

The inputs hold one pair a line, German TAB English. Held-out pairs are random help sentences of 4 to 40 words, unlike
each other; training pairs are all others of both files that are unlike every held-out one. Two pairs are alike where,
in German or in English, the sets of their words (lower case, numbers made one word) overlap by a Jaccard index of
0.6 or more. Needs scipy.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy import sparse

HELD_OUT = {"test": 2000, "validation": 1000}
ALIKE = 0.6
HERE = Path(__file__).parent.parent / "src" / "weightpatch" / "tasks" / "translation" / "shipped"


def read(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [(de, en) for de, en in (line.rstrip("\n").split("\t") for line in file)]


def write(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write pairs as `read` reads them; the file appears only whole, and the same pairs make the same bytes."""
    text = "".join(f"{german}\t{english}\n" for german, english in pairs)
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, packed, mtime=0) as file:
        file.write(text.encode())
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(packed.getvalue())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def words(text: str) -> list[str]:
    return ["0" if word.isdigit() else word for word in re.findall(r"\d+|[^\W\d]+|[^\w\s]", text.lower())]


def sets(texts: list[str]) -> sparse.csr_matrix:
    """Return which words each text has, (texts, vocabulary), 0 or 1."""
    known: dict[str, int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        for word in set(words(text)):
            rows.append(row)
            columns.append(known.setdefault(word, len(known)))
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(texts), len(known)))


def alike(some: np.ndarray, others: np.ndarray, languages: list[sparse.csr_matrix]) -> np.ndarray:
    """Return for which pairs of rows the word sets overlap in either language, (some, others), bool."""
    found = np.zeros((len(some), len(others)), bool)
    for matrix in languages:
        sizes = np.asarray(matrix.sum(1)).ravel()
        both = (matrix[some] @ matrix[others].T).toarray()
        found |= both >= ALIKE * (sizes[some][:, None] + sizes[others][None, :] - both)
    return found


def unlike(some: np.ndarray, others: np.ndarray, languages: list[sparse.csr_matrix]) -> np.ndarray:
    """Return which rows of some are like none of the others, (some,), bool."""
    parts = np.array_split(some, max(1, len(some) // 500))
    return np.concatenate([~alike(part, others, languages).any(1) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("help", type=Path)
    parser.add_argument("ui", type=Path)
    arguments = parser.parse_args()
    pairs = read(arguments.help)
    count = len(pairs)
    pairs += [pair for pair in read(arguments.ui) if all(pair)]
    languages = [sets([pair[side] for pair in pairs]) for side in (0, 1)]
    order = [i for i in range(count) if all(4 <= len(text.split()) <= 40 for text in pairs[i])]
    random.Random(0).shuffle(order)
    chosen: list[int] = []
    for start in range(0, len(order), 200):
        some = np.array(order[start : start + 200])
        fresh = [] if not chosen else alike(some, np.array(chosen), languages).any(1)
        within = alike(some, some, languages)
        for place, row in enumerate(some):
            if not (len(fresh) and fresh[place]) and not within[place, :place].any():
                chosen.append(int(row))
        if len(chosen) >= sum(HELD_OUT.values()):
            break
    chosen = chosen[: sum(HELD_OUT.values())]
    left, held = np.array(sorted(set(range(len(pairs))) - set(chosen))), np.array(chosen)
    free = unlike(left, held, languages)
    splits = {"train": left[free].tolist()}
    begun = 0
    for name, size in HELD_OUT.items():
        splits[name] = sorted(chosen[begun : begun + size])
        begun += size
    print(f"{count} help and {len(pairs) - count} interface pairs; {int((~free).sum())} resemble a held-out one")
    HERE.mkdir(parents=True, exist_ok=True)
    for name, some in splits.items():
        write(HERE / f"{name}.de-en.tsv.gz", (pairs[i] for i in some))
        print(f"{name}: {len(some)}")


if __name__ == "__main__":
    main()
