"""`weightpatch edit --task translation|lm|text-classification`: a patch that makes a text model answer as it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..errors import InvalidInput
from ._late import inputs_of, late_weights
from ._output import Answer, console
from ._speakers import Serving, Speaker, TextTask, served
from ._texts import Texts, check_asked, read_texts
from ._verdict import limits, ships, tell_effects, tell_verdict
from .edit import EditorName, facts_of

if TYPE_CHECKING:
    from torch import nn

    from ..editors import Budget, Editor
    from ..evaluation import SentenceComparison
    from ..locality import Locality
    from ..patches import Patch
    from ..verdict import Limits


@dataclass(frozen=True)
class TextSettings:
    """How to look for the edit."""

    parameters: tuple[str, ...] = ()
    """Which parameters may move: glob patterns of their names; when not given, the last feed-forward weights."""
    editor: EditorName = "Auto"
    """The update rule; Auto climbs a ladder, up to the first way within the budget."""
    budget: float = 0.5
    """Of Auto: the share of the tokens of kept answers that may become others, in percent."""
    gate: bool = True
    """Of Auto: end with a gate where no change of weights is within the budget. It acts near the sources alone; but it
    runs with the model, and a patch with one cannot be put on files of weights."""
    lr: float = 3e-4
    """Learning rate of the other editors."""
    max_steps: int = 100
    """The most updates they make."""
    keep_weight: float = 100.0
    """How much KL(before || after) on kept answers weighs in their loss."""
    shrink: bool = True
    """Walk back to the smallest step that still holds."""

    def make(self, model: nn.Module, keep: Locality | None, parameters: Sequence[str]) -> Editor:
        """Return the editor."""
        from .. import editors

        if self.editor != "Auto":
            weight = 0.0 if keep is None else self.keep_weight
            plain = getattr(editors, self.editor)(lr=self.lr, max_steps=self.max_steps, keep_weight=weight)
            return editors.Shrink(plain) if self.shrink else plain
        if keep is None:
            return editors.ladder()
        budget = editors.Budget(self.budget / 100)
        return editors.Auto(budget=budget) if self.gate else _gateless(model, keep, parameters, budget)


@dataclass(frozen=True)
class TextGates:
    """What an edit may cost, measured on the texts that do not hold it back."""

    max_changed: float | None = None
    """A gate, and the verdict's limit: the largest share of test answers that may change, in percent."""
    max_drawdown: float | None = None
    """A gate, and the verdict's limit: the largest loss of BLEU, or of accuracy for lm and text-classification, in
    points; needs references."""
    strict: bool = False
    """Exit with 1 unless the verdict is green; without it an amber one is good enough."""

    @property
    def limits(self) -> Limits:
        """What the verdict goes by."""
        return limits(self.max_drawdown, self.max_changed)

    def check(self, texts: Texts, needed: bool = False) -> None:
        """Say early what the gates need."""
        asked = needed or self.max_changed is not None or self.max_drawdown is not None
        if asked and not len(texts):
            raise InvalidInput(
                "--report, --max-changed and --max-drawdown measure on other texts; pass --keep-texts FILE with at "
                "least one text that is not a --source"
            )
        if self.max_drawdown is not None and texts.references is None:
            raise InvalidInput("--max-drawdown needs references; give the file of texts a tab and a reference a line")

    def failed(self, comparison: SentenceComparison | None) -> list[str]:
        """Return why an edit is refused."""
        if comparison is None:
            return []
        found, share = list[str](), 100 * comparison.share.value
        if self.max_changed is not None and share > self.max_changed:
            found.append(f"{share:.2f} % of the answers changed, above the gate of {self.max_changed:g} %")
        drawdown = comparison.drawdown
        if self.max_drawdown is not None and drawdown is not None and drawdown.value > self.max_drawdown:
            name = "" if comparison.scoring is None else comparison.scoring.name
            found.append(f"{name} fell by {drawdown.value:.3f} points, above the gate of {self.max_drawdown:g}")
        return found


