"""Taps: a copy of a model, of some of whose modules one can see inputs and outputs, and move the outputs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ..errors import InvalidInput
from .clone import structural_clone
from .linear import is_transposed

__all__ = ["Seen", "moved", "tapped", "with_taps"]

_SEEN: ContextVar[Seen | None] = ContextVar("seen by taps", default=None)


@final
class Seen:
    """What tapped modules were given and answered, over all calls of the passes inside of `tapped`.

    Rows are what comes before the last dimension: items, or items times positions.

    Args:
        added: what their outputs gain, by the module's name: (rows of all calls, out).

    Attributes:
        given: the first argument of each call where it is floating-point, (..., width), detached.
        answered: the output of each call, or the first item of it, (..., out), detached, as it was before it gained.
        transposed: the modules that keep their weight as (width, out), as the Conv1D of transformers does.
    """

    def __init__(self, added: Mapping[str, Tensor] | None = None) -> None:
        self.given: dict[str, list[Tensor]] = {}
        self.answered: dict[str, list[Tensor]] = {}
        self.transposed: set[str] = set()
        self._added, self._used = added or {}, dict[str, int]()

    def inputs(self, name: str) -> Tensor:
        """Return all that a module was given, (rows, width); no row where it was not called."""
        return _flat(self.given.get(name, []))

    def outputs(self, name: str) -> Tensor:
        """Return all that a module answered, (rows, out)."""
        return _flat(self.answered.get(name, []))

    def note(self, name: str, module: nn.Module, x: Tensor | None, y: Tensor) -> Tensor:
        """Note one call, and return what its output is to be."""
        if x is not None:
            self.given.setdefault(name, []).append(x.detach())
        self.answered.setdefault(name, []).append(y.detach())
        if is_transposed(module):
            self.transposed.add(name)
        added = self._added.get(name)
        if added is None:
            return y
        start, rows = self._used.get(name, 0), y.shape[:-1].numel()
        self._used[name] = start + rows
        part = added[start : start + rows]
        if len(part) != rows:
            raise InvalidInput(
                f"{name} is called on {start + rows} rows and more, and was called on {len(added)} before: the "
                "constraint calls the model otherwise from pass to pass; ask for a fixed set of inputs"
            )
        return y + part.to(y.dtype).view_as(y)


@contextmanager
def tapped(seen: Seen) -> Iterator[None]:
    """Note into `seen` what taps see inside of the block, and add to outputs what it adds."""
    token = _SEEN.set(seen)
    try:
        yield
    finally:
        _SEEN.reset(token)


def with_taps(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Return a structural clone with taps at some modules; it answers as the model does, bit for bit.

    A tap is a forward hook that does nothing outside of `tapped`. Neither parameters nor their names change.

    Args:
        model: any eager module.
        names: modules that answer a tensor (..., out), or a tuple that starts with one.

    Raises:
        InvalidInput: there is no such module.
    """
    clone = structural_clone(model)
    modules = dict(clone.named_modules(remove_duplicate=False))
    for name in names:
        if not name or name not in modules:
            near = difflib.get_close_matches(name, [key for key in modules if key], 3, 0.3) or list(modules)[-3:]
            raise InvalidInput(f"an editor asks for the module {name!r}; the model has {', '.join(near)} and others")
        modules[name].register_forward_hook(_Tap(name), with_kwargs=True)
    return clone


def moved(function: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    """Return the function, each call of which runs inside of `tapped`."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with tapped(seen):
            return function(*args, **kwargs)

    return inside


@final
@dataclass(frozen=True)
class _Tap:
    """A forward hook."""

    name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        seen = _SEEN.get()
        if seen is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()), None)
        rest = output[1:] if isinstance(output, tuple) and output else None
        y = output if rest is None else output[0]
        if not _floats(y):
            raise InvalidInput(f"{self.name} answers {_shown(y)}; expected floating-point numbers (..., out)")
        answer = seen.note(self.name, module, x if _floats(x) else None, y)
        return answer if rest is None else (answer, *rest)


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) if parts else torch.empty(0, 0, device="cpu")


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _shown(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
