"""The configuration of a training run as a TOML file: every key with its meaning, its type and its default."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .. import editors
from ..editors import IterativeEditor
from ..errors import InvalidInput

__all__ = ["Block", "Curriculum", "TrainConfig", "read_config"]

_CHOICES = {
    "sampler": ("random", "mistakes", "rank-matched"),
    "optimiser": ("sgd", "adam"),
    "schedule": (None, "constant", "one-cycle"),
    "precision": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class Block:
    """The table `[block]`: an extra residual block before a linear layer, see `add_block`; by itself what edits move.

    Attributes:
        before: the name of the layer, such as fc.
        hidden: the width of the block's inner layer.
        kind: elu, the block of the paper, or sparse, fitted to the first 5,000 training images.
        lr: the block's own learning rate; that of the rest when not given.
    """

    before: str
    hidden: int = 4096
    kind: str = "elu"
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("elu", "sparse"):
            raise InvalidInput(f"block.kind is {self.kind!r}; expected elu or sparse")


@dataclass(frozen=True)
class Curriculum:
    """The table `[curriculum]`: k grows linearly from `start` to the editor's `max_steps` in `steps` training steps."""

    start: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What `weightpatch train` reads.

    Attributes:
        model: a factory, as package.module:factory.
        editor: the table `[editor]`: the class by its `name`, and its fields, such as `lr` and `max_steps`.
        weights: where the model starts, .safetensors or .pt; the factory's own when not given.
        data: training images: fashion-mnist, an .npz file, or a folder.
        mean: of the pixels, one number or one a channel; fashion-mnist has its own.
        std: of the pixels, one number or one a channel; fashion-mnist has its own.
        size: scale the pictures of a folder to this many pixels a side.
        augment: shift images by up to 2 pixels and mirror half of them.
        held_out: how many items, from the end of the data, are the validation split.
        parameters: which parameters edits may move, as globs of their names; by default those of the block, else all.
        c_edit: the weight of L_edit.
        c_loc: the weight of L_loc.
        c_gen: the weight of the generality term; needs `altered`.
        c_eval: the weight of the base loss in evaluation mode, for training from scratch with batch normalisation.
        learn: fields of the editor that are learned, one value a tensor.
        learn_lr: the learning rate of what is learned.
        distil: the base loss is KL to the outputs of the starting weights instead of cross-entropy to the labels.
        sampler: of edits: random, mistakes or rank-matched.
        margin: by how much the class of an edit must win, in logits.
        altered: ask edits for altered copies of their images in addition, and measure generality.
        edits: edits a step.
        epochs: passes over the data; either these or `steps`.
        steps: updates of the weights.
        batch_size: items a step.
        accumulate: backward passes a step.
        clip: the largest norm of the gradient.
        optimiser: sgd (Nesterov) or adam.
        lr: its learning rate; the highest one of a cycle.
        schedule: constant or one-cycle; by default one-cycle of sgd, and constant of adam.
        momentum: of sgd.
        weight_decay: of the model's weights.
        precision: float32, bfloat16 or float16.
        seed: of all randomness.
        block: a table with `before`, `hidden`, `kind` and `lr`: an extra residual block; none when not given.
        curriculum: a table with `start` and `steps`; none when not given.
        validation_edits: how many edits each validation tries.
        validate_every: steps.
        checkpoint_every: steps.
        patience: validations without a new best one until training ends; never when not given.
    """

    model: str
    editor: IterativeEditor
    weights: str | None = None
    data: str = "fashion-mnist"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: int | None = None
    augment: bool = True
    held_out: int = 5000
    parameters: tuple[str, ...] | None = None
    c_edit: float = 0.1
    c_loc: float = 0.1
    c_gen: float = 0.0
    c_eval: float = 0.0
    learn: tuple[str, ...] = ()
    learn_lr: float = 0.01
    distil: bool = False
    sampler: str = "random"
    margin: float = 0.0
    altered: bool = False
    edits: int = 4
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    clip: float = 10.0
    optimiser: str = "adam"
    lr: float = 1e-3
    schedule: str | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    precision: str = "float32"
    seed: int = 0
    block: Block | None = None
    curriculum: Curriculum | None = None
    validation_edits: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidInput(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(filter(None, choices))}"
                )
        if (self.epochs is None) == (self.steps is None):
            raise InvalidInput("expected either epochs or steps, not both")
        for name in ("held_out", "batch_size", "accumulate", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"{name} is {value}; expected at least 1")
        if self.c_gen and not self.altered:
            raise InvalidInput(f"c_gen is {self.c_gen}, but nothing is asked in addition; set altered = true")


def read_config(path: str | Path) -> TrainConfig:
    """Read a configuration.

    Raises:
        InvalidInput: not TOML, a key that does not exist or is missing, or a value of a wrong type or out of range.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as TOML: {error}") from error
    try:
        return _made(TrainConfig, content, "")  # type: ignore[no-any-return]
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def _made(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass from a table."""
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind) if field.init}
    for name in content:
        _check_known(name, tuple(known), where)
    missing = [n for n, f in known.items() if n not in content and f.default is f.default_factory is MISSING]
    if missing:
        raise InvalidInput(f"{_said(where)}{', '.join(missing)} is missing")
    return kind(**{name: _value(value, hints[name], f"{where}{name}") for name, value in content.items()})


def _value(value: Any, kind: Any, name: str) -> Any:
    """Check one value, and return it as the type that is asked for."""
    if get_origin(kind) is UnionType:
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if kind is IterativeEditor:
        return _editor(_expect(value, dict, "a table with a name", name))
    if kind in (Block, Curriculum):
        told = ", ".join(field.name for field in fields(kind))
        return _made(kind, _expect(value, dict, f"a table with {told}", name), f"{name}.")
    if get_origin(kind) is tuple:
        part = get_args(kind)[0]
        return tuple(_value(item, part, name) for item in (value if isinstance(value, list) else [value]))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and kind is not bool:
        raise InvalidInput(f"{name} is {value!r}; expected {kind.__name__}")
    return _expect(value, kind, kind.__name__, name)


def _editor(table: dict[str, Any]) -> IterativeEditor:
    """Build the editor: its class by name, every other key one of its fields."""
    found = {name: getattr(editors, name) for name in editors.__all__}
    kinds = {n: k for n, k in found.items() if isinstance(k, type) and issubclass(k, IterativeEditor)}
    kinds.pop("IterativeEditor")
    name = table.get("name")
    if name not in kinds:
        raise InvalidInput(f"editor.name is {name!r}; expected one of {', '.join(sorted(kinds))}")
    known = {field.name: field.default for field in fields(kinds[name])}
    settings = {}
    for key, value in table.items():
        if key != "name":
            _check_known(key, tuple(known), "editor.")
            kind = int if key == "max_steps" else bool if isinstance(known[key], bool) else float
            settings[key] = _value(value, kind, f"editor.{key}")
    try:
        return kinds[name](**settings)
    except TypeError as error:
        raise InvalidInput(f"editor: {error}") from error


def _expect(value: Any, kind: type, told: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise InvalidInput(f"{name} is {value!r}; expected {told}")
    return value


def _check_known(name: str, known: tuple[str, ...], where: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected some of {', '.join(known)}"
    raise InvalidInput(f"there is no key {where}{name}; {hint}")


def _said(where: str) -> str:
    return f"in {where.rstrip('.')}: " if where else ""
