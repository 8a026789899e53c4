"""How answers in words are judged by references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from ..bounds import Estimate, paired_difference
from ..errors import MissingExtra
from .metrics import paired_bootstrap

__all__ = ["Scoring", "translated", "verbatim"]


@final
@dataclass(frozen=True)
class Scoring:
    """One score of all answers, and one of each: from 0 to 100, the higher the better.

    Args:
        name: of the score of all, such as BLEU.
        whole: returns it for n answers and n references.
        lost: returns how much of it is lost, with a paired interval, for n answers before, n answers after, n
            references and the level of the interval, such as 0.95.
        part: of the score of each, such as chrF.
        each: returns it for one answer and its reference.
        signature: what it takes to compute the same scores elsewhere.
    """

    name: str
    whole: Callable[[Sequence[str], Sequence[str]], float]
    lost: Callable[[Sequence[str], Sequence[str], Sequence[str], float], Estimate]
    part: str
    each: Callable[[str, str], float]
    signature: str = ""


def translated() -> Scoring:
    """Return BLEU of all answers and chrF2 of each, as sacreBLEU computes them unless told otherwise.

    The interval of what BLEU lost is that of a paired bootstrap over sentences, 1,000 seeded draws (Koehn 2004).

    Raises:
        MissingExtra: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise MissingExtra('BLEU and chrF need sacrebleu; pip install "weightpatch[mt]"') from error
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    for metric in (bleu, chrf):
        metric.corpus_score(["a"], [["a"]])  # the signature counts the references of the last score
    signature = f"BLEU {bleu.get_signature()}; chrF2 {chrf.get_signature()}"
    return Scoring("BLEU", _of_corpus(bleu), _bleu_lost, "chrF", _of_sentence(chrf), signature)


def verbatim(*, begins: bool = False) -> Scoring:
    """Return accuracy: the answer is the reference, spaces at the ends aside.

    Args:
        begins: it may go on behind the reference, as those of a language model do.
    """

    def right(answer: str, reference: str) -> float:
        answer, reference = answer.strip(), reference.strip()
        return 100.0 * (answer.startswith(reference) if begins else answer == reference)

    def whole(answers: Sequence[str], references: Sequence[str]) -> float:
        return sum(right(*pair) for pair in zip(answers, references, strict=True)) / len(answers)

    def lost(before: Sequence[str], after: Sequence[str], references: Sequence[str], level: float) -> Estimate:
        pairs = [(right(b, r), right(a, r)) for b, a, r in zip(before, after, references, strict=True)]
        broken, repaired = sum(b > a for b, a in pairs), sum(b < a for b, a in pairs)
        return paired_difference(broken, repaired, len(pairs), level).scaled(100)

    return Scoring(
        "accuracy", whole, lost, "accuracy", right, "begins with the reference" if begins else "is the reference"
    )


def _of_corpus(metric: Any) -> Callable[[Sequence[str], Sequence[str]], float]:
    return lambda answers, references: float(metric.corpus_score(list(answers), [list(references)]).score)


def _of_sentence(metric: Any) -> Callable[[str, str], float]:
    return lambda answer, reference: float(metric.sentence_score(answer, [reference]).score)


def _bleu_lost(before: Sequence[str], after: Sequence[str], references: Sequence[str], level: float) -> Estimate:
    from sacrebleu import BLEU

    single = BLEU(effective_order=True)  # of one sentence; its counts are those of any order

    def counts(answer: str, reference: str) -> list[int]:
        found = single.sentence_score(answer, [reference])
        return [found.sys_len, found.ref_len, *found.counts, *found.totals]

    def figure(sums: Sequence[float]) -> float:
        length, wanted, *numbers = (round(number) for number in sums)
        half = len(numbers) // 2  # smoothed as `corpus_score` does
        return float(BLEU.compute_bleu(numbers[:half], numbers[half:], length, wanted, smooth_method="exp").score)

    first = [counts(*pair) for pair in zip(before, references, strict=True)]
    second = [
        first[row] if answer == before[row] else counts(answer, references[row]) for row, answer in enumerate(after)
    ]
    return paired_bootstrap(second, first, figure, level)
