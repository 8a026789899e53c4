"""The script that fetches more pairs, against a server on this machine: the real ones cannot be asked in a test."""

from __future__ import annotations

import errno
import gzip
import importlib
import io
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from weightpatch.errors import InvalidInput
from weightpatch.tasks.translation import libreoffice
from weightpatch.tasks.translation._pairs import SHIPPED

GERMAN = (
    "Wo ist\u00a0 der Bahnhof?",
    "Er trinkt Tee.",
    "Er trinkt Tee.",
    "",
    "123",
    "Tom",
    "Der Hund\u2028bellt laut.",
)
ENGLISH = ("Where is the station?", "He drinks tea.", "He drinks tea.", "Empty.", "123", "Tom", "The dog barks loudly.")
KEPT = [
    ("Wo ist der Bahnhof?", "Where is the station?"),
    ("Er trinkt Tee.", "He drinks tea."),
    ("Der Hund bellt laut.", "The dog barks loudly."),
]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    monkeypatch.setenv("no_proxy", "*")
    return importlib.import_module("fetch_pairs")


@pytest.fixture
def serve():
    """Return what serves some bytes, of an announced length, and gives their address."""
    served: dict[str, tuple[bytes, int]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in served:
                self.send_error(404)
                return
            content, length = served[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def add(content: bytes | None, length: int | None = None) -> str:
        path = f"/{len(served)}.zip"
        if content is not None:
            served[path] = (content, len(content) if length is None else length)
        return f"http://127.0.0.1:{server.server_port}{path}"

    yield add
    server.shutdown()
    thread.join()
    server.server_close()


def archive(german=GERMAN, english=ENGLISH, name="Tatoeba"):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("README", "about it")
        for language, lines in (("de", german), ("en", english)):
            file.writestr(f"{name}.de-en.{language}", "".join(f"{line}\n" for line in lines))
    return made.getvalue()


def talks(german: str, english: str) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as file:
        for language, text in (("de", german), ("en", english)):
            for name in (f"de-en/train.tags.de-en.{language}", f"de-en/IWSLT14.TED.dev2010.de-en.{language}.xml"):
                member = tarfile.TarInfo(name)
                member.size = len(text.encode())
                file.addfile(member, io.BytesIO(text.encode()))
    return made.getvalue()


def test_a_corpus_becomes_a_file_of_pairs(script, serve, tmp_path, capsys):
    path = script.fetch("tatoeba", tmp_path / "deep" / "folder", [serve(archive())])
    assert path == tmp_path / "deep" / "folder" / "tatoeba.de-en.tsv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()  # as `libreoffice` reads its own
    assert [tuple(line.split("\t")) for line in lines] == KEPT
    assert "3 of 7 pairs; 0 resemble" in capsys.readouterr().out
    script.fetch("tatoeba", path.parent, [])  # not fetched again
    assert list(path.parent.iterdir()) == [path]


def test_pairs_like_held_out_ones_are_left_out(script, serve, tmp_path):
    test, validation = libreoffice("test"), libreoffice("validation")
    german = (*GERMAN, test.german[0], "Ganz anders.", f"{validation.german[7]}!")
    english = (*ENGLISH, "Nothing like it.", f"{test.english[5]}", "Something else.")
    path = script.fetch("gnome", tmp_path, [serve(archive(german, english, "GNOME"))])
    assert importlib.import_module("translation_data").read(path) == KEPT


def test_the_shipped_pairs_are_clean_and_apart(script):
    for split in ("train", "validation", "test"):
        pairs = libreoffice(split)
        given = list(zip(pairs.german, pairs.english, strict=True))
        assert script.cleaned(given) == list(dict.fromkeys(given))
    train = libreoffice("train")[:2000]
    given = list(zip(train.german, train.english, strict=True))
    assert script.apart(given) == given
    assert script.apart([libreoffice("test")[3], *KEPT]) == KEPT


def test_talks_are_read_without_what_is_told_about_them(script, serve, tmp_path):
    german = "<url>a</url>\n<speaker>b</speaker>\n<title>Über Hunde</title>\nEr trinkt Tee.\n<talkid>1</talkid>\n"
    english = "<url>a</url>\n<title>About dogs</title>\n He drinks tea.\n<reviewer x='y'>c</reviewer>\n"
    path = script.fetch("iwslt14", tmp_path, [serve(talks(german, english))])
    found = importlib.import_module("translation_data").read(path)
    assert found == [("Über Hunde", "About dogs"), ("Er trinkt Tee.", "He drinks tea.")]


def test_the_next_origin_is_asked_where_one_fails(script, serve, tmp_path):
    whole = archive()
    origins = [serve(None), serve(b"<html>moved</html>"), serve(whole[:-30], len(whole)), serve(whole)]
    assert script.fetch("tatoeba", tmp_path, origins).exists()


def damaged(content: bytes) -> bytes:
    place = content.index(b"Bahnhof")
    return content[:place] + b"B" + content[place:].upper()[1:7] + content[place + 7 :]


@pytest.mark.parametrize(
    ("name", "content", "missing", "told"),
    [
        ("tatoeba", b"<html>moved</html>", 0, "not the archive expected, or damaged: File is not a zip file"),
        ("tatoeba", archive()[:200], 100, "200 bytes arrived of 300"),
        ("tatoeba", archive()[:200], 0, "damaged"),
        ("tatoeba", damaged(archive()), 0, "Bad CRC-32"),
        ("tatoeba", archive().replace(b".de-en.", b".fr-en."), 0, "0 German and 0 English texts among 3 files"),
        ("tatoeba", archive(GERMAN[:3]), 0, "3 German and 7 English lines"),
        ("tatoeba", archive(("Tom", "1"), ("Tom", "2")), 0, "2 pairs, and none of use"),
        ("tatoeba", b"", 0, "not a zip file"),
        ("iwslt14", archive(), 0, "damaged"),
        ("iwslt14", talks("a\nb", "a\nb")[:-9], 0, "damaged"),
        ("iwslt14", talks("a\nb\n", "a\n"), 0, "2 German and 1 English lines"),
    ],
    ids=[
        "page",
        "cut",
        "short",
        "damaged",
        "languages",
        "lines",
        "pairs",
        "empty",
        "kind",
        "cut talks",
        "lines of talks",
    ],
)
def test_what_is_not_the_corpus_is_refused(script, serve, tmp_path, name, content, missing, told):
    with pytest.raises(InvalidInput) as error:
        script.fetch(name, tmp_path, [serve(content, len(content) + missing)])
    assert told in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_archives_that_are_too_large_are_refused(script, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "LARGEST", 150)
    with pytest.raises(InvalidInput, match="more than 150 bytes"):
        script.fetch("tatoeba", tmp_path, [serve(archive())])
    with pytest.raises(InvalidInput, match="has 151 bytes; expected at most 150"):
        script.chosen({"a.de-en.de": 151, "a.de-en.en": 1})


def test_without_a_network_it_says_what_to_do(script, serve, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}/x"
    with pytest.raises(InvalidInput, match=r"/x: .*refused.*404.*unknown url type.*--origin FILE"):
        script.fetch("tatoeba", tmp_path, [closed, serve(None), "nowhere"])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_part_of_a_file(script, serve, tmp_path, monkeypatch):
    def half(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        script.fetch("tatoeba", tmp_path, [serve(archive())])
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_an_archive_from_the_disk(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.zip").write_bytes(archive())
    told = ["fetch_pairs.py", "kde4", "--folder", str(tmp_path / "out"), "--origin"]
    monkeypatch.setattr("sys.argv", [*told, str(tmp_path / "mine.zip")])
    script.main()
    assert (tmp_path / "out" / "kde4.de-en.tsv.gz").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["fetch_pairs.py", "gnome", "--folder", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="gnome: .*file"):
        script.main()
    monkeypatch.setattr("sys.argv", ["fetch_pairs.py", "gnome", *told[1:], "x"])
    with pytest.raises(SystemExit):
        script.main()
    assert "given with 2 corpora; expected one" in capsys.readouterr().err


def test_fetched_pairs_are_trained_on_too(script, serve, tmp_path):
    train = importlib.import_module("train_translator")
    path = script.fetch("tatoeba", tmp_path, [serve(archive())])
    plain = libreoffice("validation")
    assert train.joined(plain, []) is plain
    both = train.joined(plain, [path, path])
    assert len(both) == len(plain) + 6 and both[len(plain)] == KEPT[0] and both[0] == plain[0]


def test_pairs_are_written_as_the_shipped_ones(script, tmp_path):
    data = importlib.import_module("translation_data")
    pairs = data.read(SHIPPED / "validation.de-en.tsv.gz")
    data.write(tmp_path / "again.gz", pairs)
    assert data.read(tmp_path / "again.gz") == pairs
