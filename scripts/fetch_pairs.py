"""Fetches more German-English pairs to train on: Tatoeba, GNOME, KDE4, News-Commentary, and the TED talks of IWSLT14.

    python scripts/fetch_pairs.py tatoeba gnome --folder runs/pairs
    python scripts/train_translator.py examples/translator/plain.toml --pairs runs/pairs/tatoeba.de-en.tsv.gz

Each corpus becomes FOLDER/NAME.de-en.tsv.gz, written as the shipped pairs are, and what holds of those holds of these:
white space is one space; both sides have a letter, differ, have at most 41 words and similar lengths; no pair resembles
a shipped validation or test pair (translation_data.py judges it). Equal pairs are kept once. Marks of keyboard
shortcuts in GNOME's and KDE's texts stay. Needs scipy.

Licences, to our knowledge; read those in the archives before you pass anything on. Tatoeba: CC BY 2.0 FR. GNOME, KDE4:
those of each program, mostly GPL or LGPL. News-Commentary (Project Syndicate): offered by WMT for research. IWSLT14
(TED, WIT3): CC BY-NC-ND, not for commercial use, nor to be passed on altered.

Tried: everything against a local server, with small archives. Not tried: the real addresses and archives, which could
not be reached where this was written. So no SHA-256 sums are given. Checked are the length that the server announces,
the archive's own checksums, and that there is one text of each language with as many lines. Where an address has moved,
`--origin` takes another one, or an archive that you have fetched by hand. IWSLT16 is not in the list, for we know no
address of it; where its archive has the layout of IWSLT14's, `iwslt14 --origin FILE` reads it.
"""

from __future__ import annotations

import argparse
import gzip
import re
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO

import numpy as np
from translation_data import sets, unlike, write

from weightpatch.errors import InvalidInput
from weightpatch.tasks.translation import libreoffice

LARGEST = 1 << 30  # bytes of an archive, and of a text in it
LONGEST = 41  # words, as the longest shipped pair
OPUS = (
    "https://object.pouta.csc.fi/OPUS-{}/moses/de-en.txt.zip",
    "https://opus.nlpl.eu/download.php?f={}/moses/de-en.txt.zip",
)

Pair = tuple[str, str]


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is found, and how it is unpacked.

    Attributes:
        origins: addresses, in the order they are tried.
        texts: reads the German and the English text from an archive.
    """

    origins: tuple[str, ...]
    texts: Callable[[IO[bytes]], tuple[bytes, bytes]]


def zipped(archive: IO[bytes]) -> tuple[bytes, bytes]:
    """Read the texts of a zip of OPUS's; zipfile checks their CRC-32."""
    with zipfile.ZipFile(archive) as found:
        sizes = {info.filename: info.file_size for info in found.infolist()}
        german, english = chosen(sizes)
        return found.read(german), found.read(english)


def tarred(archive: IO[bytes]) -> tuple[bytes, bytes]:
    """Read the texts of a .tgz of WIT3's, without what is told about the talks."""
    with gzip.open(archive) as whole:
        while whole.read(1 << 20):  # tarfile stops before the checksum
            pass
    archive.seek(0)
    with tarfile.open(fileobj=archive, mode="r:gz") as found:
        files = {member.name: member for member in found.getmembers() if member.isfile()}
        german, english = chosen({name: member.size for name, member in files.items()})
        opened = (found.extractfile(files[name]) for name in (german, english))
        texts = [b"" if file is None else file.read() for file in opened]
    return untagged(texts[0]), untagged(texts[1])


def chosen(sizes: dict[str, int]) -> Pair:
    """Return the names of the German and the English text."""
    found = [[name for name in sizes if name.endswith(ending)] for ending in (".de-en.de", ".de-en.en")]
    if [len(names) for names in found] != [1, 1]:
        raise InvalidInput(
            f"the archive has {len(found[0])} German and {len(found[1])} English texts among {len(sizes)} files; "
            "expected one *.de-en.de and one *.de-en.en"
        )
    for (name,) in found:
        if sizes[name] > LARGEST:
            raise InvalidInput(f"{name} has {sizes[name]} bytes; expected at most {LARGEST}")
    return found[0][0], found[1][0]


def untagged(text: bytes) -> bytes:
    """Leave out lines about a talk; titles and descriptions are translated, and stay."""
    told = re.compile(rb"\s*</?(url|talkid|keywords|speaker|reviewer|translator|doc)\b")
    lines = [line for line in text.split(b"\n") if not told.match(line)]
    return re.sub(rb"</?(title|description)>", b"", b"\n".join(lines))


def opus(name: str, version: str) -> Corpus:
    return Corpus(tuple(address.format(f"{name}/{version}") for address in OPUS), zipped)


