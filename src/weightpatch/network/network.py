"""A private view of a user's network with some parameters free to move."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._calling import Function, Inputs, Params
from ..errors import InvalidInput, ShapeMismatch
from .clone import structural_clone
from .isolation import isolated
from .live import arguments
from .passes import Recording
from .recordings import Mark, marked, unchanged
from .replay import Call, Replayer
from .scope import select
from .slots import given
from .tree import flatten_call

__all__ = ["Network"]

_GIVEN = 4  # batches whose inputs of a layer are kept


class Network:
    """A private eval-mode view of a model, some of whose parameters are free to move; the model is never touched.

    The view shares the model's weights, so that the model must not be trained while it is in use. Passes on a batch
    that was seen before replay what cannot depend on the free parameters; the answers are those of a full pass.

    Args:
        model: any eager module, in any mode.
        parameters: which parameters may move, as globs of their names.
        replay: record and replay; full passes otherwise.

    Attributes:
        names: the free parameters, by their first names, in the model's order.
        start: detached copies of them, float32 where the model is float16 or bfloat16.

    Raises:
        InvalidInput: not a model, or no parameter matches.
        NotEditable: the model, or every parameter that matches, is of a kind that cannot be edited.
    """

    def __init__(self, model: nn.Module, parameters: str | Sequence[str] = "*", *, replay: bool = True) -> None:
        clone = structural_clone(model)
        self._source, self._replay, self._narrowed = model, replay, dict[tuple[str, ...], Network]()
        self.names = select(model, parameters)
        own = dict(clone.named_parameters())
        with torch.inference_mode(False), torch.no_grad():
            rounded = {name: own[name].detach().clone() for name in self.names}
            self.start: Params = {name: value.to(_master(value.dtype)) for name, value in rounded.items()}
        self._source_start = self.start
        self._dtypes = {name: value.dtype for name, value in rounded.items()}
        self._casts = any(self._dtypes[name] != value.dtype for name, value in self.start.items())
        self._first = next(iter(own.items()))
        self._replayer = Replayer(clone, rounded, replay=replay)
        self._weights = self._replayer.shared
        self._versions = _versions(self._weights)
        self._given: dict[str, list[tuple[list[Mark], list[Any], Tensor]]] = {}
        self._normal: list[tuple[weakref.ref[Tensor], Tensor]] = []
        self._before = self.at(self.start)

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        return f"Network({len(self.names)} free parameters: {shown})"

    @property
    def device(self) -> torch.device:
        """Where the free parameters are."""
        return self.start[self.names[0]].device

    @property
    def first_weight(self) -> tuple[str, Tensor]:
        """The model's first parameter and its name, for messages."""
        return self._first

    @property
    def before(self) -> Function:
        """The unedited model: `at(start)`."""
        self._check_unchanged()
        return self._before

    @property
    def full_passes_because(self) -> str:
        """Why nothing is replayed; empty where it is."""
        return self._replayer.full_passes_because

    def at(self, params: Params) -> Function:
        """Return the model with these parameters, cast to its own dtypes; differentiable in them."""
        return self._function(params, self._replayer)

    def full(self, params: Params) -> Function:
        """Return the same function as `at`, by full passes: the reference that replays are held to."""
        return self._function(params, self._replayer.full)

    def deployed(self, params: Params) -> nn.Module:
        """Return a module of the model's own class that has these parameters, in evaluation mode; it shares the others.

        Args:
            params: all free parameters.
        """
        self._check(params)
        clone = structural_clone(self._source)
        for name, value in self.rounded(params).items():
            clone.get_parameter(name).data = value
        return clone

    def restarted(self, params: Params) -> Network:
        """Return the same view with other parameters to start from; what is recorded serves both.

        Args:
            params: all free parameters.
        """
        self._check(params)
        view = copy.copy(self)
        view.start = {name: value.detach().to(self.start[name].dtype) for name, value in params.items()}
        view._before, view._given = view.at(view.start), {}
        return view

    def narrow(self, names: Sequence[str]) -> Callable[[Params], Function]:
        """Return `at` for some of the free parameters alone, the others being as in `start`: passes replay more.

        Args:
            names: those that are given.
        """
        moved = [n for n in self.names if n not in names and not torch.equal(self.start[n], self._source_start[n])]
        key = tuple(name for name in self.names if name in names or name in moved)
        if key == tuple(self.names):
            whole: Callable[[Params], Function] = lambda params: self.at({**self.start, **params})  # noqa: E731
            return whole
        if key not in self._narrowed:
            self._narrowed[key] = Network(self._source, [escape(name) for name in key], replay=self._replay)
        network, fixed = self._narrowed[key], {name: self.start[name] for name in moved}
        return lambda params: network.at({**fixed, **params})

    def rounded(self, params: Params) -> Params:
        """Return detached copies of parameters in the model's own dtypes."""
        return {name: value.detach().clone().to(self._dtypes[name]) for name, value in params.items()}

    def record(self, inputs: Inputs) -> Recording:
        """Run the unedited model on one batch and keep what `run` needs; `nbytes` says how much memory that takes.

        The recording's `output` is the unedited model's answer; the inputs are kept and must not be changed.
        """
        self._check_unchanged()
        args, kwargs = self._normalized(*arguments(inputs))
        with _outside_inference(), torch.no_grad():
            output, recording = self._replayer.record(self._cast(self.start), (args, kwargs))
        recording.inputs = (args, kwargs)
        recording.versions = _versions(pytree.tree_leaves((args, kwargs)))
        recording.output = output
        return recording

    def run(self, params: Params, recording: Recording) -> Any:
        """Return the model's answer on a recorded batch with these parameters, differentiable in them."""
        self._check(params)
        if recording.inputs is None or recording.versions != _versions(pytree.tree_leaves(recording.inputs)):
            raise InvalidInput("the inputs of the recording were changed in place since; record them again")
        with _outside_inference():
            return self._replayer.replay(self._cast(params), recording, recording.inputs)

    def given(self, layer: str, inputs: Inputs) -> Tensor:
        """Return what a layer with slots is given by the unedited model, (n, width); kept for a few batches.

        Args:
            layer: its name.
            inputs: one batch.
        """
        tensors, rest, alike = flatten_call(*arguments(inputs))
        known = self._given.setdefault(layer, [])
        for marks, structure, found in known:
            if alike and structure == rest and unchanged(marks, tensors):
                return found
        found = given(self.before, layer, inputs)
        if alike:  # what else is in a batch, such as an array, has no version
            self._given[layer] = [*known, (marked(tensors), rest, found)][-_GIVEN:]
        return found

    def isolated(self) -> AbstractContextManager[None]:
        """Surround a search: gradients on, inference mode off, and random generators put back at the end."""
        return isolated(self.device)

    def _function(self, params: Params, run: Any) -> Function:
        self._check(params)

        def function(*args: Any, **kwargs: Any) -> Any:  # no call of itself: such a cycle would keep the parameters
            with _outside_inference() if torch.is_inference_mode_enabled() else nullcontext():
                args, kwargs = self._normalized(args, kwargs)
                return run(self._cast(params), args, kwargs)

        return function

    def _cast(self, params: Params) -> Params:
        return {name: value.to(self._dtypes[name]) for name, value in params.items()} if self._casts else params

    def _normalized(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Replace tensors made in inference mode, which autograd refuses, by copies: one for one."""
        leaves: Any = (*args, *kwargs.values())
        if any(isinstance(leaf, (tuple, list, dict)) for leaf in leaves):
            leaves = pytree.tree_leaves(leaves)
        if not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves):
            return args, kwargs
        made: Call = pytree.tree_map_only(Tensor, self._copy_of, (args, kwargs))
        return made

    def _copy_of(self, tensor: Tensor) -> Tensor:
        if not tensor.is_inference():
            return tensor
        for ref, copied in self._normal:
            if ref() is tensor and torch.equal(copied, tensor):
                return copied
        copied = tensor.clone()
        known = [(ref, kept) for ref, kept in self._normal if ref() is not None and ref() is not tensor]
        self._normal = [*known, (weakref.ref(tensor), copied)][-16:]
        return copied

    def _check(self, params: Params) -> None:
        if params.keys() != self.start.keys():
            odd = sorted(set(params) ^ set(self.start))
            raise InvalidInput(
                f"the parameters differ from the {len(self.names)} of network.names in {odd[:5]}; pass all of those"
            )
        for name, value in params.items():
            if value.shape != self.start[name].shape:
                raise ShapeMismatch(f"{name} has shape {tuple(value.shape)}; expected {tuple(self.start[name].shape)}")
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if _versions(self._weights) != self._versions:
            if len(self._weights) != len(self._replayer.shared):  # passes write to a weight: the clone now has its own
                self._weights = self._replayer.shared
                self._versions = _versions(self._weights)
                return
            raise InvalidInput("the model's weights were changed since this Network was made; make a new one")


def _master(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _versions(tensors: Sequence[Any]) -> int:
    return sum(tensor._version for tensor in tensors if isinstance(tensor, Tensor))


def _outside_inference() -> AbstractContextManager[Any]:
    """Leave the caller's inference mode, keeping gradients off as he asked."""
    stack = ExitStack()
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
    return stack
