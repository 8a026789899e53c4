"""The evaluation of fact edits: each alone, or one on another, and the final model judged on all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from weightpatch._calling import Params
from weightpatch._cost import measured
from weightpatch._identity import digest, identity
from weightpatch.constraints import All, Constraint, Says
from weightpatch.editing import Result, solve
from weightpatch.editors import Editor
from weightpatch.errors import InvalidInput
from weightpatch.evaluation.log import Log
from weightpatch.gates import Gate
from weightpatch.locality import Locality
from weightpatch.network import GATE, preserved_rng
from weightpatch.patches import Patch, fingerprint
from weightpatch.preparing import prepared
from weightpatch.tasks.language._facts import Fact
from weightpatch.tasks.language._judging import Judge, Share, Unedited, unedited
from weightpatch.tasks.language._measures import demand
from weightpatch.tasks.text import CausalLM

__all__ = ["FactsReport", "FactsRow", "evaluate_facts"]

Makes = Callable[[Sequence[Fact]], Editor]


@final
@dataclass(frozen=True)
class FactsRow:
    """One set of facts, edited into one model.

    Answers are decoded freely from the prompt, and count where they begin with what is right, up to the end of a word.

    Attributes:
        size: how many facts the set has.
        first: the place of its first fact.
        held: how many edits ended satisfied, when they were made; of `edits`.
        edits: `size`, or 1 where all facts are asked for at once.
        steps: the updates of all edits.
        said: efficacy: facts whose prompt is continued by the target, by the final model.
        paraphrases: prompts that ask the same and are continued by the target.
        same: neighbours that are answered as before, token for token.
        right: neighbours that are answered right, of those that were before.
        fluency: the mean n-gram entropy of free continuations, bits; None without them.
        perplexity: on held-out texts; None without them, or where it is not finite.
        seconds: what all edits took, without the judging.
        peak_bytes: the largest growth of memory of one edit; None where it cannot be measured.
        patch_bytes: of one patch with everything.
    """

    size: int
    first: int
    held: int
    edits: int
    steps: int
    said: Share
    paraphrases: Share
    same: Share
    right: Share
    fluency: float | None
    perplexity: float | None
    seconds: float
    peak_bytes: int | None
    patch_bytes: int


@final
@dataclass(frozen=True)
class FactsReport:
    """What edits of facts did to a language model.

    Attributes:
        editor: how they were made.
        before: what the unedited model makes of the facts.
        rows: one a set.
    """

    editor: str
    before: Unedited
    rows: tuple[FactsRow, ...]

    def of(self, size: int) -> tuple[FactsRow, ...]:
        """Return the rows of sets of one size."""
        return tuple(row for row in self.rows if row.size == size)

    def drawdown(self, size: int) -> float | None:
        """Return by how much the perplexity rises, on average over sets of one size; None where one is not finite."""
        found = [row.perplexity for row in self.of(size)]
        before = self.before.perplexity
        if before is None or not found or None in found:
            return None
        return statistics.fmean(value for value in found if value is not None) - before

    def figures(self, size: int) -> dict[str, str]:
        """Return the columns of a table for sets of one size, "" where there is nothing."""
        rows = self.of(size)
        if not rows:
            return {}
        shares = {
            name: str(sum((getattr(row, name) for row in rows), Share(0, 0)))
            for name in ("said", "paraphrases", "same", "right")
        }
        words, peaks = [row.fluency for row in rows], [row.peak_bytes for row in rows if row.peak_bytes is not None]
        fluent = [value for value in words if value is not None]
        lost, edits = self.drawdown(size), sum(row.edits for row in rows)
        already = [said for row in rows for said in self.before.said[row.first : row.first + size]]
        return {
            "sets": str(len(rows)),
            "said before": str(Share(sum(already), len(already))),
            "efficacy": shares["said"],
            "paraphrases": shares["paraphrases"],
            "neighbours as before": shares["same"],
            "neighbours right": shares["right"],
            "fluency": f"{statistics.fmean(fluent):.2f}" if fluent else "",
            "perplexity": "" if self.before.perplexity is None else "not finite" if lost is None else f"{lost:+.2f}",
            "held when made": str(Share(sum(row.held for row in rows), edits)),
            "steps an edit": f"{sum(row.steps for row in rows) / edits:.1f}",
            "s an edit": f"{sum(row.seconds for row in rows) / edits:.2f}",
            "peak MB": f"{statistics.median(peaks) / 1e6:.0f}" if peaks else "",
            "patch kB": f"{statistics.median(row.patch_bytes for row in rows) / 1000:.1f}",
        }


def evaluate_facts(
    language: CausalLM,
    facts: Sequence[Fact],
    editor: Editor | Makes,
    *,
    sizes: Sequence[int] | Mapping[int, int] = (1, 10, 100),
    parameters: str | Sequence[str] = "*",
    keep: Locality | None = None,
    joint: bool = False,
    skip_failed: bool = False,
    margin: float = 0.05,
    held_out: Sequence[str] = (),
    before: Unedited | None = None,
    results: str | Path | None = None,
    progress: Callable[[FactsRow], None] | None = None,
) -> FactsReport:
    """Edit facts into a language model, set by set, and judge each edited model by what it says; the model stays.

    The facts of a set are edited one on another, and the final model is judged on all of them; the next set starts from
    the unedited model again. An edit that fails is applied too, unless its weights are not finite or failed edits are
    skipped. Nothing is judged by teacher forcing: an answer is decoded from its prompt alone. What is judged is what
    one patch makes of the model.

    Args:
        language: the model.
        facts: what it is to say; sets are taken from the beginning.
        editor: how; or what makes one for the facts of one edit, such as one that writes at their subjects.
        sizes: how many facts a set has; as many sets as the facts fill, or as the mapping says.
        parameters: which parameters may move, as one or several glob patterns of their names.
        keep: what should stay, for editors that use it.
        joint: ask for all facts of a set in one edit.
        skip_failed: leave out edits that fail, as one that ships no unmet demand would; their facts are judged all the
            same.
        margin: by how much each token of a target is to win, in logits.
        held_out: texts for the perplexity.
        before: what `unedited` returned for these facts and texts, with settings of its own; measured when not given.
        results: a file of JSON lines, written set by set; a run that was stopped continues from it.
        progress: is told every row.

    Raises:
        InvalidInput: an argument cannot be used, or `results` holds another run.
    """
    before = unedited(language, facts, held_out=held_out) if before is None else before
    sets = _sets(facts, sizes)
    if before.facts != tuple(facts) or before.held_out != tuple(held_out):
        raise InvalidInput("evaluate_facts was given before for other facts or texts; measure it for these, `unedited`")
    run = _Run(language, before, editor, parameters, keep, joint, skip_failed, margin)
    if fingerprint(language.model) != before.fingerprint:
        raise InvalidInput("evaluate_facts was given before for other weights; measure it for these, with `unedited`")
    header = {} if results is None else _header(run, language, editor, before, parameters, keep, sets)
    with Log(results, header) as log:
        judge = Judge(language, before, run.network)
        log.start(base_perplexity=_finite(before.perplexity))
        rows = [_row(line) for line in log.lines]
        for first, size in sets[len(rows) :]:
            made = run.made(range(first, first + size))
            row = FactsRow(size, first, **made.facts, **vars(judge.judge(made.params, range(first, first + size))))
            row = replace(row, perplexity=_finite(row.perplexity))
            rows.append(row)
            log.append(asdict(row))
            if progress is not None:
                progress(row)
    return FactsReport(run.name, before, tuple(rows))


def _header(
    run: _Run,
    language: CausalLM,
    editor: Editor | Makes,
    before: Unedited,
    parameters: str | Sequence[str],
    keep: Locality | None,
    sets: list[list[int]],
) -> dict[str, Any]:
    """Return what two runs must share for one to continue the other."""
    return {
        "format": 2,
        "model": identity(language),
        "generation": identity(vars(language.model.generation_config)),
        "facts": digest(list(before.facts)),
        "held_out": digest(list(before.held_out)),
        "editor": identity(editor),
        "parameters": [parameters] if isinstance(parameters, str) else list(parameters),
        "keep": identity(keep),
        "settings": run.settings,
        "decoded": [before.tokens, before.continuation, before.continuations],
        "sets": sets,
    }


@dataclass(frozen=True)
class _Made:
    """An edited model: its parameters, and what it took to get there."""

    params: Params
    facts: dict[str, Any]


class _Run:
    """Makes the edits of one evaluation."""

    def __init__(
        self,
        language: CausalLM,
        before: Unedited,
        editor: Editor | Makes,
        parameters: str | Sequence[str],
        keep: Locality | None,
        joint: bool,
        skip_failed: bool,
        margin: float,
    ) -> None:
        self._language = replace(language, settings={**language.settings, "max_new_tokens": before.tokens})
        self._keep, self._joint, self._skip_failed, self._margin = keep, joint, skip_failed, margin
        self.settings = {"joint": joint, "skip_failed": skip_failed, "margin": margin}
        self._facts, self._fingerprint = before.facts, before.fingerprint
        first = editor if isinstance(editor, Editor) else editor(before.facts[:1])
        self.name = repr(first)
        asked = demand(self._language, before.facts[0], margin)
        ready, _, self.network = prepared(language.model, parameters, first, keep, asked)
        self._rooms = (dict(first.slots), tuple(first.taps))
        self._makes: Makes = (lambda some: ready) if isinstance(editor, Editor) else editor

    def made(self, places: range) -> _Made:
        """Edit the facts at these places, one on another or at once."""
        network, held, steps, seconds, peaks = self.network, 0, 0, 0.0, list[int | None]()
        groups = [list(places)] if self._joint else [[place] for place in places]
        for group in groups:
            # of like length side by side: they go through the model together
            facts = sorted((self._facts[place] for place in group), key=self._length)
            editor = self._makes(facts)
            if (dict(editor.slots), tuple(editor.taps)) != self._rooms:
                raise InvalidInput(f"the editor of {facts[0].prompt!r:.60} looks at other modules than the first one's")
            with preserved_rng(network.device):
                torch.manual_seed(group[0])
                with measured(network.device) as cost:
                    solved = solve(network, self._asked(facts), editor, self._keep)
            held += solved.result.held
            steps, seconds = steps + solved.steps, seconds + cost.seconds
            peaks.append(cost.peak_bytes)
            if solved.result is not Result.nonfinite and (solved.result.held or not self._skip_failed):
                network = network.restarted(solved.params)
        params, nbytes = _shipped(self._language.model, network.rounded(network.start), self._fingerprint)
        known = [peak for peak in peaks if peak is not None]
        facts_of = {"held": held, "edits": len(groups), "steps": steps, "seconds": seconds}
        return _Made(params, facts_of | {"peak_bytes": max(known) if known else None, "patch_bytes": nbytes})

    def _length(self, fact: Fact) -> int:
        asked = demand(self._language, fact)
        return int(asked.source["input_ids"].shape[1]) + len(asked.answer)

    def _asked(self, facts: Sequence[Fact]) -> Constraint:
        """Ask for facts; several at once without rivals, of which nobody could say where their keys are."""
        asked = [demand(self._language, fact, self._margin) for fact in facts]
        if len(asked) == 1:
            return asked[0]
        return All(tuple(Says(part.source, part.answer, part.frame, part.margin) for part in asked))


def _shipped(model: nn.Module, params: Params, base: str) -> tuple[Params, int]:
    """Return the parameters as a patch of the base makes them, and how many bytes it takes."""
    own, gates = dict(model.state_dict()), dict[str, Gate]()
    for layer in [name.removesuffix(f".{GATE}.radii") for name in params if name.endswith(f".{GATE}.radii")]:
        keys, radii, values = (params[f"{layer}.{GATE}.{part}"] for part in ("keys", "radii", "values"))
        if bool((used := radii >= 0).any()):
            gates[layer] = Gate(keys[used], radii[used], values[used])
    plain = {name: value for name, value in params.items() if f".{GATE}." not in name}
    patch = Patch.between(own, plain, fingerprint=base, gates=gates)
    composed = {name: value.to(params[name].device) for name, value in patch.result(own).items()}
    return {**params, **composed}, patch.nbytes


def _sets(facts: Sequence[Fact], sizes: Sequence[int] | Mapping[int, int]) -> list[list[int]]:
    """Return the first place and the size of each set."""
    counts = sizes if isinstance(sizes, Mapping) else {size: len(facts) // max(size, 1) for size in sizes}
    for size, count in counts.items():
        if size < 1 or count < 1 or size * count > len(facts):
            raise InvalidInput(
                f"evaluate_facts was given {len(facts)} facts for {max(count, 1)} sets of {size}; expected "
                "enough facts, and sizes of at least 1"
            )
    return [[place * size, size] for size, count in counts.items() for place in range(count)]


def _row(line: Mapping[str, Any]) -> FactsRow:
    shares = {name: Share(**line[name]) for name in ("said", "paraphrases", "same", "right")}
    return FactsRow(**{**line, **shares})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