CORPORA = {
    "tatoeba": opus("Tatoeba", "v2023-04-12"),
    "gnome": opus("GNOME", "v1"),
    "kde4": opus("KDE4", "v2"),
    "news-commentary": opus("News-Commentary", "v16"),
    "iwslt14": Corpus(
        (
            "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz",
            "https://wit3.fbk.eu/archive/2014-01/texts/de/en/de-en.tgz",
        ),
        tarred,
    ),
}


def download(origin: str, target: IO[bytes]) -> None:
    """Write what is at an address to a file, all of it or an error."""
    with urllib.request.urlopen(origin, timeout=60) as answer:
        told, got = answer.headers.get("Content-Length"), 0
        while got <= LARGEST and (part := answer.read(1 << 20)):
            got += target.write(part)
    if got > LARGEST:
        raise InvalidInput(f"more than {LARGEST} bytes; expected an archive of at most so many")
    if told is not None and got != int(told):
        raise InvalidInput(f"{got} bytes arrived of {told}; try again")
    target.seek(0)


def unpacked(archive: IO[bytes], corpus: Corpus) -> list[Pair]:
    """Return all pairs of an archive, as they are there."""
    try:
        german, english = (text.decode().removesuffix("\n").split("\n") for text in corpus.texts(archive))
    except InvalidInput:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"not the archive expected, or damaged: {error}") from error
    if len(german) != len(english):
        raise InvalidInput(f"{len(german)} German and {len(english)} English lines; expected as many")
    return list(zip(german, english, strict=True))


def fetched(corpus: Corpus, origins: Sequence[str] = ()) -> list[Pair]:
    """Return the pairs of the first origin that has a whole archive."""
    failures = []
    for origin in origins or corpus.origins:
        with tempfile.TemporaryFile() as archive:
            try:
                download(origin, archive)
                return unpacked(archive, corpus)
            except (OSError, ValueError, HTTPException) as error:
                failures.append(f"{origin}: {error}")
    raise InvalidInput(
        f"no archive could be fetched ({'; '.join(failures)}); check the network, or fetch it by hand "
        "and pass it with --origin FILE"
    )


def cleaned(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that are such as the shipped ones, once each."""
    spaced = [(" ".join(german.split()), " ".join(english.split())) for german, english in pairs]
    return [pair for pair in dict.fromkeys(spaced) if fit(*pair)]


def fit(german: str, english: str) -> bool:
    short, long = sorted((len(german), len(english)))
    sides = (german, english)
    return (
        german != english
        and long <= 3 * short + 20
        and all(re.search(r"[^\W\d_]", side) and len(side.split()) <= LONGEST for side in sides)
    )


def apart(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs that resemble no shipped pair of validation or test."""
    held = [libreoffice(split) for split in ("validation", "test")]
    others = [pair for some in held for pair in zip(some.german, some.english, strict=True)]
    languages = [sets([pair[side] for pair in (*pairs, *others)]) for side in (0, 1)]
    free = unlike(np.arange(len(pairs)), np.arange(len(pairs), len(pairs) + len(others)), languages)
    return [pair for pair, kept in zip(pairs, free, strict=True) if kept]


def fetch(name: str, folder: Path, origins: Sequence[str] = ()) -> Path:
    """Put a corpus into a folder, and return its file; a file that is there already is not fetched.

    Raises:
        InvalidInput: no origin has it, or nothing of it is left.
        OSError: the folder cannot be written to; no part of a file is left there.
    """
    target = folder / f"{name}.de-en.tsv.gz"
    if target.exists():
        print(f"{target} is there already")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    found = fetched(CORPORA[name], origins)
    clean = cleaned(found)
    pairs = apart(clean) if clean else []
    if not pairs:
        raise InvalidInput(f"{name} has {len(found)} pairs, and none of use; is it the corpus that was meant?")
    write(target, pairs)
    print(f"{target}: {len(pairs)} of {len(found)} pairs; {len(clean) - len(pairs)} resemble a held-out one")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=CORPORA, metavar="NAME", help=", ".join(CORPORA))
    parser.add_argument("--folder", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--origin", help="another address of the one corpus named, or its archive")
    arguments = parser.parse_args()
    origins = []
    if arguments.origin:
        if len(arguments.names) > 1:
            parser.error(f"--origin was given with {len(arguments.names)} corpora; expected one")
        given = Path(arguments.origin)
        origins = [given.resolve().as_uri() if given.exists() else arguments.origin]
    for name in arguments.names:
        try:
            fetch(name, arguments.folder, origins)
        except (InvalidInput, OSError) as error:
            raise SystemExit(f"{name}: {error}") from error


if __name__ == "__main__":
    main()
