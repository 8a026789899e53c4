"""The protocol for sequence models: many edits of one model, and what each does to what it generates elsewhere."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from weightpatch._calling import Name, check_names
from weightpatch._identity import different, digest, identity
from weightpatch.constraints import IGNORED, Constraint, Preferred, Says
from weightpatch.editing import Result, solve
from weightpatch.editors import Editor
from weightpatch.errors import InvalidInput
from weightpatch.evaluation.generations import FastGenerations
from weightpatch.evaluation.guessing import Guessing
from weightpatch.evaluation.log import Log
from weightpatch.evaluation.metrics import Estimate, bootstrap_mean, wilson
from weightpatch.evaluation.standing import Forced
from weightpatch.locality import Locality
from weightpatch.network import Network, preserved_rng
from weightpatch.preparing import prepared
from weightpatch.tasks.text._generating import Decoding, Generating
from weightpatch.tasks.text._readout import readout_of
from weightpatch.tasks.text._writing import greedy_writer

__all__ = ["GenerationReport", "GenerationRow", "evaluate", "generations"]

Score = Callable[[Sequence[str], Sequence[str]], float]

_TOKENS = 4000  # of one pass over the test set's answers
# What `generate` may do to logits before it takes the largest one, by the setting and what turns it off
_PLAIN = {
    "num_beams": (1, None),
    "do_sample": (False, None),
    "repetition_penalty": (1.0, None),
    "encoder_repetition_penalty": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None),
    "bad_words_ids": (None,),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
}


@final
@dataclass(frozen=True)
class GenerationRow:
    """One edit of a sequence model.

    Attributes:
        index: its place in the sequence of edits.
        result: how it ended, checked on the final weights in the model's own dtype.
        decoded: whether the model, as deployed, generates what was wanted.
        steps: the updates made.
        violation: the largest violation on the final weights; None where it is not finite.
        seconds: what the edit took, without the test set.
        score: of the edited model's answers to the test set; None without references.
        changed: the share of the test answers that changed at all.
        drift: mean KL(before || after) over the tokens of the test answers, nats.
        anew: how many test answers were generated anew.
        item: what the edit is about, such as a line of a file; None where it was not told.
    """

    index: int
    result: str
    decoded: bool
    steps: int
    violation: float | None
    seconds: float
    score: float | None
    changed: float
    drift: float | None
    anew: int
    item: Name | None = None


@final
@dataclass(frozen=True)
class GenerationReport:
    """What a set of edits of a sequence model did.

    Attributes:
        base_score: of the unedited model's answers; None without references.
        items: how many test items.
        rows: one an edit.
    """

    base_score: float | None
    items: int
    rows: tuple[GenerationRow, ...]

    @property
    def edited(self) -> tuple[GenerationRow, ...]:
        """The rows of edits that did not hold before any step."""
        return tuple(row for row in self.rows if row.result != Result.already_satisfied.name)

    @property
    def success(self) -> Estimate:
        """The share of edits after which the model generates what was wanted, with its 95 % interval."""
        return wilson(sum(row.decoded for row in self.edited), len(self.edited))

    @property
    def drawdowns(self) -> list[float]:
        """The loss of score of every edit, in the score's own points."""
        base = self.base_score
        return [] if base is None else [base - row.score for row in self.edited if row.score is not None]

    @property
    def drawdown(self) -> Estimate:
        """The mean loss of score, signed, with a bootstrap interval."""
        return bootstrap_mean(self.drawdowns)

    def figures(self) -> dict[str, str]:
        """Return the columns of a table: success, steps, drawdown (signed, absolute, max), changed, drift, ms."""
        rows, lost = self.edited, self.drawdowns
        ms = 1000 * statistics.median(row.seconds for row in rows)
        found = {
            "success": f"{100 * self.success.value:.1f} %",
            "steps": f"{statistics.mean(row.steps for row in rows):.2f}",
        }
        if lost:
            found |= {
                "drawdown": f"{statistics.mean(lost):+.3f}",
                "absolute": f"{statistics.mean(map(abs, lost)):.3f}",
                "max": f"{max(lost):+.2f}",
            }
        drifts = [row.drift for row in rows if row.drift is not None]
        return found | {
            "changed": f"{100 * statistics.mean(row.changed for row in rows):.2f} %",
            "KL a token": f"{statistics.mean(drifts):.5f}" if drifts else "not finite",
            "ms an edit": f"{ms:.0f}",
        }


