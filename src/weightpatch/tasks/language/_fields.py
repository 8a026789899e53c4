"""Checked access to the keys of one record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from weightpatch.errors import InvalidInput


@final
class Fields:
    """One record, or a part of one, that says which key is not as expected.

    Args:
        record: what the file holds.
        where: names it in errors.
    """

    def __init__(self, record: Any, where: str) -> None:
        if not isinstance(record, Mapping):
            raise InvalidInput(f"{where} is {record!r:.60}; expected an object with keys")
        self.record, self.where = record, where

    def __contains__(self, key: str) -> bool:
        return self.record.get(key) is not None

    def part(self, key: str) -> Fields:
        """Return the object at a key."""
        return Fields(self._there(key, "an object with keys"), f"{self.where}: {key}")

    def text(self, key: str) -> str:
        """Return the text at a key."""
        value = self._there(key, "text")
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return the texts at a key: one, several, or several with their aliases; none where the key is not there."""
        value = self.record.get(key)
        found = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(found, list):
            raise self.wrong(key, "text or a list of texts")
        flat = [alias for item in found for alias in (item if isinstance(item, list) else [item])]
        if not all(isinstance(item, str) for item in flat):
            raise self.wrong(key, "text or a list of texts")
        return tuple(flat)

    def id(self, key: str) -> int | str | None:
        """Return a number or a name, None where the key is not there."""
        value = self.record.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, str))):
            raise self.wrong(key, "a whole number or text")
        return value

    def rest(self, *known: str) -> dict[str, Any]:
        """Return all other keys with their values."""
        return {key: value for key, value in self.record.items() if key not in known}

    def wrong(self, key: str, expected: str) -> InvalidInput:
        """Return the error that says what is at a key, and what was expected."""
        if key not in self.record:
            return InvalidInput(f"{self.where}: {key} is missing; expected {expected}")
        return InvalidInput(f"{self.where}: {key} is {self.record[key]!r:.60}; expected {expected}")

    def _there(self, key: str, expected: str) -> Any:
        if key not in self.record:
            raise self.wrong(key, expected)
        return self.record[key]
