"""The loop of Editable Training: it draws edits, validates, and goes on exactly where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from .._calling import Inputs
from .._identity import identity
from .._terminal import bar
from ..editors import IterativeEditor
from ..errors import InvalidInput, MissingExtra
from ..network import preserved_rng
from .checkpoints import Checkpoints, write_whole
from .curriculum import set_steps
from .items import Items, TrainingData
from .objective import EditableObjective
from .placing import placed
from .progress import History, told
from .samplers import Sampler
from .settings import TrainSettings
from .stepping import Stepper
from .validation import Figures, Frugal, Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Trained", "train"]

_SCHEDULE = "schedule.pt"

MakeOptimiser: TypeAlias = Callable[[EditableObjective], torch.optim.Optimizer]
MakeSchedule: TypeAlias = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
Criterion: TypeAlias = Callable[[Sequence[Figures]], int]


@final
@dataclass(frozen=True)
class Trained:
    """The outcome of a training run.

    Attributes:
        step: the number of the last step.
        best: the figures of the weights that the model has now; None where there was no validation.
        history: the figures of every validation, in order.
        editor: the editor with what was learned, as plain numbers.
        skipped: how many steps were skipped because a loss or gradient was NaN or infinite.
        seconds: how long it took, all parts of a run that was stopped together.
    """

    step: int
    best: Figures | None
    history: tuple[Figures, ...]
    editor: IterativeEditor
    skipped: int
    seconds: float


def train(
    objective: EditableObjective,
    data: TrainingData | tuple[Inputs, Tensor],
    *,
    sampler: Sampler,
    settings: TrainSettings,
    folder: str | Path,
    optimiser: MakeOptimiser,
    schedule: MakeSchedule | None = None,
    validation: Validation | None = None,
    criterion: Criterion | None = None,
    trackers: Sequence[Any] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    before: Callable[[EditableObjective, int], None] | None = None,
) -> Trained:
    """Train a model so that it can be edited, and leave it with the best weights that validation saw.

    The batches, their augmentation, the edits and the noise of a step depend on the seed and the step alone. A run that
    is stopped, by SIGKILL too, goes on from its last checkpoint when it is started again with the same folder and
    arguments; on the CPU it ends at the same weights, bit for bit. Started by `torchrun` or `accelerate launch`, every
    process draws batches and edits of its own. The gradient of a step whose loss or gradient is NaN or infinite is
    dropped.

    Args:
        objective: with the model; trained is what it says are its parameters.
        data: what is trained on.
        sampler: of the edits.
        settings: how long, how much at a time, how often to look.
        folder: gets `history.jsonl`, `checkpoints/` and, for every validation until the end, `weights/`.
        optimiser: makes the optimiser, such as ``lambda objective: SGD(objective.parameters(), lr=0.1)``.
        schedule: makes its learning-rate schedule, which goes on by one every step.
        validation: split and edits that choose the best weights; without it the last ones are kept.
        criterion: says of a sequence of figures which one, by index, is the best; `Frugal()` when not given.
        trackers: names or trackers as accelerate takes them; TensorBoard where it is installed, when not given.
        accelerator: one of your own; its mixed precision counts then, not that of the settings.
        progress: show a progress bar where the output is a terminal.
        before: called before every step with the objective and the step's number, from 0: to give its editor a metric
            that is measured anew, for one. Where it depends on these alone, a stopped run still ends bit for bit alike.

    Raises:
        MissingExtra: accelerate is not installed.
        InvalidInput: an argument cannot be used, or the folder holds a checkpoint of another run.
        NonFinite: too many steps in a row were NaN or infinite; `bad-batch.safetensors` in the folder has the last one.

    >>> objective = wp.EditableObjective(model, wp.editors.GradientDescent(lr=0.1), parameters="layer3.*")
    >>> found = train(objective, (images, labels), sampler=wp.training.RandomLabels(images, classes=10),
    ...     settings=wp.training.TrainSettings(steps=10, batch_size=20), folder="run",
    ...     optimiser=lambda objective: torch.optim.Adam(objective.parameters(), lr=1e-3))
    """
    data = data if isinstance(data, TrainingData) else Items(*data)
    _check(objective, data, sampler, settings)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = accelerator or _accelerator(settings, folder, trackers)
    editor = objective.editor
    run = _Run(objective, settings, folder, validation, criterion or Frugal(), accelerator, before)
    with preserved_rng(accelerator.device):
        try:
            run.prepare(data, sampler, optimiser, schedule)
            with bar("training", settings.steps, run.step, progress and accelerator.is_main_process) as show:
                run.finish(show)
            return run.outcome()
        finally:
            objective.editor = editor
            accelerator.free_memory()
            for tracker in accelerator.trackers:
                tracker.finish()


@final
class _Run:
    """All that changes while a run goes on."""

    def __init__(
        self,
        objective: EditableObjective,
        settings: TrainSettings,
        folder: Path,
        validation: Validation | None,
        criterion: Criterion,
        accelerator: Accelerator,
        before: Callable[[EditableObjective, int], None] | None,
    ) -> None:
        self.objective, self.settings, self.folder, self.before = objective, settings, folder, before
        self.validation, self.criterion, self.accelerator = validation, criterion, accelerator
        self.editor = objective.editor
        self.step, self.seconds, self.stopped = 0, 0.0, False
        self.figures: list[Figures] = []

    def prepare(
        self, data: TrainingData, sampler: Sampler, optimiser: MakeOptimiser, schedule: MakeSchedule | None
    ) -> None:
        """Make the optimiser, and go on from a checkpoint where there is one."""
        plain = optimiser(self.objective)
        plan = None if schedule is None else schedule(plain)
        same = _identity(self, data, sampler, plain, plan)
        wrapped, made = self.accelerator.prepare(self.objective, plain)
        self.stepper = Stepper(
            self.objective, wrapped, made, plan, data, sampler, self.settings, self.folder, self.accelerator
        )
        self.checkpoints = Checkpoints(self.folder / "checkpoints", same)
        found = self.checkpoints.find()
        if found is not None:
            self._restore(*found)
        self._began = time.monotonic() - self.seconds
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._history = History(self.folder / "history.jsonl", self.step)

    def finish(self, show: Callable[[int, str], None]) -> None:
        """Make all steps that are left, and take over the best weights."""
        settings = self.settings
        self.objective.train()
        while self.step < settings.steps and not self.stopped:
            set_steps(self.objective, self.editor.max_steps if settings.k is None else settings.k(self.step))
            if self.before is not None:
                self.before(self.objective, self.step)
            facts = self.stepper.update(self.step)
            self.step += 1
            if self._due(settings.log_every):
                self._note(facts)
            if self._due(settings.validate_every):
                self._validate()
            if self._due(settings.checkpoint_every) or self.stopped:
                self._save()
            show(self.step, told(facts["loss"], self.figures[-1] if self.figures else None))
        if self.figures:
            self._take_best()

    def outcome(self) -> Trained:
        """Return what came out."""
        best = self.figures[self.criterion(self.figures)] if self.figures else None
        return Trained(self.step, best, tuple(self.figures), self._settled(), self.stepper.skipped, self.seconds)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.settings.steps

    def _note(self, facts: Mapping[str, Any]) -> None:
        """Write one line of the history, and tell the trackers."""
        if self.accelerator.is_main_process:
            rate = self.stepper.optimiser.param_groups[0]["lr"]
            self._history.add({"step": self.step, **facts, "lr": rate, "skipped": self.stepper.skipped})
        numbers = {f"train/{name}": value for name, value in facts.items() if value is not None}
        self.accelerator.log(numbers, step=self.step)

    def _validate(self) -> None:
        """Measure the weights of this moment, keep them, and see whether it is time to end."""
        if self.validation is None:
            return
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            validation = placed(self.validation, self.accelerator.device)
            found[0] = validation.measure(self.objective.model, self._settled(), self.objective.names, self.step)
            write_whole(self._weights(self.step), lambda path: save_model(self.objective, str(path)))
            self._history.add({"validation": True, **asdict(found[0])})
        _share(found)
        self.figures.append(found[0])
        numbers = {f"validation/{name}": value for name, value in asdict(found[0]).items() if value is not None}
        self.accelerator.log(numbers, step=self.step)
        since = len(self.figures) - 1 - self.criterion(self.figures)
        self.stopped = self.settings.patience is not None and since >= self.settings.patience

    def _settled(self) -> IterativeEditor:
        """Return the editor as it will be used: with its own number of steps and what was learned."""
        return replace(self.objective.settled_editor(), max_steps=self.editor.max_steps)

    def _weights(self, step: int) -> Path:
        return self.folder / "weights" / f"step-{step:09d}.safetensors"

    def _take_best(self) -> None:
        """Load the best weights; the others are no longer needed."""
        best = self._weights(self.figures[self.criterion(self.figures)].step)
        load_model(self.objective, str(best))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for path in set(best.parent.glob("step-*.safetensors")) - {best}:
                path.unlink()

    def _save(self) -> None:
        """Write a checkpoint."""
        accelerator, stepper = self.accelerator, self.stepper
        self.seconds = time.monotonic() - self._began
        if accelerator.is_main_process:
            self.checkpoints.begin(self.step)
        accelerator.wait_for_everyone()
        partial = self.checkpoints.partial(self.step)
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if stepper.schedule is not None:
                torch.save(stepper.schedule.state_dict(), partial / _SCHEDULE)
            self.checkpoints.complete(self.step, self._facts())
        accelerator.wait_for_everyone()

    def _facts(self) -> dict[str, Any]:
        return {
            "figures": [asdict(figures) for figures in self.figures],
            "skipped": self.stepper.skipped,
            "in_a_row": self.stepper.in_a_row,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    def _restore(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.accelerator.load_state(str(path))
        if self.stepper.schedule is not None:
            self.stepper.schedule.load_state_dict(torch.load(path / _SCHEDULE, weights_only=True))
        self.step, self.seconds, self.stopped = facts["step"], facts["seconds"], facts["stopped"]
        self.figures = [Figures(**figures) for figures in facts["figures"]]
        self.stepper.skipped, self.stepper.in_a_row = facts["skipped"], facts["in_a_row"]


def _identity(
    run: _Run,
    data: TrainingData,
    sampler: Sampler,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
) -> dict[str, Any]:
    """Return what a run must share with a checkpoint to continue it."""
    objective = run.objective
    groups = [{**group, "params": len(group["params"])} for group in optimiser.param_groups]
    shapes = {name: list(value.shape) for name, value in objective.state_dict().items()}
    return {
        "model": type(objective.model).__qualname__,
        "layers": identity({"shapes": shapes, "modules": str(objective.model)}, whole=True),
        "parameters": list(objective.names),
        "editor": identity(objective.editor),
        "weights of the terms": identity((objective.weights, objective.c_eval)),
        "base_loss": identity(objective.base_loss),
        "first_order": objective.first_order,
        "share_locality": objective.share_locality,
        "data": identity(data),
        "sampler": identity(sampler),
        "validation": identity(run.validation),
        "criterion": identity(run.criterion),
        "optimiser": {"is": type(optimiser).__qualname__, "groups": identity(groups)},
        "schedule": None if schedule is None else {"is": type(schedule).__qualname__, **_plain(schedule)},
        "processes": run.accelerator.num_processes,
        "settings": identity(run.settings),
    }


def _plain(schedule: torch.optim.lr_scheduler.LRScheduler) -> dict[str, Any]:
    state = schedule.state_dict()
    told = {name: identity(value) for name, value in state.items() if isinstance(value, (int, float, str, list))}
    return {**told, "functions": identity(getattr(schedule, "lr_lambdas", None))}  # which are no part of a state


def _share(found: list[Any]) -> None:
    """Give every process what the main one found."""
    from accelerate.utils import broadcast_object_list

    broadcast_object_list(found)


def _accelerator(settings: TrainSettings, folder: Path, trackers: Sequence[Any] | None) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise MissingExtra('train needs accelerate; pip install "weightpatch[train]"') from error
    if trackers is None:
        trackers = ["tensorboard"] if find_spec("tensorboard") else []
    AcceleratorState._reset_state()  # of an earlier run in this process, whose precision need not be this one's
    precision = {None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[settings.precision]
    made = Accelerator(mixed_precision=precision, log_with=list(trackers) or None, project_dir=str(folder))
    if trackers:
        made.init_trackers("trackers")
    return made


def _check(objective: EditableObjective, data: TrainingData, sampler: Sampler, settings: TrainSettings) -> None:
    for name, value, kind in (
        ("objective", objective, EditableObjective),
        ("sampler", sampler, Sampler),
        ("settings", settings, TrainSettings),
    ):
        if not isinstance(value, kind):
            raise InvalidInput(f"train was given {name}={value!r:.80}; expected an object of {kind.__name__}")
    if settings.batch_size > len(data):
        raise InvalidInput(
            f"train was given batch_size={settings.batch_size} and {len(data)} items; expected at most that many"
        )
