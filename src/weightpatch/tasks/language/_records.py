"""Files of facts."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weightpatch.errors import InvalidInput
from weightpatch.tasks.language._facts import Fact
from weightpatch.tasks.language._fields import Fields
from weightpatch.tasks.language._formats import CounterFact, Format, KiltZsRE, KnowEdit, ZsRE

_FORMATS = (CounterFact(), ZsRE(), KiltZsRE(), KnowEdit())


def read(path: str | os.PathLike[str], format: Format | None = None) -> tuple[Fact, ...]:
    """Read the facts of a file: a JSON list of records, or one record a line.

    Args:
        path: of the file, UTF-8.
        format: how its records are read; by the keys of the first one when not given.

    Raises:
        InvalidInput: the file, or one of its records, is not as expected; the message names record and key.

    >>> write([Fact("Water is made of hydrogen and", "oxygen")], "facts.jsonl", ZsRE())
    >>> [fact.target for fact in read("facts.jsonl")]
    ['oxygen']
    """
    records = _records(Path(path))
    chosen = _detected(records, path) if format is None else format
    found = [chosen.fact(Fields(record, f"{path}: record {place}")) for place, record in enumerate(records)]
    facts = tuple(fact for fact in found if fact is not None)
    if len(facts) < len(found):
        warnings.warn(
            f"{path}: {len(found) - len(facts)} of {len(found)} records give no target and are left out",
            UserWarning,
            stacklevel=2,
        )
    return facts


def write(facts: Iterable[Fact], path: str | os.PathLike[str], format: Format) -> None:
    """Write facts so that `read` gives them again: one record a line where the name ends in ``.jsonl``, else a list.

    What a record said besides (`Fact.rest`) is written where the facts were read from the same format.

    Args:
        facts: all of them.
        path: of the file, which is overwritten.
        format: how a record stands for a fact.

    Raises:
        InvalidInput: the format cannot hold a fact; nothing is written then.
    """
    records = [format.record(fact) for fact in facts]
    if Path(path).suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        text = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    Path(path).write_text(text, encoding="utf-8")


def _records(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}; expected a UTF-8 file of JSON records") from error
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.lstrip().startswith("{"):
            raise InvalidInput(f"{path} is no JSON: {error}; expected a list of records, or one a line") from error
        return [_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if isinstance(found, dict) and any(form.fits(Fields(found, str(path))) for form in _FORMATS):
        return [found]  # a file of one line
    if not isinstance(found, list):
        keys = f" with the keys {', '.join(map(str, found))}"[:80] if isinstance(found, dict) else ""
        raise InvalidInput(f"{path} holds one {type(found).__name__}{keys}; expected a list of records, or one a line")
    return found


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{path}: line {number} is no JSON: {error}; expected one record a line") from error


def _detected(records: list[Any], path: str | os.PathLike[str]) -> Format:
    if not records:
        raise InvalidInput(f"{path} holds no record; expected at least one")
    first = Fields(records[0], f"{path}: record 0")
    for form in _FORMATS:
        if form.fits(first):
            return form
    raise InvalidInput(
        f"{path}: record 0 has the keys {', '.join(first.record)}, those of no known format; expected "
        "requested_rewrite (CounterFact), src and answers (ZsRE), alternatives and output (KiltZsRE), or prompt "
        "and target_new (KnowEdit)"
    )
