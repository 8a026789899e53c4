"""Saving is all or nothing, whatever fails on the way."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch
from patch_cases import Net, patch_for

from weightpatch.errors import PatchError
from weightpatch.patches import Patch, files

CALLS = ("open", "write", "fsync", "close", "replace")


@pytest.fixture(scope="module")
def patches() -> tuple[Patch, Patch]:
    model = Net()
    return patch_for(model, 0, {"cube": "all", "gain": "all"}), patch_for(model, 1, {"head.bias": "few"})


def faults(monkeypatch, error, at, *, after):
    """The `at`-th system call of saving fails, before or after it has done its work; returns the calls made."""
    made = []

    def faulty(name, real):
        def call(*args, **kwargs):
            made.append(name)
            if len(made) - 1 != at:
                return real(*args, **kwargs)
            if after:
                real(*args, **kwargs)
            raise error

        return call

    for name in CALLS:
        monkeypatch.setattr(files.os, name, faulty(name, getattr(os, name)))
    return made


def count_calls(tmp_path, patch) -> int:
    with pytest.MonkeyPatch.context() as patcher:
        made = faults(patcher, None, -1, after=False)
        patch.save(tmp_path / "count")
    (tmp_path / "count").unlink()
    return len(made)


ERRORS = {
    "disk full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "disk broken": OSError(errno.EIO, os.strerror(errno.EIO)),
    "read-only": OSError(errno.EROFS, os.strerror(errno.EROFS)),
    "not permitted": OSError(errno.EACCES, os.strerror(errno.EACCES)),
    "interrupt": KeyboardInterrupt(),
    "no memory": MemoryError(),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize("existing", [False, True], ids=["new", "over"])
def test_a_fault_at_any_call_leaves_the_old_file_or_the_new_one(tmp_path, patches, error, after, existing):
    old, new = patches
    total = count_calls(tmp_path, new)
    assert total >= 8
    for at in range(total):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        path = folder / "a.patch.safetensors"
        if existing:
            old.save(path)
        with pytest.MonkeyPatch.context() as patcher:
            made = faults(patcher, error, at, after=after)
            expected = PatchError if isinstance(error, OSError) else type(error)
            with pytest.raises(expected, match="cannot save" if isinstance(error, OSError) else None):
                new.save(path)
        replaced = "replace" in made[:at] or (after and made[at] == "replace")
        assert [p.name for p in folder.iterdir() if p != path] == []
        if replaced:
            assert Patch.load(path) == new
        elif existing:
            assert Patch.load(path) == old
        else:
            assert not path.exists()


@pytest.mark.parametrize("short", [1, 7, 100])
def test_short_writes_are_continued(tmp_path, patches, monkeypatch, short):
    real = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: real(descriptor, bytes(data[:short])))
    patches[0].save(tmp_path / "a")
    assert Patch.load(tmp_path / "a") == patches[0]


def test_short_reads_are_continued(tmp_path, patches, monkeypatch):
    patches[0].save(tmp_path / "a")
    real = os.readv
    monkeypatch.setattr(files.os, "readv", lambda descriptor, buffers: real(descriptor, [buffers[0][:5]]))
    assert Patch.load(tmp_path / "a") == patches[0]


def test_a_read_error_is_a_patch_error(tmp_path, patches, monkeypatch):
    patches[0].save(tmp_path / "a")

    def broken(descriptor, buffers):
        raise ERRORS["disk broken"]

    monkeypatch.setattr(files.os, "readv", broken)
    with pytest.raises(PatchError, match="cannot read"):
        Patch.load(tmp_path / "a")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o000])
def test_the_mode_is_what_the_umask_leaves(tmp_path, patches, mask):
    before = os.umask(mask)
    try:
        patches[0].save(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_flushed_before_renamed_and_the_folder_after(tmp_path, patches, monkeypatch):
    made = faults(monkeypatch, None, -1, after=False)
    patches[0].save(tmp_path / "a")
    made = [name for name in made if name != "write"]
    assert made == ["open", "fsync", "close", "replace", "open", "fsync", "close"]


def test_a_link_is_replaced_and_its_target_kept(tmp_path, patches):
    patches[0].save(tmp_path / "target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    patches[1].save(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert Patch.load(tmp_path / "target") == patches[0]
    assert Patch.load(tmp_path / "link") == patches[1]


@pytest.mark.parametrize("where", ["nowhere/a", "file/a", "folder"])
def test_places_that_cannot_be_written(tmp_path, patches, where):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PatchError, match="cannot save"):
        patches[0].save(tmp_path / where)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_may_not_be_written(tmp_path, patches, monkeypatch):
    if os.geteuid() == 0:
        pytest.skip("the superuser may write everywhere")
    patches[0].save(path := tmp_path / "a")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(PatchError, match="Permission denied"):
            patches[1].save(path)
        assert Patch.load(path) == patches[0]
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_without_space(tmp_path, patches, monkeypatch):
    """A real ENOSPC from the kernel: what is opened for writing is /dev/full."""
    patches[0].save(path := tmp_path / "a")
    real = os.open
    monkeypatch.setattr(
        files.os,
        "open",
        lambda p, flags, *mode: real(
            "/dev/full" if flags & os.O_CREAT else p, os.O_WRONLY if flags & os.O_CREAT else flags
        ),
    )
    with pytest.raises(PatchError, match="No space left on device"):
        patches[1].save(path)
    monkeypatch.undo()
    assert Patch.load(path) == patches[0]


def test_a_file_size_limit_of_the_system(tmp_path):
    """A real EFBIG from the kernel, in a process of its own that may write no file of more than 4 kB."""
    code = """
import resource, signal, sys, torch
from weightpatch.errors import PatchError
from weightpatch.patches import Patch
base, path = {"w": torch.zeros(4000)}, sys.argv[1]
Patch.between(base, {"w": torch.zeros(4000).index_fill(0, torch.tensor([3]), 1)}, fingerprint="0" * 64).save(path)
large = Patch.between(base, {"w": torch.rand(4000)}, fingerprint="0" * 64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    large.save(path)
except PatchError as error:
    print(error)
Patch.load(path)
"""
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True)
    assert ran.stderr == ""
    assert "File too large" in ran.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_savers_at_the_same_time_do_not_mix(tmp_path, patches):
    path = tmp_path / "a"
    patches[0].save(path)
    stop = threading.Event()
    seen = set()

    def read():
        while not stop.is_set():
            seen.add(Patch.load(path).id)

    def save(patch):
        for _ in range(25):
            patch.save(path)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=save, args=(patch,)) for patch in patches]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert seen <= {patch.id for patch in patches}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_torch_is_not_disturbed(tmp_path, patches):
    state = torch.get_rng_state()
    patches[0].save(tmp_path / "a")
    Patch.load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