def edit_text(
    model: Annotated[Path, tyro.conf.Positional],
    task: TextTask,
    source: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    target: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    keep_texts: Path | None = None,
    keep: int | None = None,
    output: Path = Path("edit.patch.safetensors"),
    report: Path | None = None,
    margin: float = 0.05,
    settings: Annotated[TextSettings, tyro.conf.arg(name="")] = TextSettings(),
    serving: Annotated[Serving, tyro.conf.arg(name="")] = Serving(),  # noqa: B008
    gates: Annotated[TextGates, tyro.conf.arg(name="")] = TextGates(),
    json: bool = False,
) -> Answer:
    """Look for a patch that makes a text model answer as it should; the model's files are never changed.

    Args:
        model: A folder that save_pretrained wrote, or a .gguf file.
        task: What the model does: translation is any encoder-decoder.
        source: A text, or a prompt, that is answered wrongly; may be given several times.
        target: What it should be answered by, or the name of its class; one for each source.
        keep_texts: Other texts, one a line, or a text, a tab and its reference a line: some of them hold the edit back,
            the others measure what else changes.
        keep: How many of them hold the edit back, at most half; 64 when not given.
        output: Where the patch is written, when the edit holds.
        report: Where to write an HTML report.
        margin: By how much every token, or the class, must win, in logits.
        settings: How to look for the edit.
        serving: How the model is loaded, and how it answers.
        gates: What an edit may cost.
        json: Print facts as JSON alone.
    """
    from .. import edit as run

    check_asked(source, target)
    texts = Texts() if keep_texts is None else read_texts(keep_texts).without(source)
    gates.check(texts, report is not None)
    speaker, texts = served(task, model, serving, texts)
    out, kind = console(json), speaker.answering
    constraint = speaker.asked(source, target, margin)
    kept, tested = texts.split(keep)
    parameters = settings.parameters or late_weights(kind.model, inputs_of(constraint))
    out.print(f"moves    {', '.join(parameters)}", markup=False)
    before = [kind.text(tokens) for tokens in kind.generate(source)]
    held_back = speaker.kept(kept.texts) if len(kept) else None
    editor = settings.make(kind.model, held_back, parameters)
    found = run(kind.model, constraint, editor, keep=held_back, parameters=parameters)
    for attempt in found.attempts:
        out.print(f"tried    {attempt}", markup=False)
    out.print(f"{found}\n{found.result.value}", markup=False)
    tell_effects(out, found)
    held, verdict = found.result.held, found.judge(gates.limits)
    facts: dict[str, Any] = {**facts_of(found), "parameters": list(parameters), "output": None}
    facts["verdict"] = verdict.to_json()
    if found.patch is None:
        return Answer(facts, 1)
    after = _after(speaker, found.patch, source)
    for told in zip(source, before, after, strict=True):
        out.print("{}\n  before {}\n  after  {}".format(*told), markup=False)
    comparison = _compared(speaker, found.patch, tested)
    refused = gates.failed(comparison)
    if comparison is None:
        out.print("nothing else was measured; --keep-texts FILE names texts whose answers should stay")
    else:
        verdict = comparison.judge(gates.limits) & verdict
        out.print(str(comparison), markup=False)
    tell_verdict(out, verdict)
    if report is not None:
        from ..evaluation import sentence_page

        page = sentence_page(
            report,
            kind=kind,
            edit=found,
            constraint=constraint,
            sources=source,
            comparison=comparison,
            limits=gates.limits,
        )
        out.print(f"report   {page}", markup=False)
    if held and not refused:
        found.patch.save(output)
        out.print(f"patch    {output}", markup=False)
        if found.patch.gates:
            out.print(
                "         it has a gate, which files of weights cannot hold: apply it in Python, or try --no-gate"
            )
    elif held:
        out.print(f"refused  {'; '.join(refused)}; no patch written", markup=False)
    facts |= {
        "answers": [
            {"source": s, "target": t, "before": b, "after": a}
            for s, t, b, a in zip(source, target, before, after, strict=True)
        ],
        "comparison": None if comparison is None else comparison.to_json(gates.limits),
        "verdict": verdict.to_json(),
        "gate": not refused,
        "output": str(output) if held and not refused else None,
    }
    return Answer(facts, 0 if held and not refused and ships(verdict, gates.strict) else 1)


def _gateless(model: nn.Module, keep: Locality, parameters: Sequence[str], budget: Budget) -> Editor:
    """Return the usual ladder without its last rung."""
    from ..editors import Auto
    from ..statistics import called, second_moments

    late = [escape(name) for name in called(model, keep.inputs, parameters=parameters)]
    metric = second_moments(model, keep, parameters=late).metric() if late else None
    return Auto.late(metric, budget=budget)


def _after(speaker: Speaker, patch: Patch, sources: tuple[str, ...]) -> list[str]:
    from ..evaluation import patched

    kind = speaker.answering
    return [kind.text(tokens) for tokens in kind.generate(sources, patched(kind.model, patch))]


def _compared(speaker: Speaker, patch: Patch, tested: Texts) -> SentenceComparison | None:
    from ..evaluation import compare_sentences

    if not len(tested):
        return None
    scoring = None if tested.references is None else speaker.scoring()
    return compare_sentences(speaker.answering, patch, tested.texts, tested.references, scoring, tested.lines)
