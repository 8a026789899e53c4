"""What tells one value from another by its content: settings, tensors and functions, for runs that are continued."""

from __future__ import annotations

import copyreg
import dataclasses
import dis
import functools
import hashlib
import inspect
import math
import sys
import types
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from .errors import NotEditable
from .patches import fingerprint

__all__ = ["UNKNOWN", "UnidentifiedError", "different", "digest", "identity"]

UNKNOWN: Final = "cannot be told apart"  # the key under which `identity` says why

_SHOWN = 100  # characters of a text that is shown as it is
_LISTED = 256  # items of a list or mapping that are told apart one by one
_HEX = 16  # digits that are shown of a digest
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, PurePath)
_INSTALLED = ("site-packages", "dist-packages")
_KNOWN = {__name__.partition(".")[0], "torch", "numpy", *sys.stdlib_module_names} - {"__main__"}


class UnidentifiedError(Exception):
    """A value holds something that its content does not identify."""


def identity(value: Any, *, whole: bool = False) -> Any:
    """Return plain JSON values that are the same for the same content, in any process, and for no other.

    A value that holds what content does not identify (a generator, an open file) is the same as none, not even itself.

    Args:
        value: anything.
        whole: by one digest; otherwise dataclasses, mappings, lists and tuples are told part by part, so that
            `different` can name the part.
    """
    try:
        return _named(type(value), of=value) if whole else _told(value)
    except UnidentifiedError as error:
        return {UNKNOWN: str(error)}


