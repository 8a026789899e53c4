"""A private copy of a model's structure: own modules, shared weights, nothing of the user's is changed."""

from __future__ import annotations

import copy
import copyreg
import types
import weakref
from collections import ChainMap, OrderedDict
from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize

from ..errors import InvalidInput, NotEditable

__all__ = ["structural_clone"]

_WRAPPERS = {
    "OptimizedModule": "it is the result of torch.compile; pass the original module (compiled._orig_mod)",
    "DataParallel": "it is wrapped in DataParallel; pass the module inside (model.module)",
    "DistributedDataParallel": "it is wrapped in DistributedDataParallel; pass the module inside (model.module)",
    "FullyShardedDataParallel": "it is wrapped in FullyShardedDataParallel; gather the weights and pass a plain module",
    "ScriptModule": "it is TorchScript; pass the eager module it was made from",
}
_TENSORS = {
    "FakeTensor": "is a fake tensor without values; load real weights first",
    "DTensor": "is a distributed tensor; gather it with full_tensor() first",
}
_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, range, slice, torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format, types.ModuleType, types.BuiltinFunctionType, types.CodeType,
)  # fmt: skip
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def structural_clone(model: nn.Module) -> nn.Module:
    """Copy a model's modules, not its weights, and put the copy in eval mode.

    Parameters become own objects that share the storage of the originals and need no gradient, ties included; buffers
    and other tensors are copied. Forward hooks are kept, since they may be part of the function, backward hooks are
    not; methods, closures and attributes that refer to the model's modules refer to their copies. What cannot be copied
    (locks, open files) is shared. The eval mode is set without calling `train`, which some modules use to merge
    weights in place.

    Raises:
        InvalidInput: not a torch module.
        NotEditable: the model is compiled, scripted, wrapped for data parallelism, or has tensors without values.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"the model is {type(model).__name__}; expected a torch.nn.Module")
    _refuse(model)
    with torch.inference_mode(False), torch.no_grad():
        clone: nn.Module = _Copier(model).copy(model)
    for module in clone.modules():
        module.__dict__["training"] = False
        module.__dict__.update({name: OrderedDict() for name in _BACKWARD_HOOKS}, _is_full_backward_hook=None)
    return clone


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS and (kind.__module__ or "").startswith("torch."):
                where = f"its part {name!r}" if name else "the model"
                raise NotEditable(f"{where} is {type(module).__name__}: {_WRAPPERS[kind.__name__]}")
    tensors = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in tensors:
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise NotEditable(f"{name} has no shape yet; run the lazy model once on real inputs first")
        for kind in type(tensor).__mro__:
            if kind.__name__ in _TENSORS:
                raise NotEditable(f"{name} {_TENSORS[kind.__name__]}")
        if tensor.is_meta:
            raise NotEditable(f"{name} is on the meta device, without values; load real weights first")


class _Copier:
    """One walk over a model; `memo` maps what was met to its copy, as in `copy.deepcopy`."""

    def __init__(self, model: nn.Module) -> None:
        self.memo: MutableMapping[int, Any] = {}
        self.met: list[Any] = []  # what is in memo by its id has to stay alive
        for tensor in (*model.parameters(), *model.buffers()):
            self.copy(tensor)

    def copy(self, value: Any) -> Any:
        if isinstance(value, _ATOMS):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, Tensor):
            return self._note(value, _parameter(value) if isinstance(value, nn.Parameter) else value.detach().clone())
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, weakref.ref):
            target = value()
            return weakref.ref(self.copy(target)) if isinstance(target, (nn.Module, Tensor)) else value
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self._note(value, types.MethodType(self.copy(value.__func__), self.copy(value.__self__)))
        if type(value) is partial:
            made = partial(self.copy(value.func), *map(self.copy, value.args), **self._items(value.keywords))
            made.__dict__.update(self._items(vars(value)))
            return self._note(value, made)
        if isinstance(value, torch.Generator):
            return self._note(value, value.clone_state())
        return self._container(value)

    def _note(self, value: Any, made: Any) -> Any:
        self.met.append(value)
        self.memo[id(value)] = made
        return made

    def _items(self, items: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: self.copy(item) for key, item in items.items()}

    def _container(self, value: Any) -> Any:
        if type(value) in (dict, OrderedDict):
            made = self._note(value, type(value)())
            made.update(self._items(value))
            return made
        if type(value) is list:
            made = self._note(value, [])
            made.extend(map(self.copy, value))
            return made
        if type(value) in (tuple, set, frozenset):
            return self._note(value, type(value)(map(self.copy, value)))
        return self._object(value)

    def _module(self, module: nn.Module) -> nn.Module:
        kind = type(module)
        if hasattr(kind, "__deepcopy__") and not parametrize.is_parametrized(module):
            copied = self._deepcopy(module)
            if copied is None:
                raise NotEditable(f"a module of type {kind.__name__} refuses to be copied by its own __deepcopy__")
            return copied  # type: ignore[no-any-return]
        made: nn.Module = self._note(module, kind.__new__(kind))
        made.__dict__.update(self._items({k: v for k, v in vars(module).items() if k != "_compiled_call_impl"}))
        for slot in copyreg._slotnames(kind):  # type: ignore[attr-defined]
            if hasattr(module, slot):
                setattr(made, slot, self.copy(getattr(module, slot)))
        return made

    def _object(self, value: Any) -> Any:
        kind: Any = type(value)
        usual = all(getattr(kind, name) is getattr(object, name) for name in ("__new__", "__reduce__", "__reduce_ex__"))
        own = any(hasattr(kind, name) for name in ("__deepcopy__", "__setstate__", "__slots__"))
        if usual and not own and hasattr(value, "__dict__"):
            made = self._note(value, object.__new__(kind))
            made.__dict__.update(self._items(vars(value)))
            return made
        copied = self._deepcopy(value)
        return self._note(value, value) if copied is None else copied

    def _deepcopy(self, value: Any) -> Any:
        """Let an object copy itself; None where it cannot, with nothing half-copied left in the memo."""
        trial: ChainMap[int, Any] = ChainMap({}, self.memo)
        try:
            made = copy.deepcopy(value, trial)  # type: ignore[arg-type]
        except Exception:
            return None
        self.memo.update({key: item for key, item in trial.maps[0].items() if key != id(trial)})
        self.met.append(trial.maps[0].get(id(trial)))
        return self._note(value, made)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = function.__closure__ or ()
        if not any(_refers(cell, 3) for cell in cells):
            return function
        own = tuple(types.CellType() if _refers(cell, 3) else cell for cell in cells)
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, own
        )
        made.__kwdefaults__ = function.__kwdefaults__
        self._note(function, made)
        made.__dict__.update(self._items(vars(function)))
        for cell, mine in zip(cells, own, strict=True):
            if mine is not cell:
                mine.cell_contents = self.copy(cell.cell_contents)
        return made


def _parameter(parameter: nn.Parameter) -> nn.Parameter:
    if not (parameter.is_floating_point() or parameter.is_complex()) and type(parameter) is not nn.Parameter:
        return parameter  # a quantiser's own kind of parameter; it is never edited
    values = parameter.clone() if parameter.is_inference() else parameter.detach()
    made = nn.Parameter(values, requires_grad=False)
    made.__dict__.update(vars(parameter))
    return made


def _refers(value: Any, depth: int) -> bool:
    """Say whether something that a function closes over leads to a module or a parameter."""
    if isinstance(value, types.CellType):
        try:
            value = value.cell_contents
        except ValueError:  # still empty
            return False
    if isinstance(value, (nn.Module, nn.Parameter)):
        return True
    if depth == 0:
        return False
    if isinstance(value, types.MethodType):
        return _refers(value.__self__, depth - 1)
    if isinstance(value, types.FunctionType):
        return any(_refers(cell, depth - 1) for cell in value.__closure__ or ())
    if isinstance(value, partial):
        return any(_refers(part, depth - 1) for part in (value.func, *value.args, *value.keywords.values()))
    if type(value) in (list, tuple, dict):
        return any(_refers(part, depth - 1) for part in (value.values() if isinstance(value, dict) else value))
    return False
