"""`weightpatch edit`: look for a patch that makes a model answer as it should."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ._data import SHIPPED, asked_names, class_index, hold_back, item_index, load_data
from ._model import load_model
from ._output import Answer, console
from ._verdict import limits, ships, tell_effects, tell_verdict

if TYPE_CHECKING:
    from ..editing import Edit
    from ..editors import Editor
    from ..evaluation import Comparison
    from ..locality import Locality
    from ..tasks.images import LabelledImages

import tyro

EditorName = Literal["Auto", "GradientDescent", "ScaledGradientDescent", "RProp", "RMSProp", "Momentum", "Adam"]


@dataclass(frozen=True)
class Settings:
    """How to look for the edit."""

    parameters: tuple[str, ...] = ("*",)
    """Which parameters may move: glob patterns of their names."""
    editor: EditorName = "Auto"
    """The update rule; Auto climbs a ladder, up to the first way within the budget."""
    budget: float = 0.5
    """Of Auto: the share of other images that may be answered otherwise, in percent."""
    altered: bool = False
    """Of Auto: ask for shifted, turned and noisy copies of the items too."""
    lr: float = 3e-4
    """Learning rate of the other editors."""
    max_steps: int = 100
    """The most updates they make."""
    keep_weight: float = 100.0
    """How much KL(before || after) on other images weighs in their loss."""
    shrink: bool = True
    """Walk back to the smallest step that still holds."""

    def kept(self, wanted: int | None) -> int:
        """Return how many images to keep where it is not said."""
        return wanted if wanted is not None else 1000 if self.editor == "Auto" else 256

    def make(self) -> Editor:
        """Return the editor."""
        from .. import editors
        from ..tasks import images

        if self.editor == "Auto":
            return editors.Auto(
                budget=editors.Budget(self.budget / 100), altered=images.altered if self.altered else None
            )
        plain = getattr(editors, self.editor)(lr=self.lr, max_steps=self.max_steps, keep_weight=self.keep_weight)
        return editors.Shrink(plain) if self.shrink else plain


@dataclass(frozen=True)
class Reading:
    """How images become tensors: (pixel / 255 - mean) / std."""

    mean: tuple[float, ...] = (0.0,)
    """One number, or one a channel."""
    std: tuple[float, ...] = (1.0,)
    """One number, or one a channel."""
    size: int | None = None
    """Scale the pictures of a folder to this many pixels a side."""

    def load(self, where: str) -> LabelledImages:
        """Load labelled images from `where`."""
        return load_data(where, self.mean, self.std, self.size)


def edit(
    model: str,
    item: tuple[int, ...],
    label: str | None = None,
    data: str = SHIPPED,
    test: str | None = None,
    weights: Path | None = None,
    output: Path = Path("edit.patch.safetensors"),
    report: Path | None = None,
    margin: float = 0.1,
    keep: int | None = None,
    max_drawdown: float | None = None,
    strict: bool = False,
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),
    reading: Annotated[Reading, tyro.conf.arg(name="")] = Reading(),
    task: Literal["images", "translation", "lm", "text-classification"] = "images",
    json: bool = False,
) -> Answer:
    """Look for a patch that makes the model answer as it should; the model's files are never changed.

    These are the options for images; `weightpatch edit --task translation --help` shows those for text models.

    Args:
        model: The model, as package.module:factory.
        item: Rows of the data that must become right.
        label: The class they should have, by name or number; when not given, each item's own label.
        data: Where the items come from: fashion-mnist, an .npz file, or a folder.
        test: Labelled images on which to measure what else changes; the data itself when not given.
        weights: The model's weights, .safetensors or .pt; the factory's own when not given.
        output: Where the patch is written, when the edit holds.
        report: Where to write an HTML report.
        margin: By how much the class must win, in logits.
        keep: How many of the test images hold the edit back, and are what Auto goes by: 1000 for Auto, else 256, each
            of whose steps runs them all. The others, at least three quarters, measure it.
        max_drawdown: A gate, and the verdict's limit: the largest loss of test accuracy allowed, in percentage points.
        strict: Exit with 1 unless the verdict is green; without it an amber one is good enough.
        settings: How to look for the edit.
        reading: How images become tensors.
        task: What the model does.
        json: Print facts as JSON alone.
    """
    import torch

    from .. import compare
    from .. import edit as run
    from ..constraints import Classified

    out = console(json)
    network, images = load_model(model, weights), reading.load(data)
    rows = item_index(item, images)
    told = asked_names(data, images, item)
    wanted = images.labels[rows] if label is None else torch.full_like(rows, class_index(label, images.classes))
    constraint = Classified(images.images[rows], wanted, margin)
    kept, tested = hold_back(images if test is None else reading.load(test), settings.kept(keep))
    editor = None if settings.editor == "Auto" and not len(kept) else settings.make()
    found = run(network, constraint, editor, keep=locality(kept), parameters=settings.parameters)
    out.print("asked    " + "; ".join(told), markup=False)
    for attempt in found.attempts:
        out.print(f"tried    {attempt}")
    out.print(f"{found}\n{found.result.value}")
    tell_effects(out, found)
    held, allowed = found.result.held, limits(max_drawdown)
    about = {"items": [{"row": row, "name": images.names[row]} for row in item], "data": data, "test": test or data}
    if found.patch is None:
        return Answer({**about, **facts_of(found), "verdict": found.judge(allowed).to_json()}, 1)
    comparison = _compare(network, found, tested, compare)
    gate = max_drawdown is None or comparison.drawdown.value <= max_drawdown
    verdict = comparison.judge(allowed, tested.classes) & found.judge(allowed)
    out.print(str(comparison))
    tell_verdict(out, verdict)
    if report is not None:
        from ..evaluation import edit_page

        page = edit_page(
            report,
            model=network,
            edit=found,
            constraint=constraint,
            test=(tested.images, tested.labels),
            classes=tested.classes,
            items=tested.names,
            asked=told,
            limits=allowed,
        )
        out.print(f"report   {page}")
    if held and gate:
        found.patch.save(output)
        out.print(f"patch    {output}")
    elif held:
        out.print(
            f"refused  drawdown {comparison.drawdown.value:.3f} points is above the gate of {max_drawdown:g}; "
            "no patch written"
        )
    facts = {
        **about,
        **facts_of(found),
        "comparison": comparison.to_json(allowed),
        "verdict": verdict.to_json(),
        "gate": gate,
        "output": str(output) if held and gate else None,
    }
    return Answer(facts, 0 if held and gate and ships(verdict, strict) else 1)


def _compare(network: Any, found: Edit, tested: LabelledImages, compare: Any) -> Comparison:
    import copy

    after = copy.deepcopy(network)
    assert found.patch is not None
    found.patch.apply(after)
    result: Comparison = compare(network, after, (tested.images, tested.labels), items=tested.names)
    return result


def locality(kept: LabelledImages) -> Locality | None:
    """Return what should stay; None for no images."""
    from .. import Locality

    return Locality(kept.images) if len(kept) else None


def facts_of(found: Edit) -> dict[str, Any]:
    """Return what --json tells of any edit."""
    return {
        "result": found.result.name,
        "advice": found.result.value,
        "steps": found.steps,
        "violation": found.violation,
        **found.effects(),
        "attempts": [attempt.to_json() for attempt in found.attempts],
        "cost": asdict(found.cost),
        "patch": None if found.patch is None else {"id": found.patch.id, "bytes": found.patch.nbytes},
    }
