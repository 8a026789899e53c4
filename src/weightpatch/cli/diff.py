"""`weightpatch diff`: what differs between any two models of one architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ._data import SHIPPED
from ._model import load_model
from ._output import Answer, console
from ._verdict import limits, ships, tell_verdict
from .edit import Reading


def diff(
    a: Annotated[Path, tyro.conf.Positional],
    b: Annotated[Path, tyro.conf.Positional],
    model: str,
    test: str = SHIPPED,
    report: Path | None = None,
    max_drawdown: float | None = None,
    max_broken: int | None = None,
    strict: bool = False,
    reading: Annotated[Reading, tyro.conf.arg(name="")] = Reading(),  # noqa: B008
    task: Literal["images", "translation", "lm", "text-classification"] = "images",
    json: bool = False,
) -> Answer:
    """Say what differs between two models of one architecture on labelled data, edited or not.

    These are the options for images; `weightpatch diff --task translation --help` shows those for text models.

    Args:
        a: The weights before: .safetensors or .pt.
        b: The weights after, or a .patch.safetensors file to apply to the weights before.
        model: The architecture, as package.module:factory.
        test: Labelled data: fashion-mnist, an .npz file, or a folder.
        report: Where to write an HTML page, with its numbers as JSON beside it.
        max_drawdown: A gate, and the verdict's limit: the largest loss of accuracy allowed, in percentage points.
        max_broken: A gate: the most answers that may turn from right to wrong.
        strict: Exit with 1 unless the verdict is green; without it an amber one is good enough.
        reading: How images become tensors.
        task: What the models do.
        json: Print facts as JSON alone.
    """
    from .. import compare
    from ..evaluation import comparison_page
    from ..patches import Patch

    out = console(json)
    before = load_model(model, a)
    if b.name.endswith(".patch.safetensors"):
        after = load_model(model, a)
        Patch.load(b).apply(after)
    else:
        after = load_model(model, b)
    tested = reading.load(test)
    comparison = compare(before, after, (tested.images, tested.labels), items=tested.names)
    allowed = limits(max_drawdown)
    verdict = comparison.judge(allowed, tested.classes)
    out.print(str(comparison))
    tell_verdict(out, verdict)
    if report is not None:
        page = comparison_page(
            report,
            comparison,
            title=f"{a.name} → {b.name}",
            inputs=tested.images,
            classes=tested.classes,
            limits=allowed,
        )
        out.print(f"report   {page}")
    failed = []
    if max_drawdown is not None and comparison.drawdown.value > max_drawdown:
        failed.append(f"drawdown {comparison.drawdown.value:.3f} points is above {max_drawdown:g}")
    if max_broken is not None and len(comparison.broken) > max_broken:
        failed.append(f"{len(comparison.broken)} answers broke, more than {max_broken}")
    for reason in failed:
        out.print(f"refused  {reason}")
    facts = {
        "comparison": comparison.to_json(allowed),
        "verdict": verdict.to_json(),
        "gates_failed": failed,
    }
    return Answer(facts, 0 if not failed and ships(verdict, strict) else 1)
