"""`weightpatch diff --task translation|lm|text-classification`: what differs between two text models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ._output import Answer, console
from ._speakers import Serving, TextTask, served
from ._texts import read_texts
from ._verdict import ships, tell_verdict
from .edit_text import TextGates


def diff_text(
    a: Annotated[Path, tyro.conf.Positional],
    b: Annotated[Path, tyro.conf.Positional],
    task: TextTask,
    texts: Path,
    report: Path | None = None,
    serving: Annotated[Serving, tyro.conf.arg(name="")] = Serving(),  # noqa: B008
    gates: Annotated[TextGates, tyro.conf.arg(name="")] = TextGates(),  # noqa: B008
    json: bool = False,
) -> Answer:
    """Say what differs between the answers of two text models, edited or not.

    Args:
        a: The model before: a folder that save_pretrained wrote, or a .gguf file.
        b: The model after, or a .patch.safetensors file to apply to the model before.
        task: What the models do: translation is any encoder-decoder.
        texts: A file of one text a line, or a text, a tab and its reference a line.
        report: Where to write an HTML page, with its numbers as JSON beside it.
        serving: How the models are loaded, and how they answer.
        gates: What the second one may cost.
        json: Print facts as JSON alone.
    """
    from ..evaluation import compare_sentences, sentence_comparison_page
    from ..patches import Patch

    asked = read_texts(texts)
    gates.check(asked)
    speaker, asked = served(task, a, serving, asked)
    other = Patch.load(b) if b.name.endswith(".patch.safetensors") else serving.load(b, task).answering.model
    scoring = None if asked.references is None else speaker.scoring()
    comparison = compare_sentences(speaker.answering, other, asked.texts, asked.references, scoring, asked.lines)
    out = console(json)
    verdict = comparison.judge(gates.limits)
    out.print(str(comparison), markup=False)
    tell_verdict(out, verdict)
    if report is not None:
        page = sentence_comparison_page(report, comparison, title=f"{a.name} → {b.name}", limits=gates.limits)
        out.print(f"report   {page}", markup=False)
    failed = gates.failed(comparison)
    for reason in failed:
        out.print(f"refused  {reason}", markup=False)
    facts = {
        "comparison": comparison.to_json(gates.limits),
        "verdict": verdict.to_json(),
        "gates_failed": failed,
    }
    return Answer(facts, 0 if not failed and ships(verdict, gates.strict) else 1)
