"""`weightpatch demo`: the whole journey on real images with the shipped classifier."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ._output import Answer, console
from ._verdict import tell_effects, tell_verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor, nn

    from ..editing import Edit
    from ..editors import Editor
    from ..evaluation import Report
    from ..patches import Patch
    from ..tasks.images import LabelledImages

BLOCK = "layer3.*"
MARGIN = 0.1
SAMPLE = 1000  # images on which each of many edits is measured
PER_EDIT = 20  # images to choose from for each edit: one in fourteen is a mistake
RATE = 0.001  # of gradient descent on that block: the best of benchmarks/fashion_table.py on its validation split
KEPT = 1000  # the first images are kept: half of them judge; what else changes is measured on all others


def demo(
    output: Path = Path("demo-output"),
    edits: int = 100,
    task: Literal["images", "translation"] = "images",
    json: bool = False,
) -> Answer:
    """Patch a real mistake, show what else changed, save, apply, verify, revert; then measure many, plain and editable.

    These are the options for images; `weightpatch demo --task translation --help` shows those for the translator.

    Args:
        output: The folder for the patch, the report and the results.
        edits: How many real-mistake and how many random-label edits of each network to measure.
        task: What the network does.
        json: Print facts as JSON alone.
    """
    import torch

    from .. import Comparison, Locality
    from .. import edit as run
    from ..constraints import Classified
    from ..editors import GradientDescent
    from ..evaluation import edit_page, predict
    from ..tasks import images

    out = console(json)
    output.mkdir(parents=True, exist_ok=True)
    model, everything = images.fashion_classifier(), images.fashion_test()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster layout on a CPU
    kept, test = everything[slice(0, KEPT)], everything[slice(KEPT, len(everything))]
    before = predict(model, test.images)
    answers = before.argmax(1)
    mistakes = (answers != test.labels).nonzero().squeeze(1)
    out.print(
        f"[bold]1. The model[/] {len(test):,} Fashion-MNIST test images, {len(mistakes)} mistakes: "
        f"error {len(mistakes) / len(test):.2%}"
    )

    row = int(mistakes[0])
    item, image, label = test.names[row], test.images[row : row + 1], test.labels[row : row + 1]
    fix, keep = Classified(image, label, MARGIN), Locality(kept.images)
    out.print(
        f"[bold]2. The mistake[/] the first one, item {item}: class {test.classes[int(label)]}, "
        f"taken for {test.classes[int(answers[row])]}"
    )
    found = run(model, fix, keep=keep, parameters=BLOCK).raise_for_result()
    out.print(f"[bold]3. The patch[/] {found}")

    path = output / f"{item}.patch.safetensors"
    after = _journey(model, found, fix, path, out)
    out.print(_before_and_after(model, after, image, test.classes))
    comparison = Comparison(before, predict(after, test.images), test.labels, items=test.names)
    verdict = comparison.judge(names=test.classes) & found.verdict
    out.print(f"[bold]5. What else changed[/] {comparison}")
    tell_effects(out, found, before="   ")
    tell_verdict(out, verdict, before="   ")

    networks: dict[str, tuple[nn.Module, Editor, str]] = {
        "plain": (model, GradientDescent(lr=RATE), BLOCK),
        "editable": (images.fashion_editable(), images.fashion_editor(), images.EDITED),
    }
    reports = _measure(networks, test, edits, output, out)
    page = edit_page(
        output / "report.html",
        model=model,
        edit=found,
        constraint=fix,
        test=(test.images, test.labels),
        classes=test.classes,
        items=test.names,
        asked=[item],
        tables=tuple(reports.items()),
    )
    out.print(f"[bold]7. The report[/] {page}")
    facts = {
        "item": item,
        "result": found.result.name,
        "steps": found.steps,
        "patch": str(path),
        "report": str(page),
        **found.effects(),
        "comparison": comparison.to_json(),
        "verdict": verdict.to_json(),
        "evaluations": {name: asdict(report.summary) for name, report in reports.items()},
    }
    return Answer(facts)


def _before_and_after(model: nn.Module, after: nn.Module, image: Tensor, classes: tuple[str, ...]) -> Table:
    """Return the classes that matter with their probabilities before and after."""
    import torch
    from rich.table import Table

    with torch.no_grad():
        old, new = model(image).softmax(1)[0], after(image).softmax(1)[0]
    table = Table("class", "before", "after", box=None)
    for i in torch.maximum(old, new).argsort(descending=True)[:3].tolist():
        cells = (f"[bold]{p[i]:.1%}[/]" if int(p.argmax()) == i else f"{p[i]:.1%}" for p in (old, new))
        table.add_row(f"   {classes[i]}", *cells)
    return table


def _journey(model: nn.Module, found: Edit, fix: Any, path: Path, out: Console) -> nn.Module:
    """Save, load, apply and verify on a model of its own; revert and compare digests. Return a patched model."""
    import copy

    from ..errors import EditFailed
    from ..patches import Patch, fingerprint

    assert found.patch is not None
    found.patch.save(path)
    patch: Patch = Patch.load(path)
    live = copy.deepcopy(model)
    before = fingerprint(live)
    patch.apply(live)
    if not fix.satisfied(live):
        raise EditFailed("the loaded patch does not hold on the patched model; please report this")
    patched = copy.deepcopy(live)
    patch.revert(live)
    if fingerprint(live) != before:
        raise EditFailed("the reverted model differs from the original; please report this")
    out.print(
        f"[bold]4. The file[/] {path} ({path.stat().st_size / 1000:.1f} kB): saved, loaded, applied, the constraint "
        "verified; reverted, bit for bit the original"
    )
    return patched


def _measure(
    networks: dict[str, tuple[nn.Module, Editor, str]], test: LabelledImages, edits: int, output: Path, out: Console
) -> dict[str, Report]:
    """Evaluate real-mistake edits and random-label edits of each network, and print the table."""
    import torch
    from rich.table import Table

    from .. import evaluate
    from ..evaluation import figures, predict
    from ..tasks import images
    from .evaluate import chosen

    judged, pool, reports = test[slice(0, SAMPLE)], test[slice(0, PER_EDIT * edits)], {}
    for name, (model, editor, parameters) in networks.items():
        generator = torch.Generator().manual_seed(0)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        wrong = (predict(model, pool.images).argmax(1) != pool.labels).nonzero().squeeze(1)
        asked = {
            "random labels": chosen(pool, None, edits, MARGIN, generator),
            "real mistakes": chosen(pool, wrong, edits, MARGIN, generator),
        }
        both = evaluate(
            model,
            [constraint for constraints, _ in asked.values() for constraint in constraints],
            editor,
            test=(judged.images, judged.labels),
            parameters=parameters,
            altered=images.altered,
            items=[name for _, names in asked.values() for name in names],
            results=output / f"edits-{name}.jsonl",
        )
        rows = iter(both.rows)
        for kind, (constraints, _) in asked.items():
            reports[f"{kind}, {name}"] = replace(both, rows=tuple(islice(rows, len(constraints))))
    table = Table(title=f"6. Many edits, one at a time, each measured on {len(judged):,} images", title_justify="left")
    table.add_column("")
    ordered = sorted(reports, key=lambda name: name.partition(",")[0])
    for name in ordered:
        table.add_column(name.replace(", ", ",\n"), justify="right")
    columns = [figures(reports[name]) for name in ordered]
    for figure in columns[0]:
        table.add_row(figure, *(column[figure] for column in columns))
    out.print(table)
    return reports
