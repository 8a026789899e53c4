"""`weightpatch evaluate --task translation|lm|text-classification`: how an editor fares on many mistakes."""

from __future__ import annotations

import json as encoding
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..errors import InvalidInput
from ._late import inputs_of, late_weights
from ._output import Answer, console
from ._speakers import Classes, Generator, Serving, TextTask, served
from ._texts import Mistakes, Texts, read_mistakes, read_texts
from .edit_text import TextSettings

if TYPE_CHECKING:
    from rich.console import Console

    from ..constraints import Constraint
    from ..editors import Editor
    from ..evaluation.metrics import Estimate
    from ..locality import Locality
    from ..tasks.text import GenerationReport, GenerationRow


@dataclass(frozen=True)
class _Job:
    """What is to be measured."""

    demands: Sequence[Constraint]
    editor: Editor
    tested: Texts
    parameters: tuple[str, ...]
    keep: Locality | None
    results: Path | None
    out: Console
    lines: tuple[int, ...]


def evaluate_text(
    model: Annotated[Path, tyro.conf.Positional],
    task: TextTask,
    edits: Path,
    texts: Path,
    keep: int = 0,
    results: Path | None = None,
    output: Path | None = None,
    margin: float = 0.05,
    min_success: float | None = None,
    settings: Annotated[TextSettings, tyro.conf.arg(name="")] = TextSettings(),  # noqa: B008
    serving: Annotated[Serving, tyro.conf.arg(name="")] = Serving(),  # noqa: B008
    json: bool = False,
) -> Answer:
    """Measure an editor on many edits of one text model, each on its own; the model's files are never changed.

    An edit succeeds where the edited model, as deployed, answers as it should. After each, the test texts are answered
    again.

    Args:
        model: A folder that save_pretrained wrote, or a .gguf file.
        task: What the model does: translation is any encoder-decoder.
        edits: A file of JSON lines, one an edit, with a "source" and its "target", the name of a class for
            text-classification.
        texts: Test texts, one a line, or a text, a tab and its reference a line: BLEU judges a translation, else
            accuracy. Sources of edits among them do not count. Classes need references.
        keep: How many of the test texts, at most half, hold the edits back; the others measure them.
        results: A JSONL file, one line an edit; a killed run continues from it.
        output: Where to write the figures and every edit as JSON.
        margin: By how much every token, or the class, must win, in logits.
        min_success: A gate: the least share of edits that must hold, from 0 to 1.
        settings: How to look for the edits.
        serving: How the model is loaded, and how it answers.
        json: Print facts as JSON alone.
    """
    mistakes = read_mistakes(edits)
    tested = read_texts(texts).without(mistakes.sources)
    if len(tested) < 2:
        raise InvalidInput(f"{texts} has {len(tested)} texts that are no source of an edit; expected at least 2")
    if task == "text-classification" and tested.references is None:
        raise InvalidInput(f"{texts} has no references; expected a text, a tab and the name of its class a line")
    speaker, tested = served(task, model, serving, tested)
    demands = _demands(speaker.asked, mistakes, margin, edits)
    kept, tested = tested.split(keep)
    network, held_back = speaker.answering.model, speaker.kept(kept.texts) if len(kept) else None
    parameters = settings.parameters or late_weights(network, inputs_of(demands[0]))
    out = console(json)
    out.print(f"moves    {', '.join(parameters)}", markup=False)
    editor = settings.make(network, held_back, parameters)
    job = _Job(demands, editor, tested, tuple(parameters), held_back, results, out, mistakes.lines)
    facts = _classes(speaker, job) if isinstance(speaker, Classes) else _generator(speaker, job)
    facts = {**facts, "moves": list(parameters), "kept": len(kept), "tested": len(tested)}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(encoding.dumps(facts, indent=2) + "\n", encoding="utf-8")
    success = facts["success"]["value"]
    good = min_success is None or (success is not None and success >= min_success)
    if not good:
        out.print(f"refused  success {'unknown' if success is None else format(success, '.3f')}, gate {min_success:g}")
    return Answer(facts, 0 if good else 1)


def _share(estimate: Estimate) -> dict[str, float | None]:
    """Return an estimate as JSON; where nothing was tried there is no value."""
    return {name: value if isfinite(value) else None for name, value in asdict(estimate).items()}


def _demands(asked: Callable[..., Constraint], mistakes: Mistakes, margin: float, path: Path) -> list[Constraint]:
    found = []
    for line, source, target in zip(mistakes.lines, mistakes.sources, mistakes.targets, strict=True):
        try:
            found.append(asked([source], [target], margin))
        except InvalidInput as error:
            error.add_note(f"That is line {line} of {path}.")
            raise
    return found


def _generator(speaker: Generator, job: _Job) -> dict[str, Any]:
    from ..tasks.text import evaluate

    scoring = None if job.tested.references is None else speaker.scoring()

    def progress(row: GenerationRow) -> None:
        job.out.print(f"line {row.item:<4} {row.result}, {row.steps} steps, {100 * row.changed:.2f} % changed")

    report: GenerationReport = evaluate(
        speaker.kind,
        job.demands,
        job.editor,
        texts=job.tested.texts,
        references=job.tested.references,
        score=None if scoring is None else scoring.whole,
        parameters=job.parameters,
        keep=job.keep,
        items=job.lines,
        results=job.results,
        progress=progress,
    )
    figures = report.figures() if report.edited else {}
    for name, value in figures.items():
        job.out.print(f"{name:10} {value}", markup=False)
    if scoring is not None:
        told = f"{scoring.name} of the unedited model {report.base_score:.2f}; {scoring.signature}"
        job.out.print(told, markup=False)
    if not figures:
        job.out.print("every edit held before it was made: there is nothing to measure")
    return {
        "success": _share(report.success),
        "figures": figures,
        "score": None if scoring is None else {"name": scoring.name, "signature": scoring.signature},
        "base_score": report.base_score,
        "edits": [asdict(row) for row in report.rows],
    }


def _classes(speaker: Classes, job: _Job) -> dict[str, Any]:
    import torch

    from .. import evaluate

    assert job.tested.references is not None
    numbers = {name: number for number, name in speaker.names.items()}
    labels = torch.tensor([numbers[reference] for reference in job.tested.references], device="cpu")
    report = evaluate(
        speaker.model,
        job.demands,
        job.editor,
        test=(speaker.classifier.inputs(job.tested.texts), labels),
        parameters=job.parameters,
        keep=job.keep,
        items=job.lines,
        results=job.results,
        progress=not job.out.quiet,
    )
    job.out.print(report)
    facts: dict[str, Any] = encoding.loads(report.to_json())
    return {**facts, "success": _share(report.summary.success)}
