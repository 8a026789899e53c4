"""The pages of sequence models: what an edit did, or how two models differ, sentence by sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...constraints import Constraint
from ...editing import Edit
from ...errors import InvalidInput
from ...network import preserved_rng
from ...verdict import Limits
from ..scoring import Scoring
from ..sentences import Answering, SentenceComparison, compare_sentences, patched
from ._judgement import judgement, of_edit
from ._made import facts, made
from ._render import page_path, write
from ._sentences import Saying, Sentences, sayings, sentences

__all__ = ["sentence_comparison_page", "sentence_page"]

_LIMITS = Limits()


def sentence_page(
    path: str | os.PathLike[str],
    *,
    kind: Answering,
    edit: Edit,
    constraint: Constraint | None = None,
    sources: Sequence[str] = (),
    texts: Sequence[str] = (),
    references: Sequence[str] | None = None,
    scoring: Scoring | None = None,
    comparison: SentenceComparison | None = None,
    limits: Limits = _LIMITS,
) -> Path:
    """Write what an edit of a sequence model did as an HTML page, with every number in a JSON file beside it.

    Every text is answered with and without the patch; the model is left as it is. Answers that changed are shown word
    by word, the most harm first: by the loss of the score of each where there are references, else by how many of the
    words changed.

    Args:
        path: where the page goes, which is returned; the numbers go to the same name with the suffix `.json`.
        kind: the model that was edited, without the patch, as `weightpatch.tasks.text.load` returns it.
        edit: what `weightpatch.edit` returned for it.
        constraint: what was asked; the edit's own when not given.
        sources: the texts that the demands are about, in order; read from their tokens when not given, which a chat
            template or a truncation does not allow.
        texts: n other texts on which to measure what else changed.
        references: n right answers to these.
        scoring: how answers are judged by references; BLEU and chrF when not given.
        comparison: what `compare_sentences` returned for this patch, in place of the last three.
        limits: what the verdict goes by.

    Raises:
        InvalidInput: the texts cannot be used, or the path is not that of a page.
        MissingExtra: Jinja2, matplotlib or, where it is needed, sacrebleu is not installed.
    """
    place = page_path(path)
    if (comparison is None) == (not texts):
        raise InvalidInput("a sentence page needs texts to measure on, or a comparison, and not both")
    found = compare_sentences(kind, edit.patch, texts, references, scoring) if comparison is None else comparison
    asked = edit.constraint if constraint is None else constraint
    with preserved_rng(), torch.no_grad():
        told = sayings(kind, asked, patched(kind.model, edit.patch), patched(kind.model, None), sources)
    seen = sentences(found, [saying.text for saying in told])
    verdict = found.judge(limits) & edit.judge(limits)
    view = {
        "edit": edit,
        "held": edit.result.held,
        "judged": of_edit(edit, verdict),
        "sayings": told,
        "sentences": seen,
        **made(edit),
    }
    return write(
        place, "sentence_edit.html.j2", view, _facts(edit, told, seen, limits) | {"verdict": verdict.to_json()}
    )


def sentence_comparison_page(
    path: str | os.PathLike[str], comparison: SentenceComparison, *, title: str, limits: Limits = _LIMITS
) -> Path:
    """Write what `compare_sentences` found as an HTML page, with every number in a JSON file beside it.

    Args:
        path: where the page goes, which is returned; the numbers go to the same name with the suffix `.json`.
        comparison: what `compare_sentences` returned.
        title: the page's heading, such as "v41 -> v42".
        limits: what the verdict goes by.

    Raises:
        InvalidInput: the path is not that of a page.
        MissingExtra: Jinja2 or matplotlib is not installed.
    """
    place = page_path(path)
    verdict = comparison.judge(limits)
    view = {"judged": judgement(title, verdict), "sentences": sentences(comparison)}
    facts = {"title": title, "verdict": verdict.to_json(), "comparison": comparison.to_json(limits)}
    return write(place, "sentence_comparison.html.j2", view, facts)


def _facts(edit: Edit, told: Sequence[Saying], seen: Sentences, limits: Limits) -> dict[str, Any]:
    return {
        **facts(edit),
        "sayings": [asdict(saying) for saying in told],
        "comparison": seen.comparison.to_json(limits),
        "kinds": {"worse": seen.worse, "better": seen.better, "equal": seen.equal},
    }
