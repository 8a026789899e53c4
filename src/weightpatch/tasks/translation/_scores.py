"""BLEU and chrF, by sacreBLEU with its own defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightpatch.errors import InvalidInput, MissingExtra


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the BLEU score of n translations, 0 to 100 (Papineni et al. 2002; tokenised as sacreBLEU does: 13a)."""
    return _score("BLEU", answers, references)


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the chrF2 score of n translations, 0 to 100 (Popović 2015)."""
    return _score("CHRF", answers, references)


def _score(name: str, answers: Sequence[str], references: Sequence[str]) -> float:
    if not answers or len(answers) != len(references):
        raise InvalidInput(
            f"{name} was given {len(answers)} translations and {len(references)} references; expected as many"
        )
    return float(metric(name).corpus_score(list(answers), [list(references)]).score)


def metric(name: str) -> Any:
    """Return sacreBLEU's metric of that name, which tells its signature after a score."""
    try:
        import sacrebleu
    except ImportError as error:
        raise MissingExtra('BLEU and chrF need sacrebleu; pip install "weightpatch[mt]"') from error
    return getattr(sacrebleu, name)()
