"""`weightpatch train`: Editable Training as a TOML file says."""

from __future__ import annotations

import json as plain_json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ._data import SHIPPED
from ._model import load_model
from ._output import Answer, console

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from ..tasks.images import LabelledImages
    from ..training import EditableObjective, Sampler, Trained, Validation
    from ..training.config import Block, TrainConfig


def train(
    config: Annotated[Path, tyro.conf.Positional],
    folder: Path | None = None,
    json: bool = False,
) -> Answer:
    """Train a model so that its mistakes can be patched in a few steps; a stopped run goes on when started again.

    Args:
        config: What to train, as a TOML file.
        folder: Where the run lies: checkpoints, history, model and result; runs/<name of the file> when not given.
        json: Print facts as JSON alone.
    """
    import torch

    from .._calling import check_classes
    from ..evaluation import predict
    from ..training import Accurate, EditableObjective, Items, Ramp, TrainSettings
    from ..training import train as run
    from ..training.config import read_config

    told = read_config(config)
    torch.manual_seed(told.seed)  # of the weights of an untrained model and of a new block
    folder = Path("runs") / config.stem if folder is None else folder
    model = load_model(told.model, None if told.weights is None else Path(told.weights))
    data, held = _split(told)
    began, out = time.monotonic(), console(json)
    options: dict[str, Any] = {"base_loss": _to_outputs} if told.distil else {}
    targets = predict(model, data.images) if told.distil else data.labels
    original = predict(model, held.images)
    for labels in (data.labels, held.labels):
        check_classes(labels, "train", original.shape[1])
    block = None if told.block is None else _add_block(told.block, model, data)
    objective = EditableObjective(
        model,
        told.editor,
        parameters=told.parameters or block or "*",
        c_edit=told.c_edit,
        c_loc=told.c_loc,
        c_gen=told.c_gen,
        c_eval=told.c_eval,
        learn=told.learn,
        **options,
    )
    settings = TrainSettings(
        steps=told.steps or (told.epochs or 1) * (len(data) // (told.batch_size * told.accumulate)),
        batch_size=told.batch_size,
        edits=told.edits,
        accumulate=told.accumulate,
        clip=told.clip,
        precision={"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[told.precision],
        seed=told.seed,
        k=None
        if told.curriculum is None
        else Ramp(told.curriculum.start, told.editor.max_steps, told.curriculum.steps),
        validate_every=told.validate_every,
        checkpoint_every=told.checkpoint_every,
        patience=told.patience,
    )
    found = run(
        objective,
        Items(data.images, targets, _augment(data) if told.augment else None),
        sampler=_sampler(told, data),
        settings=settings,
        folder=folder,
        optimiser=lambda objective: _optimiser(told, objective),
        schedule=(lambda made: _one_cycle(made, settings.steps)) if _cycles(told) else None,
        validation=_validation(told, held, original),
        criterion=None if any(objective.weights) else Accurate(),
        progress=not json,
    )
    facts = _facts(found)
    if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started, one speaks
        _write(folder, model, facts)
        _show(out, folder, facts, time.monotonic() - began)
    return Answer(facts)


def _split(told: TrainConfig) -> tuple[LabelledImages, LabelledImages]:
    """Load the training images, and take the last of them for validation."""
    from ..errors import InvalidInput
    from ..tasks import images

    if told.data == SHIPPED:
        data = images.fashion_mnist("train")
    else:
        mean, std = (values[0] if len(values) == 1 else values for values in (told.mean, told.std))
        data = images.load(told.data, split="train", size=told.size, mean=mean, std=std)
    if told.held_out + told.batch_size > len(data):
        raise InvalidInput(
            f"held_out is {told.held_out} and batch_size {told.batch_size}, of {len(data)} items; expected less in all"
        )
    return data[: -told.held_out], data[-told.held_out :]


def _add_block(told: Block, model: nn.Module, data: LabelledImages) -> str:
    from ..training import ResidualBlock, SparseBlock, add_block

    if told.kind == "elu":
        return add_block(model, told.before, told.hidden, kind=ResidualBlock)
    return add_block(model, told.before, told.hidden, kind=SparseBlock, reference=data.images[:5000])


def _sampler(told: TrainConfig, data: LabelledImages) -> Sampler:
    from ..training import Mistakes, RandomLabels, RankMatched

    altered = _altered if told.altered else None
    if told.sampler == "random":
        return RandomLabels(data.images, len(data.classes), altered, told.margin)
    kind = Mistakes if told.sampler == "mistakes" else RankMatched
    return kind(data.images, data.labels, altered, told.margin)


def _validation(told: TrainConfig, held: LabelledImages, original: Tensor) -> Validation:
    from .. import Locality
    from ..tasks import images
    from ..training import Validation

    return Validation(
        held.images,
        held.labels,
        _sampler(told, held),
        told.validation_edits,
        Locality(held.images[:256]) if told.editor.keep_weight else None,
        images.altered if told.altered else None,
        told.seed,
        original,
    )


def _optimiser(told: TrainConfig, objective: EditableObjective) -> torch.optim.Optimizer:
    """Give the block, and what is learned of the editor, learning rates of their own; the latter no weight decay."""
    import torch

    new = "" if told.block is None else f"{told.block.before}.block."
    named = list(objective.model.named_parameters())
    groups: list[dict[str, Any]] = [{"params": [p for name, p in named if not (new and name.startswith(new))]}]
    if told.block is not None:
        rate = told.lr if told.block.lr is None else told.block.lr
        groups.append({"params": [p for name, p in named if name.startswith(new)], "lr": rate})
    if objective.rates is not None:
        groups.append({"params": list(objective.rates.parameters()), "lr": told.learn_lr, "weight_decay": 0.0})
    if told.optimiser == "adam":
        return torch.optim.Adam(groups, lr=told.lr, weight_decay=told.weight_decay)
    return torch.optim.SGD(
        groups, lr=told.lr, momentum=told.momentum, nesterov=told.momentum > 0, weight_decay=told.weight_decay
    )


def _cycles(told: TrainConfig) -> bool:
    return (told.schedule or ("one-cycle" if told.optimiser == "sgd" else "constant")) == "one-cycle"


def _one_cycle(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    import torch

    highest = [group["lr"] for group in optimiser.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser, highest, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )


def _augment(data: LabelledImages) -> Any:
    """Return what moves and mirrors images; what comes in is black, the darkest value of each channel."""
    from ..tasks.images import shifted_and_flipped

    black = data.images.amin((0, 2, 3))

    def augment(inputs: Tensor, generator: Generator) -> Tensor:
        return shifted_and_flipped(inputs, generator, fill=black)

    return augment


def _altered(inputs: Any, generator: Generator) -> Any:
    from ..tasks import images

    return images.altered(inputs)


def _to_outputs(answer: Tensor, target: Tensor) -> Tensor:
    from ..likelihoods import Categorical, Of

    return Categorical(-1, Of.logits).divergence(target, answer).mean()


def _facts(found: Trained) -> dict[str, Any]:
    from dataclasses import asdict

    figures = {} if found.best is None else asdict(found.best)
    return {
        "validation": {name: value if value == value else None for name, value in figures.items()},
        "editor": repr(found.editor),
        "steps": found.step,
        "skipped": found.skipped,
        "seconds": found.seconds,
    }


def _write(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    from ..training.checkpoints import write_whole

    state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    write_whole(folder / "model.safetensors", lambda path: save_file(state, path))
    told = plain_json.dumps(facts, indent=1, allow_nan=False)
    write_whole(folder / "result.json", lambda path: path.write_text(f"{told}\n"))


def _show(out: Any, folder: Path, facts: dict[str, Any], seconds: float) -> None:
    from rich.table import Table

    units = {"base_error": " %", "drawdown": " pp", "drift": " nats", "base_drift": " nats"}
    table = Table(title=f"the best weights on the validation split, of {facts['steps']} steps")
    for heading in ("", "value"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in facts["validation"].items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:.4g}{units.get(name, '')}")
    out.print(table)
    out.print(f"model    {folder / 'model.safetensors'}\neditor   {facts['editor']}\ntook     {seconds:.1f} s")
