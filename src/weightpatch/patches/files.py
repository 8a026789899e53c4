"""Files that are written whole or not at all, and read without following links; needs no torch."""

import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import PatchError

Chunk = bytes | bytearray | memoryview


def write(path: str | os.PathLike[str], chunks: Iterable[Chunk]) -> None:
    """Put the chunks into the file, atomically and durably; on any error the old file stays as it was.

    A new file in the same folder is written, flushed to the disk and renamed over the old one, then the folder is
    flushed. The mode is what the umask leaves of 0666. A symbolic link is replaced, not followed. Raises `PatchError`.
    """
    path = Path(path)
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}"
    try:
        try:
            _fill(temporary, chunks)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise PatchError(
            f"cannot save {path}: {error.strerror or error}. What the file held before is unchanged, "
            "or already whole in its new form. Free space, or choose a folder that can be written to, and save again."
        ) from error


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[tuple[int, int]]:
    """An open regular file as (descriptor, size in bytes); links, folders, pipes and devices raise `PatchError`."""
    try:
        # O_NONBLOCK: opening a pipe must not wait for its other end
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PatchError(f"cannot read {os.fspath(path)}: it is not a regular file")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        link = " (symbolic links are not followed: give the file itself)" if Path(path).is_symlink() else ""
        raise PatchError(f"cannot read {os.fspath(path)}: {error.strerror or error}{link}") from error


def read(descriptor: int, size: int) -> bytearray:
    """The next `size` bytes, fewer only where the file ends before."""
    data = bytearray(size)
    filled = 0
    with memoryview(data) as view:
        while filled < size and (count := os.readv(descriptor, [view[filled:]])):
            filled += count
    del data[filled:]
    return data


def _fill(path: Path, chunks: Iterable[Chunk]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            with memoryview(chunk) as view:
                written = 0
                while written < len(view):
                    written += os.write(descriptor, view[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