def different(path: str, there: Any, now: Any) -> list[str]:
    """Say what differs between two values that `identity` returned, and were written as JSON meanwhile.

    Args:
        path: what they are called.
        there: one, as it was written.
        now: the other.
    """
    for found in (there, now):
        if isinstance(found, Mapping) and UNKNOWN in found:
            return [f"{path} {UNKNOWN}, by its content, from what it was: it holds {found[UNKNOWN]}"]
    if isinstance(there, Mapping) and isinstance(now, Mapping) and there.keys() == now.keys():
        pairs = [(f"{path}.{key}" if path else key, there[key], now[key]) for key in now]
    elif isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(there, now, strict=True))]
    else:
        same = there == now and isinstance(there, bool) == isinstance(now, bool)
        return [] if same else [f"{path} is {_short(there)} there and {_short(now)} now"]
    return [line for pair in pairs for line in different(*pair)]


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's content, 64 hex digits.

    Tensors and arrays count by type, shape and bits; dataclasses by their fields, but for caches, which neither compare
    nor show; modules by weights and settings; other objects by what pickle would write. A function of one's own counts
    by its name, code, defaults and closure and by what it reads of its module; a class of one's own by its methods and
    attributes too; what is installed, by name.

    Raises:
        UnidentifiedError: it holds something that has no such content, as a generator or an open file.
    """
    return _Digests().of(value)


def _told(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, str) and len(value) <= _SHOWN:
        return value
    if _is_record(value):
        parts = {field.name: _told(getattr(value, field.name)) for field in _fields(value)}
        return {"is": _named(type(value)), **parts}
    if isinstance(value, (Enum, torch.dtype, torch.device, PurePath)):
        return str(value)
    if isinstance(value, Mapping) and len(value) <= _LISTED and all(isinstance(key, str) for key in value):
        return {key: _told(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and len(value) <= _LISTED:
        return [_told(item) for item in value]
    return _named(value if callable(value) and hasattr(value, "__qualname__") else type(value), of=value)


def _named(kind: Any, of: Any = None) -> str:
    """Name a value by its kind, and by a digest where the kind is not all there is to it."""
    name = getattr(kind, "__qualname__", repr(kind))
    plain = of is None and not _own(kind)
    return str(name) if plain else f"{name} {digest(kind if of is None else of)[:_HEX]}"


def _short(told: Any) -> str:
    if isinstance(told, Mapping) and "is" in told:
        return f"{told['is']}(...)"
    text = repr(told)
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN]}..."


class _Digests:
    """The digests of one value and all that it holds; what holds itself is named by its number."""

    def __init__(self) -> None:
        self._found: dict[int, str] = {}
        self._held: list[Any] = []  # so that no id is given twice

    def of(self, value: Any) -> str:
        if isinstance(value, _PLAIN) and not isinstance(value, Enum):
            return _hash(type(value).__name__, repr(value))
        if id(value) not in self._found:
            self._found[id(value)] = _hash("again", str(len(self._held)))
            self._held.append(value)
            self._found[id(value)] = self._whole(value)
        return self._found[id(value)]

    def all(self, values: Iterable[Any]) -> list[str]:
        return [self.of(value) for value in values]

    def _whole(self, value: Any) -> str:
        if isinstance(value, (Tensor, np.ndarray, nn.Module)):
            return self._numbers(value)
        if isinstance(value, Mapping):
            pairs = sorted(_hash(self.of(key), self.of(item)) for key, item in value.items())
            return _hash("mapping", *pairs)
        if isinstance(value, (set, frozenset)):
            return _hash("set", *sorted(self.all(value)))
        if isinstance(value, (list, tuple)) and type(value).__reduce_ex__ is object.__reduce_ex__:
            return _hash(type(value).__name__, *self.all(value))
        if isinstance(value, (types.ModuleType, type)):
            return self._class(value) if isinstance(value, type) else _hash("import", value.__name__)
        if _is_record(value):
            fields = {field.name: getattr(value, field.name) for field in _fields(value)}
            return _hash("record", self.of(type(value)), self.of(fields))
        return self._callable(value) or self._other(value)

    def _numbers(self, value: Tensor | np.ndarray[Any, Any] | nn.Module) -> str:
        try:
            if isinstance(value, Tensor):
                return _hash("tensor", fingerprint({"": value}))
            if isinstance(value, nn.Module):
                return _hash("module", self.of(type(value)), str(value), fingerprint(value))
        except NotEditable as error:
            raise UnidentifiedError(f"weights whose values cannot be read: {error}") from error
        if value.dtype.hasobject:
            return _hash("array", str(value.shape), self.of(value.tolist()))
        return _hash("array", str(value.dtype), str(value.shape), hashlib.sha256(value.tobytes()).hexdigest())

    def _callable(self, value: Any) -> str | None:
        if isinstance(value, functools.partial):
            return _hash("partial", *self.all((value.func, value.args, value.keywords)))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return _hash("method", *self.all((value.__func__, value.__self__)))
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, (property, classmethod, staticmethod, functools.cached_property)):
            names = ("fget", "fset", "fdel", "__func__", "func")
            return _hash(type(value).__name__, *self.all(getattr(value, name, None) for name in names))
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            return _hash("builtin", value.__qualname__, self.of(owner))
        if isinstance(value, (types.MethodDescriptorType, types.WrapperDescriptorType)):
            return _hash("builtin", value.__qualname__, self.of(value.__objclass__))
        return None

    def _function(self, value: types.FunctionType) -> str:
        if not _own(value):
            return _hash("function", value.__module__, value.__qualname__, self.of(_closed(value)))
        held = value.__defaults__, value.__kwdefaults__, _closed(value), _read(value.__code__, value.__globals__)
        return _hash("function", value.__qualname__, self.of(value.__code__), *self.all(held))

    def _code(self, value: types.CodeType) -> str:
        """Take what a function does: neither where it stands nor what it is called."""
        counts = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags
        names = value.co_names, value.co_varnames, value.co_freevars
        return _hash("code", *self.all((value.co_code, value.co_consts, value.co_exceptiontable, counts, names)))

    def _class(self, value: type) -> str:
        if not _own(value):
            return _hash("class", value.__module__, value.__qualname__)
        body = {name: part for name, part in vars(value).items() if not _is_machinery(name, part)}
        return _hash("class", value.__qualname__, self.of(list(value.__bases__)), self.of(body))

    def _other(self, value: Any) -> str:
        if callable(getattr(value, "get_vocab", None)):  # a tokenizer, whose state changes with every call
            return _hash("tokenizer", self.of(type(value)), self.of(value.get_vocab()))
        if isinstance(value, torch.Generator):
            return _hash("generator", self.of(value.get_state()))
        if callable(value) and hasattr(value, "__wrapped__"):
            return _hash("wrapped", self.of(type(value)), self.of(value.__wrapped__))
        try:
            known = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if known is None else known(value)
        except Exception as error:
            raise UnidentifiedError(
                f"{value!r:.80}, a {type(value).__qualname__} without content to compare"
            ) from error
        if isinstance(reduced, str):
            return _hash("global", type(value).__module__, reduced)
        parts = [list(part) if place in (3, 4) and part is not None else part for place, part in enumerate(reduced)]
        return _hash("object", self.of(type(value)), *self.all(parts))


def _hash(*parts: str) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        found.update(f"{len(data)} ".encode())
        found.update(data)
    return found.hexdigest()


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module))


def _fields(value: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(value) if field.compare or field.repr]


def _own(value: Any) -> bool:
    """Say whether a function or class is the user's: neither of Python, nor installed, nor of this package."""
    name = getattr(value, "__module__", None) or ""
    path = getattr(sys.modules.get(name), "__file__", None) or ""
    known = name.partition(".")[0] in _KNOWN
    return bool(name) and not known and not any(part in _INSTALLED for part in PurePath(path).parts)


def _closed(value: types.FunctionType) -> dict[str, Any]:
    """Return what a function has from around it, by name; what is not set yet is left out."""
    found = {}
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _read(code: types.CodeType, around: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a function, and those inside of it, may read of their module."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    found = {name: around[name] for name in names if name in around}
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            found |= _read(part, around)
    return found


def _is_machinery(name: str, part: Any) -> bool:
    """Say whether a class has this of Python, and not of who wrote it."""
    made = name in ("__dict__", "__weakref__", "__module__", "__doc__", "__firstlineno__", "__static_attributes__")
    made = made or name.startswith(("_abc_", "__annot", "__dataclass_", "__abstract")) or name == "__match_args__"
    return made or inspect.isgetsetdescriptor(part) or inspect.ismemberdescriptor(part)
