"""Two sequence models on the same texts: which answers changed, by how much, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from .._calling import Name, check_names, outputs
from ..errors import InvalidInput
from ..likelihoods import Categorical, Of
from ..network import preserved_rng, structural_clone
from ..patches import Patch
from ..verdict import Changed, Limits, Verdict, judge_edit, judge_score
from .differences import distance
from .metrics import Estimate, bootstrap_mean, wilson
from .scoring import Scoring, translated

__all__ = ["Answering", "SentenceComparison", "compare_sentences", "patched"]

_BATCH = 16
_LIMITS = Limits()


class Answering(Protocol):
    """A model that answers texts, as those of `weightpatch.tasks.text` do."""

    @property
    def model(self) -> nn.Module:
        """The model, which is never changed."""

    def generate(self, texts: Sequence[str], model: nn.Module | None = None) -> list[Tensor]:
        """Return the tokens of the answers to n texts, of another model of this kind where one is given."""

    def text(self, tokens: Tensor) -> str:
        """Return an answer's text."""

    def forced(self, texts: Sequence[str], answers: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """Return inputs that ask for every token of n answers, and these as labels, below 0 where none is asked."""


@final
@dataclass(frozen=True, eq=False)
class SentenceComparison:
    """The answers of two models to n texts.

    Attributes:
        texts: n of them.
        before: the answers of the first model.
        after: those of the second.
        kl: mean KL(before || after) over the tokens of each answer before, nats.
        drift: the same over all tokens of all answers.
        references: right answers, or None.
        scoring: how answers are judged by these, or None.
        items: what each text is called where it came from, such as its line; its place when not given.
    """

    texts: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    kl: tuple[float, ...]
    drift: float
    references: tuple[str, ...] | None = None
    scoring: Scoring | None = None
    items: Sequence[Name] | None = None

    def __post_init__(self) -> None:
        check_names(self.items, len(self.texts), "texts")
        sizes = {len(part) for part in (self.texts, self.before, self.after, self.kl, self.references or self.texts)}
        if len(sizes) > 1 or not self.texts:
            raise InvalidInput(
                f"given were {len(self.texts)} texts, {len(self.before)} and {len(self.after)} answers, "
                f"{len(self.kl)} divergences and {len(self.references or ())} references; expected as many, at least 1"
            )
        if (self.references is None) != (self.scoring is None):
            raise InvalidInput("references and scoring belong together; give both or neither")

    @property
    def n(self) -> int:
        """How many texts."""
        return len(self.texts)

    @cached_property
    def changed(self) -> tuple[int, ...]:
        """The rows whose answers changed, the most harm first."""
        rows = [i for i in range(self.n) if self.before[i] != self.after[i]]
        return tuple(sorted(rows, key=lambda i: (-self.harm(i), -self.kl[i], i)))

    @property
    def share(self) -> Estimate:
        """The share of answers that changed, with Wilson's 95 % interval."""
        return wilson(len(self.changed), self.n)

    def harm(self, row: int) -> float:
        """Return what a row lost: its score's loss where there is one, else the share of its words that changed."""
        pair = self.scored(row)
        return distance(self.before[row], self.after[row]) if pair is None else pair[0] - pair[1]

    def scored(self, row: int) -> tuple[float, float] | None:
        """Return the scores of a row's answers, before and after; None without a reference."""
        if self.scoring is None or self.references is None:
            return None
        before, after, reference = self.before[row], self.after[row], self.references[row]
        first = self.scoring.each(before, reference)
        return first, first if after == before else self.scoring.each(after, reference)

    @cached_property
    def scores(self) -> tuple[float, float] | None:
        """The score of all answers, before and after; None without references."""
        if self.scoring is None or self.references is None:
            return None
        before = self.scoring.whole(self.before, self.references)
        return before, self.scoring.whole(self.after, self.references) if self.changed else before

    @cached_property
    def drawdown(self) -> Estimate | None:
        """The loss of the score of all answers, in its points, with a paired 95 % interval; None without references."""
        if self.scoring is None or self.references is None:
            return None
        return self.scoring.lost(self.before, self.after, self.references, _LIMITS.level)

    @cached_property
    def loss(self) -> Estimate | None:
        """The mean loss of the score of each answer, with a bootstrap interval; None without references."""
        if self.scoring is None:
            return None
        changed = set(self.changed)
        return bootstrap_mean([self.harm(i) if i in changed else 0.0 for i in range(self.n)])

    def judge(self, limits: Limits = _LIMITS) -> Verdict:
        """Judge the second model by the share of answers that changed, and by what the score of all answers lost."""
        changed = Changed(len(self.changed), self.n, "answers")
        if self.scoring is None or self.references is None:
            return judge_edit(None, changed, limits)
        lost = self.scoring.lost(self.before, self.after, self.references, limits.level)
        return judge_score(lost, changed, self.scoring.name, limits)

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the second model may take the first one's place: green, amber or red by the usual limits."""
        return self.judge()

    def __str__(self) -> str:
        told = f"{len(self.changed)} of {self.n} answers changed ({100 * self.share.value:.2f} %), "
        if self.scores is not None and self.scoring is not None and self.drawdown is not None:
            told += f"{self.scoring.name} {self.scores[0]:.2f} -> {self.scores[1]:.2f} ({_change(self.drawdown)}), "
        return told + f"drift {self.drift:.2g} nats, verdict {self.verdict.level.name}"

    def name(self, row: int) -> Name:
        """Return what a text is called, of its place."""
        return row if self.items is None else self.items[row]

    def to_json(self, limits: Limits = _LIMITS) -> dict[str, Any]:
        """Return every number, the verdict, and the texts of the rows that changed."""
        loss, lost, scoring = self.loss, self.drawdown, self.scoring
        return {
            "n": self.n,
            "changed": len(self.changed),
            "share": asdict(self.share),
            "drift": self.drift,
            "scoring": None if scoring is None else {"name": scoring.name, "signature": scoring.signature},
            "scores": None if self.scores is None else {"before": self.scores[0], "after": self.scores[1]},
            "drawdown": None if lost is None else asdict(lost),
            "loss": None if loss is None else asdict(loss),
            "verdict": self.judge(limits).to_json(),
            "rows": [self._row(i) for i in self.changed],
        }

    def _row(self, row: int) -> dict[str, Any]:
        pair = self.scored(row)
        return {
            "item": self.name(row),
            "text": self.texts[row],
            "before": self.before[row],
            "after": self.after[row],
            "reference": None if self.references is None else self.references[row],
            "scores": None if pair is None else {"before": pair[0], "after": pair[1]},
            "kl": self.kl[row],
        }


@torch.no_grad()
def compare_sentences(
    kind: Answering,
    after: Patch | nn.Module | None,
    texts: Sequence[str],
    references: Sequence[str] | None = None,
    scoring: Scoring | None = None,
    items: Sequence[Name] | None = None,
) -> SentenceComparison:
    """Answer texts with a model and with another one of its kind; both are left as they are.

    Args:
        kind: the model, as `weightpatch.tasks.text.load` returns it.
        after: a patch of it, or another model; None for the model itself.
        texts: n sources or prompts.
        references: n right answers.
        scoring: how answers are judged by these; BLEU and chrF when not given.
        items: what each text is called where it came from, such as its line.

    Raises:
        MissingExtra: sacrebleu is not installed, and no scoring is given for the references.
    """
    scoring = translated() if references is not None and scoring is None else scoring
    other = patched(kind.model, after) if isinstance(after, Patch) else after
    with preserved_rng():
        first = kind.generate(texts)
        second = first if other is None else kind.generate(texts, other)
        kl, drift = ([0.0] * len(texts), 0.0) if other is None else _divergences(kind, other, texts, first)
    told = None if references is None else tuple(references)
    before, now = (tuple(kind.text(tokens) for tokens in answers) for answers in (first, second))
    return SentenceComparison(tuple(texts), before, now, tuple(kl), drift, told, scoring, items)


def patched(model: nn.Module, patch: Patch | None) -> nn.Module:
    """Return the model with a patch on, in evaluation mode; it shares what the patch does not change."""
    clone = structural_clone(model)
    if patch is not None:
        for entry in patch.manifest.tensors:
            own = clone.get_parameter(entry.name)
            own.data = own.detach().clone()
        patch.apply(clone)
    return clone


def _change(lost: Estimate) -> str:
    """Return a loss as a change, with its interval."""
    value, low, high = (0.0 - edge for edge in (lost.value, lost.high, lost.low))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _divergences(kind: Answering, other: nn.Module, texts: Sequence[str], answers: Sequence[Tensor]) -> Any:
    """Return the mean KL of each answer, and that over all tokens."""
    order = sorted(range(len(texts)), key=lambda i: len(answers[i]))
    found, total, tokens, same = [0.0] * len(texts), 0.0, 0, structural_clone(kind.model)
    for begin in range(0, len(order), _BATCH):
        some = order[begin : begin + _BATCH]
        inputs, labels = kind.forced([texts[i] for i in some], [answers[i] for i in some])
        asked = labels >= 0
        logits = (outputs(model, inputs)[asked].float() for model in (same, other))
        kl = torch.zeros(asked.shape, dtype=torch.float64, device="cpu")
        kl[asked.cpu()] = Categorical(-1, Of.logits).divergence(*logits).double().cpu()
        counts = asked.cpu().reshape(len(some), -1).sum(1)
        sums = kl.reshape(len(some), -1).sum(1)
        for place, row in enumerate(some):
            found[row] = float(sums[place] / counts[place])
        total, tokens = total + float(sums.sum()), tokens + int(counts.sum())
    return found, total / tokens
