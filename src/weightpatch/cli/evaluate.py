"""`weightpatch evaluate`: how an editor fares on many mistakes of a model."""

from __future__ import annotations

from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ._data import SHIPPED, hold_back
from ._model import load_model
from ._output import Answer, console
from .edit import Reading, Settings, locality

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from ..constraints import Constraint
    from ..tasks.images import LabelledImages


def evaluate(
    model: str,
    data: str = SHIPPED,
    test: str | None = None,
    weights: Path | None = None,
    edits: int = 100,
    labels: Literal["mistakes", "random"] = "mistakes",
    sequential: bool = False,
    margin: float = 0.1,
    seed: int = 0,
    keep: int | None = None,
    results: Path | None = None,
    output: Path | None = None,
    min_success: float | None = None,
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),  # noqa: B008
    reading: Annotated[Reading, tyro.conf.arg(name="")] = Reading(),  # noqa: B008
    task: Literal["images", "translation", "lm", "text-classification"] = "images",
    json: bool = False,
) -> Answer:
    """Measure an editor on many edits of one model: success, drawdown, flips, generality, cost, with intervals.

    These are the options for images; `weightpatch evaluate --task translation --help` shows those for text models.

    Args:
        model: The model, as package.module:factory.
        data: Where the edited items come from: fashion-mnist, an .npz file, or a folder.
        test: Labelled images on which side effects are measured; the data itself when not given.
        weights: The model's weights, .safetensors or .pt; the factory's own when not given.
        edits: How many edits.
        labels: Correct the model's own mistakes, or ask for uniform random labels.
        sequential: Apply the edits one on another and re-test the earlier ones.
        margin: By how much the class must win, in logits.
        seed: Which items and labels are drawn.
        keep: How many of the test images hold the edits back, as in `edit`; the others, at least three quarters,
            measure them.
        results: A JSONL file, one line an edit; a killed run continues from it.
        output: Where to write the summary as JSON.
        min_success: A gate: the least share of edits that must hold, from 0 to 1.
        settings: How to look for the edits.
        reading: How images become tensors.
        task: What the model does.
        json: Print facts as JSON alone.
    """
    from .. import evaluate as run
    from ..evaluation import Independent, Sequential
    from ..tasks import images

    network, source = load_model(model, weights), reading.load(data)
    kept, tested = hold_back(source if test is None else reading.load(test), settings.kept(keep))
    demands, items = draw(network, source, edits, labels, margin, seed)
    report = run(
        network,
        demands,
        settings.make(),
        test=(tested.images, tested.labels),
        parameters=settings.parameters,
        keep=locality(kept),
        altered=images.altered,
        protocol=Sequential() if sequential else Independent(),
        items=items,
        results=results,
        progress=not json,
    )
    out = console(json)
    out.print(report)
    if output is not None:
        report.save(output)
    good = min_success is None or report.summary.success.value >= min_success
    if not good:
        out.print(f"refused  success {report.summary.success.value:.3f} is below {min_success:g}")
    return Answer(loads(report.to_json()), 0 if good else 1)


def draw(
    model: nn.Module, data: LabelledImages, n: int, labels: Literal["mistakes", "random"], margin: float, seed: int
) -> tuple[list[Constraint], list[str | int]]:
    """Draw n edits: items that the model gets wrong, with their true labels, or any items, with random labels.

    Return their names too.
    """
    import torch

    from .._calling import check_classes
    from ..evaluation import predict

    seen = data.images if labels == "mistakes" else data.images[:1]
    logits = predict(model, seen)
    asked = data.labels if labels == "mistakes" else torch.tensor([len(data.classes) - 1], device="cpu")
    check_classes(asked, f"--labels {labels}", logits.shape[1])
    wrong = (logits.argmax(1) != data.labels).nonzero().squeeze(1) if labels == "mistakes" else None
    return chosen(data, wrong, n, margin, torch.Generator().manual_seed(seed))


def chosen(
    data: LabelledImages, wrong: Tensor | None, n: int, margin: float, generator: Generator
) -> tuple[list[Constraint], list[str | int]]:
    """Choose n of the rows that are `wrong` and ask for their true labels; without it any rows, and any labels."""
    import torch

    from ..constraints import Classified
    from ..errors import InvalidInput

    if wrong is None:
        rows = torch.randperm(len(data), generator=generator, device="cpu")[:n]
        wanted = torch.randint(0, len(data.classes), (len(rows),), generator=generator, device="cpu")
    else:
        rows = wrong[torch.randperm(len(wrong), generator=generator, device="cpu")[:n]]
        wanted = data.labels[rows]
    if not len(rows):
        raise InvalidInput("there is nothing to edit: the model makes no mistake on this data; try --labels random")
    pairs = zip(rows.tolist(), wanted, strict=True)
    demands: list[Constraint] = [Classified(data.images[i : i + 1], y[None], margin) for i, y in pairs]
    return demands, [data.names[i] for i in rows.tolist()]