def evaluate(
    kind: Generating,
    edits: Sequence[Constraint],
    editor: Editor,
    *,
    texts: Sequence[str],
    references: Sequence[str] | None = None,
    score: Score | None = None,
    parameters: str | Sequence[str] = "*",
    keep: Locality | None = None,
    items: Sequence[Name] | None = None,
    results: str | Path | None = None,
    progress: Callable[[GenerationRow], None] | None = None,
) -> GenerationReport:
    """Make many edits of one model, each on its own, and generate the test set again after each.

    Success is what the model, as deployed (`kind.settings`), generates from the edited source; never what is likely
    under teacher forcing. Test answers are those of a full decode of the edited model, but only what the edit can
    change is decoded; see `FastGenerations`.

    Args:
        kind: the model; it is left as it is.
        edits: what must become true, one an edit: `Says`, `Preferred`, or several of these.
        editor: how.
        texts: the test set's sources or prompts.
        references: right answers to these, for `score`.
        score: of n answers and n references, such as `weightpatch.tasks.translation.bleu`.
        parameters: which parameters may move, as one or several glob patterns of their names.
        keep: what should stay, for editors that use it.
        items: what each edit is about, for its row of the report, such as a line of a file.
        results: a file of JSON lines, written edit by edit; a run that was stopped continues from it, and so does one
            that asks for more edits behind the same ones.
        progress: is told every row.

    Raises:
        InvalidInput: an argument cannot be used, or `results` holds another run.
    """
    if not edits or not texts or (references is None) != (score is None):
        raise InvalidInput(
            f"evaluate was given {len(edits)} edits, {len(texts)} texts, references {references is not None} and score "
            f"{score is not None}; expected at least one edit and text, and references and score together"
        )
    check_names(items, len(edits), "edits")
    header = _header(kind, editor, texts, references, score, parameters, keep) if results is not None else {}
    names = [_name(edit) if results is not None else "" for edit in edits]
    if keep is not None:
        plain = Network(kind.model, parameters)
        with plain.isolated():
            keep = keep.of(edits[0]).fitted(plain.before)
    editor, _, network = prepared(kind.model, parameters, editor, keep, edits[0])
    if keep is not None:
        keep = keep.bind(network.before)  # once for all edits
    with Log(results, header) as log:
        fast = generations(kind, network, texts)
        answers = [kind.text(tokens) for tokens in fast.base]
        base = None if score is None or references is None else score(answers, references)
        log.start(base_score=base)
        rows = _continued(log, names)
        for index in range(len(rows), len(edits)):
            with preserved_rng(network.device):
                torch.manual_seed(index)
                facts, params = _made(kind, network, edits[index], editor, keep, index)
            found = fast.predict(params)
            new = list(answers)
            for item, tokens in found.changed.items():
                new[item] = kind.text(tokens)
            again = base if not found.changed or score is None or references is None else score(new, references)
            row = GenerationRow(
                **facts,
                score=again,
                changed=len(found.changed) / len(texts),
                drift=found.drift if math.isfinite(found.drift) else None,
                anew=found.anew,
                item=None if items is None else items[index],
            )
            rows.append(row)
            log.append({"edit": names[index], **asdict(row)})
            if progress is not None:
                progress(row)
    return GenerationReport(base, len(texts), tuple(rows))


def _header(
    kind: Generating,
    editor: Editor,
    texts: Sequence[str],
    references: Sequence[str] | None,
    score: Score | None,
    parameters: str | Sequence[str],
    keep: Locality | None,
) -> dict[str, Any]:
    """Return what two runs must share, beside their edits, for one to continue the other."""
    return {
        "format": 3,
        "model": identity(kind),
        "generation": identity(vars(kind.model.generation_config)),
        "parameters": [parameters] if isinstance(parameters, str) else list(parameters),
        "editor": identity(editor),
        "texts": digest([list(texts), None if references is None else list(references)]),
        "score": identity(score),
        "keep": identity(keep),
    }


