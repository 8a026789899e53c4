"""The file of a run that can be continued: a header line that says which run it is, then one line an edit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, final

from .._identity import different
from ..errors import InvalidInput

__all__ = ["Log"]


@final
class Log:
    """Lines of JSON, each on the disk before the next is begun; a last line that is half written is dropped.

    Args:
        path: the file, made with its folder where absent; None keeps the lines in memory alone.
        header: what identifies the run, as `identity` returns it; what the file says of other keys stays in `header`.

    Raises:
        InvalidInput: the file is of another run, or holds something else.
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]) -> None:
        self.header: dict[str, Any] = dict(header)
        self.lines: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        self._path = None if path is None else Path(path)
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise InvalidInput(f"{path} is not a results file of weightpatch ({error}); name another file") from error
        if not all(isinstance(line, dict) for line in lines):
            raise InvalidInput(f"{path} is not a results file of weightpatch; name another file")
        if content != whole:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        if lines:
            self._compare(path, lines[0])
            self.header, self.lines = lines[0], lines[1:]

    def _compare(self, path: Path, found: dict[str, Any]) -> None:
        told = [line for key, value in self.header.items() for line in different(key, found.get(key), value)]
        if told:
            raise InvalidInput(
                f"{path} holds the results of another run: {'; '.join(told)}. Name another file, or move this one away"
            )

    def start(self, **facts: Any) -> None:
        """Write the header with more facts, where the file does not have one yet; open the file for `append`."""
        if self._path is None:
            self.header = {**facts, **self.header}
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        if self._path.stat().st_size == 0:
            self.header = {**self.header, **facts}
            self._write(self.header)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line and hand it to the operating system."""
        self.lines.append(line)
        if self._file is not None:
            self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
