"""Plain values, as manifests hold them, checked; needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any

from ..errors import InvalidInput

LARGEST = 2**63 - 1
DEPTH = 16  # lists and objects inside one another
VALUES = 100_000  # strings, numbers, lists and objects in one field

_DIGEST = re.compile(r"[0-9a-f]{64}")


def check(fine: bool, what: str, given: object, wanted: str) -> None:
    """Refuse (`InvalidInput`) what is not fine, in one sentence."""
    if not fine:
        raise InvalidInput(f"{what} is {repr(given)[:300]}; expected {wanted}")


def check_name(name: object, what: str = "tensor name") -> None:
    """Refuse what no parameter or module is called: path-like, unprintable or very long names."""
    fine = isinstance(name, str) and 0 < len(name) <= 256 and name.isprintable() and not re.search(r"[/\\]", name)
    wanted = "1 to 256 printable characters, dots between non-empty parts, no slash"
    check(fine and all(str(name).split(".")), what, name, wanted)


def check_digest(what: str, value: object) -> None:
    """Refuse what is no SHA-256 in hexadecimal."""
    fine = isinstance(value, str) and _DIGEST.fullmatch(value) is not None
    check(fine, what, value, "a SHA-256 as 64 lower-case hex digits")


def check_ids(what: str, values: object, most: int) -> None:
    """Refuse what is no tuple of ids, each once, in rising order."""
    check(isinstance(values, tuple) and len(values) <= most, what, values, f"a tuple of at most {most} ids")
    assert isinstance(values, tuple)
    for value in values:
        check_digest(what, value)
    check(rising(values), what, values, "each id once, in rising order")


def check_text(what: str, value: object) -> None:
    """Refuse what is no text, or holds control characters, which could drive the terminal that shows them."""
    fine = isinstance(value, str) and all(c.isprintable() or c in "\n\t" for c in value)
    check(fine, what, value, "printable text")


def check_scalars(what: str, values: object) -> None:
    """Refuse what is no mapping of names to finite numbers or text."""
    check(isinstance(values, Mapping), what, values, "a mapping of names to numbers or text")
    assert isinstance(values, Mapping)
    for key, value in values.items():
        check_text(f"a name in {what}", key)
        check(isinstance(value, str | int | float), f"{what}[{key!r}]", value, "a finite number or text")
        _check_leaf(f"{what}[{key!r}]", value)


def check_json(what: str, values: object) -> None:
    """Refuse what is no dict of JSON values, or one that is too deep, too large, or holds what cannot be shown."""
    check(isinstance(values, dict), what, values, "a dict of names and JSON values")
    waiting, count = [(what, values, 1)], 1
    while waiting:
        where, value, depth = waiting.pop()
        if isinstance(value, dict | list):
            check(depth <= DEPTH, where, "deeper", f"at most {DEPTH} lists and dicts inside one another")
            count += len(value)  # before any of them is looked at: lists may hold one list many times
            check(count <= VALUES, what, "larger", f"at most {VALUES} values")
            for key in value if isinstance(value, dict) else ():
                check_text(f"a name in {where[:80]}", key)
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{where[:80]}[{str(key)[:80]!r}]", item, depth + 1) for key, item in pairs]
        elif value is not None:
            _check_leaf(where, value)


def copied(value: Any) -> Any:
    """Return a JSON value, checked before, in lists and dicts of its own."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def rising(values: Sequence[str]) -> bool:
    """Say whether each comes after the one before it, by code points."""
    return all(a < b for a, b in pairwise(values))


def fields(plain: object, names: Sequence[str], what: str) -> dict[str, Any]:
    """Return a JSON object that has these fields and no others."""
    if not isinstance(plain, dict) or set(plain) != set(names):
        found = sorted(map(str, plain)) if isinstance(plain, dict) else plain
        raise InvalidInput(f"{what} has the fields {found!r}"[:300] + f"; expected {sorted(names)}")
    return dict(plain)


def as_tuple(values: object, what: str) -> tuple[Any, ...]:
    """Return a JSON list as a tuple."""
    check(isinstance(values, list), what, values, "a list")
    assert isinstance(values, list)
    return tuple(values)


def _check_leaf(what: str, value: object) -> None:
    if isinstance(value, str):
        check_text(what, value)
    else:
        fine = abs(value) <= LARGEST if isinstance(value, int) else isinstance(value, float) and isfinite(value)
        check(fine, what, value, "a finite number or text")