def _continued(log: Log, names: Sequence[Any]) -> list[GenerationRow]:
    """Return the rows that a file has already of these edits, by their names."""
    rows = []
    for place, (line, name) in enumerate(zip(log.lines, names, strict=False)):
        if told := different(f"its edit {place}", line.get("edit"), name):
            raise InvalidInput(f"the results file holds another run: {told[0]}. Name another file, or move this away")
        rows.append(GenerationRow(**{key: value for key, value in line.items() if key != "edit"}))
    return rows


def _name(edit: Constraint) -> Any:
    """Name an edit by its content, without what decodes: that is the model, which is compared by itself."""
    parts = [replace(part, decode=None) if isinstance(part, Says) else part for part in edit.conjuncts]
    return identity(parts, whole=True)


def _made(
    kind: Generating, network: Network, edit: Constraint, editor: Editor, keep: Locality | None, index: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    began = time.monotonic()
    solved = solve(network, edit, editor, keep)
    seconds = time.monotonic() - began
    held = solved.result.held or solved.result is Result.over_budget
    decoded = _decoded(kind, edit, network, solved.params) if held else False
    facts = {
        "index": index,
        "result": solved.result.name,
        "decoded": decoded,
        "steps": solved.steps,
        "violation": solved.after if math.isfinite(solved.after) else None,
        "seconds": seconds,
    }
    return facts, solved.params


@torch.no_grad()
def _decoded(kind: Generating, edit: Constraint, network: Network, params: dict[str, Tensor]) -> bool:
    """Say whether the edited model generates what every part of an edit wants."""
    model = network.deployed(params)
    for part in edit.conjuncts:
        if isinstance(part, (Says, Preferred)):
            wanted = part.answer if isinstance(part, Says) else part.target
            found = Decoding(kind, part.source)(model)
            if found[: len(wanted)].tolist() != wanted.tolist():
                return False
    return True


def generations(kind: Generating, network: Network, texts: Sequence[str]) -> FastGenerations:
    """Return what answers a test set anew after every edit of one model.

    Args:
        kind: the model.
        network: a view of it.
        texts: the test set's sources or prompts.
    """
    base = kind.generate(texts)
    config: Any = kind.model.generation_config
    limit, last = kind.limit, config.forced_eos_token_id
    order = sorted(range(len(texts)), key=lambda i: len(base[i]))
    forced, begun = [], 0
    while begun < len(order):
        end = begun + 1
        while end < len(order) and (end + 1 - begun) * len(base[order[end]]) <= _TOKENS:
            end += 1
        some = order[begun:end]
        inputs, labels = kind.forced([texts[i] for i in some], [base[i] for i in some])
        for row, item in enumerate(some):
            if len(base[item]) == limit and last is not None:  # written by the limit, not by the model
                labels[row, (labels[row] >= 0).nonzero()[-1]] = IGNORED
        forced.append(Forced(tuple(some), inputs, labels))
        begun = end

    encoded = kind.encoded(texts, network.names)
    writer = greedy_writer(kind, encoded, base, last) if encoded is not None and greedy(kind) else None

    def anew(model: nn.Module, items: Sequence[int]) -> list[Tensor]:
        if encoded is None:
            return kind.generate([texts[i] for i in items], model)
        lengths = [len(base[i]) for i in items]
        if writer is not None:
            return writer(model, items, lengths)
        return kind.written(model, lengths, lambda some: encoded([items[i] for i in some]))

    def force(items: Sequence[int], answers: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
        inputs, labels = kind.forced([texts[i] for i in items], answers)
        if encoded is None:
            return inputs, labels
        given = encoded(items)
        kept = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        return {**kept, **given, "encoder_outputs": (given["encoder_outputs"].last_hidden_state,)}, labels

    guessing = Guessing(force, kind.ends, limit, last) if greedy(kind) else None
    readout = readout_of(network.deployed(network.start), network.names)
    return FastGenerations(network, base, forced, anew, guessing=guessing, readout=readout)


def greedy(kind: Generating) -> bool:
    """Say whether the model, as deployed, takes the most likely token each time, and does nothing else."""
    own: Any = getattr(kind.model, "generation_config", None)
    for name, off in _PLAIN.items():
        if kind.settings.get(name, {"num_beams": 1, "do_sample": False}.get(name, getattr(own, name, None))) not in off:
            return False
    return True
