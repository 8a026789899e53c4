"""Patches on one set of weights, as values: what is on, what the weights become with one more or one less.

Nothing is written here, so a refusal leaves everything as it was. `applying` writes the outcome into a live model,
`weights` into a file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import BaseMismatch, NotEditable, PatchConflict, PatchDamaged
from .composition import Composer, Layer, Step, canonical, steps
from .hashing import combined, digest, digests, named_tensors, tied
from .manifest import Entry


@dataclass(frozen=True)
class State:
    """What patched weights remember.

    `root` holds the digests of all tensors of the base; `originals` the base values of the touched ones, each under its
    first name; `now` the digests of the touched ones as the patches left them, under all their names.
    """

    root: Mapping[str, str]
    layers: tuple[Layer, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    now: Mapping[str, str] = field(default_factory=dict)


Changed = tuple[State, dict[str, Tensor]]


def with_layer(tensors: Mapping[str, Tensor], state: State | None, layer: Layer) -> Changed:
    """(state, new values by first name) once one more patch is on.

    Raises `PatchConflict` where it is on already or lacks what it requires, `BaseMismatch` for other weights.
    """
    state = _checked(tensors, state)
    if any(layer.id == other.id for other in state.layers):
        raise PatchConflict(f"patch {layer.id[:12]} is applied already; revert it first to apply it again")
    check_base(layer, tensors, state.root)
    return _restacked(tensors, state, (*state.layers, layer), layer)


def without_layer(tensors: Mapping[str, Tensor], state: State | None, layer: Layer) -> Changed:
    """(state, new values by first name) once a patch is off.

    Raises `PatchConflict` where it is not on or another requires it, `BaseMismatch` where the weights have changed.
    """
    state = _checked(tensors, state)
    rest = tuple(other for other in state.layers if other.id != layer.id)
    if len(rest) == len(state.layers):
        have = ", ".join(other.id[:12] for other in rest) or "none"
        raise PatchConflict(f"patch {layer.id[:12]} is not applied here; applied are: {have}")
    if above := [other.id[:12] for other in rest if layer.id in other.manifest.requires]:
        raise PatchConflict(f"patch {layer.id[:12]} is required by {', '.join(above)}; revert these first")
    return _restacked(tensors, state, rest, layer)


def compose(base: Mapping[str, Tensor], patches: Iterable[Layer]) -> dict[str, Tensor]:
    """The base state dict with the patches on: touched tensors are new, all others are the same objects.

    The patches may come in any order. Raises `BaseMismatch` and `PatchConflict` as applying them to a model would, and
    `NotEditable` for patches with gates.
    """
    patches, tensors = tuple(patches), named_tensors(base)
    for patch in patches:
        check_gateless(patch)
    if len({patch.id for patch in patches}) != len(patches):
        raise PatchConflict("the same patch is given twice; give each once")
    root, first, layers = digests(tensors), tied(tensors), canonical(patches)
    for layer in layers:
        check_base(layer, tensors, root)
    values = {
        name: _composed(name, tensors[name], plan, layers, first).to(tensors[name].device)
        for name, plan in steps(layers, first).items()
    }
    return {name: values[first[name]] if first.get(name) in values else base[name] for name in base}


def check_gateless(layer: Layer) -> None:
    """Raise `NotEditable` for a patch with gates, which weights alone cannot hold."""
    if layer.gates:
        raise NotEditable(
            f"patch {layer.id[:12]} has gates (at {', '.join(map(repr, sorted(layer.gates)[:8]))}), which run with the "
            "model and cannot be written into its weights. Apply it to the live model: Patch.load(path).apply(model)"
        )


def check_base(layer: Layer, tensors: Mapping[str, Tensor], root: Mapping[str, str]) -> None:
    """Raise `BaseMismatch`, and say which tensors differ, where a patch was made for another base."""
    named = [(name, entry) for entry in layer.manifest.tensors for name in entry.names]
    wrong = [text for name, entry in named if (text := _difference(name, entry, layer, tensors, root))]
    if not wrong and combined(root) == layer.manifest.base:
        return
    what = "; ".join(wrong[:8]) or "the tensors that it changes may be the same, but others differ"
    raise BaseMismatch(
        f"patch {layer.id[:12]} was made for other weights than these: {what}. "
        "Load the weights it was made for, in their own type, or make the edit again on these"
    )


def _difference(name: str, entry: Entry, layer: Layer, tensors: Mapping[str, Tensor], root: Mapping[str, str]) -> str:
    if (tensor := tensors.get(name)) is None:
        return f"{name!r} is missing"
    if tuple(tensor.shape) != entry.shape:
        return f"{name!r} has shape {tuple(tensor.shape)}; expected {entry.shape}"
    if (dtype := str(tensor.dtype).removeprefix("torch.")) != entry.dtype:
        return f"{name!r} is {dtype}; expected {entry.dtype}"
    # A patch made after others saw their weights, not the base's; its digests are compared in `_composed`
    return f"{name!r} has other values" if not layer.manifest.requires and root[name] != entry.pre else ""


def _checked(tensors: Mapping[str, Tensor], state: State | None) -> State:
    found = digests(tensors)
    if state is None:
        return State(found)
    expected = {**state.root, **state.now}
    if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        raise BaseMismatch(
            f"weights have changed since patches were applied: {', '.join(map(repr, wrong[:8]))}"
            f"{' ...' if len(wrong) > 8 else ''} (by training, or by loading others?). "
            "Load the patched weights again, or the original ones into a new model"
        )
    return state


def _restacked(tensors: Mapping[str, Tensor], state: State, layers: Sequence[Layer], moved: Layer) -> Changed:
    """The state with these layers, and the values of the tensors that the `moved` one touches."""
    first, layers = tied(tensors), canonical(layers)
    plan = steps(layers, first)
    originals = {name: _kept(state, tensors, name) for name in plan}
    values = {
        name: _composed(name, originals[name], plan[name], (moved,), first) if name in plan else state.originals[name]
        for name in {first[name] for entry in moved.manifest.tensors for name in entry.names}
    }
    fresh = {name: digest(value) for name, value in values.items()}
    now = {alias: fresh.get(name) or state.now[alias] for alias, name in first.items() if name in plan}
    return State(state.root, layers, originals, now), values


def _kept(state: State, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    # A copy, for the state must not share memory with weights that are about to be written
    return state.originals[name] if name in state.originals else tensors[name].detach().cpu().clone()


def _composed(
    name: str, base: Tensor, plan: Sequence[Step], checked: Sequence[Layer], first: Mapping[str, str]
) -> Tensor:
    """The tensor with its whole plan, after comparing what each `checked` patch finds and leaves with its digests."""
    composer = Composer(name, base, plan)
    entries = {
        layer.id: entry
        for layer in checked
        for entry in layer.manifest.tensors
        if name in {first[own] for own in entry.names}
    }
    for step in plan:
        if entry := entries.get(step.id):
            if digest(composer.of(step.after)) != entry.pre:
                raise BaseMismatch(f"patch {step.id[:12]} was made for other values of {name!r} than these")
            if digest(composer.of(step.after | {step.id})) != entry.post:
                raise PatchDamaged(f"patch {step.id[:12]} does not make of {name!r} what it promises")
    return composer.of(frozenset(step.id for step in plan))
