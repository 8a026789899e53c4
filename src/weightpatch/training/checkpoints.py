"""Checkpoints that are whole or not there: written aside, synchronised, renamed; checked before they are read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from .._identity import different
from ..errors import InvalidInput

__all__ = ["Checkpoints", "write_whole"]

_MANIFEST = "manifest.json"
_PREFIX = "step-"


@final
@dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoints of one run, each a folder `step-<number>`.

    Args:
        folder: where they lie.
        run: what a run must share with a checkpoint to continue it: by name, what `identity` returns.
        newest: how many are kept.
    """

    folder: Path
    run: Mapping[str, Any]
    newest: int = 2

    def begin(self, step: int) -> Path:
        """Make the empty folder that a checkpoint is written into, and return it."""
        for left in self.folder.glob(".partial-*"):
            shutil.rmtree(left)
        self.partial(step).mkdir(parents=True)
        return self.partial(step)

    def partial(self, step: int) -> Path:
        """Return where a checkpoint is written."""
        return self.folder / f".partial-{step:09d}"

    def complete(self, step: int, facts: Mapping[str, Any]) -> None:
        """Make what was written a checkpoint, and remove the oldest ones.

        Args:
            step: its number.
            facts: plain JSON values that `find` hands back.
        """
        partial, whole = self.partial(step), self.folder / f"{_PREFIX}{step:09d}"
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        manifest = {"step": step, "run": dict(self.run), "facts": dict(facts), "files": files}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.iterdir(), partial):
            _synchronise(path)
        shutil.rmtree(whole, ignore_errors=True)
        os.replace(partial, whole)
        _synchronise(self.folder)
        for old in self._folders()[: -self.newest]:
            shutil.rmtree(old)

    def find(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest whole checkpoint and its facts; None where there is none.

        Raises:
            InvalidInput: it is of another run.
        """
        for path in reversed(self._folders()):
            manifest = _whole(path)
            if manifest is not None:
                self._check(path, manifest["run"])
                return path, {**manifest["facts"], "step": manifest["step"]}
            warnings.warn(f"{path} is damaged and is left out", stacklevel=2)
        return None

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}*"))

    def _check(self, path: Path, run: Mapping[str, Any]) -> None:
        names = sorted({*run, *self.run})
        told = [line for name in names for line in different(name, run.get(name), self.run.get(name))]
        if told:
            raise InvalidInput(
                f"{path} is a checkpoint of another run, which this one cannot continue: {'; '.join(told)}; "
                "use another folder, or the same configuration"
            )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write one file aside, synchronise it and rename it, so that it is whole or not there."""
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(partial)
        _synchronise(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _synchronise(path.parent)


def _whole(path: Path) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint all of whose files are as they were written."""
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        whole = all(_sha256(path / name) == digest for name, digest in manifest["files"].items())
        return manifest if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
