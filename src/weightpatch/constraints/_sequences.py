"""Demands on token sequences, and how a model is asked for the probabilities of one.

A frame turns a source and candidate sequences into one batch and its labels: how models of a kind are called. The
demands know frames, never tokenizers or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor, nn

from .._calling import Function, Inputs, check_batch, leaves, outputs
from ..errors import InvalidInput, ShapeMismatch
from ..likelihoods import Categorical, Of
from ..records import Record
from ._base import Ask, Constraint, Piece
from ._demands import IGNORED, bytes_of
from ._recording import packed, unpacked

__all__ = ["CausalFrame", "Frame", "Preferred", "Says", "Seq2SeqFrame", "token_scores"]

_FEW = 1  # rival, before the tokens of an answer have to win by more
_ROWS = 16  # of a batch of several demands: more gain no time
Decode = Callable[[nn.Module], Tensor]


@dataclass(frozen=True, kw_only=True)
class Frame(ABC):
    """How a kind of model is asked about sequences that follow one source.

    Args:
        pad: the padding token.
        options: further arguments of the model's call, such as ``{"use_cache": False}``.
    """

    pad: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @abstractmethod
    def batch(self, source: Mapping[str, Any], sequences: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
        """Return the model's inputs, a row a sequence, and labels (m, length), `IGNORED` where nothing is asked.

        The logits at a place of the labels are those of that token. Padding is masked.

        Args:
            source: model inputs of one item, (1, ...).
            sequences: m of them, each (tokens,), int64, at least one token.
        """

    def cut(self, inputs: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Return a batch without the first places, where nothing is asked of any row, as far as the model can."""
        return inputs, labels

    def rows(self, sources: Sequence[Mapping[str, Any]], sequences: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
        """Return one batch, padded on the right, in which every sequence follows a source of its own.

        Args:
            sources: m of them, model inputs of one item each.
            sequences: m of them.
        """
        made = [self.batch(source, [s]) for source, s in zip(sources, sequences, strict=True)]
        inputs = dict(made[0][0])
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                filler = 0 if name.endswith("mask") else self.pad
                inputs[name] = _padded([row[name][0] for row, _ in made], filler)
        return inputs, _padded([labels[0] for _, labels in made], IGNORED)


@final
@dataclass(frozen=True, kw_only=True)
class Seq2SeqFrame(Frame):
    """Encoder–decoder models: the source is encoded, the sequence follows `start` in the decoder.

    Args:
        start: the tokens that the decoder starts with; where there are several, as with a language token that is
            forced, the later ones are not scored.
        name: the argument of the model's call that takes the decoder's tokens.
    """

    start: tuple[int, ...]
    name: str = "decoder_input_ids"

    def batch(self, source: Mapping[str, Any], sequences: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
        """Return the source once a sequence, the decoder's tokens, and labels."""
        labels = _padded([_with((IGNORED,) * (len(self.start) - 1), s) for s in sequences], IGNORED)
        begun = [_with(self.start, s)[:-1] for s in sequences]
        inputs = {name: value.expand(len(sequences), *value.shape[1:]) for name, value in source.items()}
        return {**inputs, self.name: _padded(begun, self.pad), **self.options}, labels


@final
@dataclass(frozen=True, kw_only=True)
class CausalFrame(Frame):
    """Decoder-only models: the sequence follows the source's `input_ids`; padding is on the right and masked.

    Args:
        keeps: the argument of the model's call that says of how many last places it returns logits, as
            ``"logits_to_keep"`` of transformers; None where there is none. Those of a long prompt cost more than the
            rest of an edit.
    """

    keeps: str | None = None

    def batch(self, source: Mapping[str, Any], sequences: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
        """Return `input_ids` and `attention_mask`, and labels."""
        prompt = source["input_ids"][0]
        labels = _padded([_with((IGNORED,) * (len(prompt) - 1), s) for s in sequences], IGNORED)
        whole = [torch.cat([prompt, s.to(prompt)])[:-1] for s in sequences]
        mask = _padded([torch.ones_like(row) for row in whole], 0)
        return {"input_ids": _padded(whole, self.pad), "attention_mask": mask, **self.options}, labels

    def cut(self, inputs: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Return inputs that ask for no logits of the prompts before the first place that is asked for."""
        if self.keeps is None:
            return inputs, labels
        first = int((labels != IGNORED).any(0).int().argmax())
        return {**inputs, self.keeps: labels.shape[1] - first}, labels[:, first:]


def token_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p of each label, (m, length), 0 where it is `IGNORED`; logits are (m, length, vocabulary)."""
    asked = labels != IGNORED
    chosen = logits.gather(-1, labels.where(asked, 0)[..., None]).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).where(asked, 0.0)


@final
@dataclass(frozen=True, eq=False)
class Preferred(Constraint):
    """The model prefers a target sequence to every alternative: ``margin + s(alternative) - s(target)``, one a demand.

    s is the mean log-probability of a sequence's tokens, or their sum. Source: the translation constraint of Sinitsin
    et al. (ICLR 2020), ``max_h s(h) - s(target)`` over beam hypotheses h, of which this has every part on its own.

    Args:
        source: model inputs of one item, (1, ...), such as input_ids and attention_mask.
        target: the tokens wanted, (tokens,), int64, with the end token where the model writes one.
        over: the alternatives, likewise.
        frame: how the model is asked, such as ``Seq2SeqFrame(start=(0,), pad=0)``.
        margin: by how much the target wins, in nats; at least 0.
        total: compare sums, not means: then short sequences are preferred.
    """

    source: Mapping[str, Any]
    target: Tensor
    over: tuple[Tensor, ...]
    frame: Frame
    margin: float = 0.0
    total: bool = False
    likelihood: Categorical = Categorical(-1, Of.logits)

    def __post_init__(self) -> None:
        _check(self, "target", self.target)
        object.__setattr__(self, "over", tuple(self.over))
        if not self.over:
            raise InvalidInput("Preferred was given no alternatives; expected at least one sequence in over")
        for place, other in enumerate(self.over):
            _check(self, f"over[{place}]", other)
            if other.tolist() == self.target.tolist():
                raise InvalidInput(f"over[{place}] of Preferred is the target itself; leave it out")

    def violation(self, function: Function) -> Tensor:
        """Return ``margin + s(alternative) - s(target)`` for each alternative, shape (alternatives,)."""
        inputs, labels = self.batch
        scores = token_scores(_logits(function, inputs, labels), labels)
        scores = scores.sum(1) if self.total else scores.sum(1) / (labels != IGNORED).sum(1)
        gap = scores[1:] - scores[0]
        return gap + self.margin + torch.finfo(gap.dtype).tiny * (gap == 0).to(gap.dtype)

    @cached_property
    def batch(self) -> tuple[dict[str, Any], Tensor]:
        """The model's inputs and the labels, the same tensors every time, so that passes are replayed."""
        return self.frame.cut(*self.frame.batch(self.source, (self.target, *self.over)))

    @property
    def batches(self) -> tuple[Inputs, ...]:
        """The one batch of the target and its alternatives."""
        return (self.batch[0],)

    def record(self) -> Record:
        """Write the source, the target, the alternatives and the frame."""
        tensors, told = _recorded(self, [self.target, *self.over])
        return Record("weightpatch/preferred", 1, tensors, told | {"total": self.total})

    @classmethod
    def restored(cls, record: Record) -> Preferred:
        """Read them."""
        source, (target, *over), frame, margin = _restored(record)
        return cls(source, target, tuple(over), frame, margin, bool(record.scalars["total"]))


@final
@dataclass(frozen=True, eq=False)
class Says(Constraint):
    """What the model generates from a prompt is an answer: every token of it beats every other token, in its place.

    That is what greedy decoding needs, and all it needs: by induction, a decode whose every token is the strict winner
    after the ones before it is the answer. Where `decode` is given, what the model really generates has the last word:
    the driver runs it on the edited model, and where it says otherwise (a beam that likes a rival more, a rounding of a
    cache) adds that rival, whose mean log-probability is to be lower, and looks again; from the second rival on every
    token has to win by more, too.

    Args:
        source: model inputs of one item, (1, ...).
        answer: the tokens wanted, (tokens,), int64, with the end token where the answer is to end there.
        frame: how the model is asked.
        margin: by how much each token wins, in logits; at least 0.
        decode: generates from the source with a model and returns the tokens, as many as there are up to the answer's
            length or beyond, without the prompt; None to rely on the induction.
        rivals: what the model generated instead, so far.
    """

    source: Mapping[str, Any]
    answer: Tensor
    frame: Frame
    margin: float = 0.0
    decode: Decode | None = None
    rivals: tuple[Tensor, ...] = ()
    likelihood: Categorical = Categorical(-1, Of.logits)

    def __post_init__(self) -> None:
        _check(self, "answer", self.answer)

    def violation(self, function: Function) -> Tensor:
        """Return ``margin + max_{c != y_t} z_tc - z_ty`` of each token, then the rivals: (tokens + rivals,)."""
        return torch.cat([piece.violation for piece in self.pieces(function)])

    def pieces(self, function: Function) -> list[Piece]:
        """Return the violations, those of tokens with what they are the largest of, shape (tokens, vocabulary)."""
        inputs, labels = self.batch
        return self.judged(_logits(function, inputs, labels), labels)

    def judged(self, logits: Tensor, labels: Tensor) -> list[Piece]:
        """Return the pieces, of the logits of the batch, (m, length, vocabulary), and its labels."""
        asked = labels[0] != IGNORED
        wanted, at = labels[0, asked][:, None], logits[0, asked]
        others = at.scatter(1, wanted, -torch.inf) - at.gather(1, wanted) + self.margin
        gap = others.amax(1)
        tokens = Piece(gap + torch.finfo(gap.dtype).tiny * (gap == self.margin).to(gap.dtype), rivals=others)
        if not self.rivals:
            return [tokens]
        means = token_scores(logits, labels).sum(1) / (labels != IGNORED).sum(1)
        return [tokens, Piece(means[1:] - means[0] + 0.01 * (1 + self.margin))]

    @cached_property
    def batch(self) -> tuple[dict[str, Any], Tensor]:
        """The model's inputs and the labels, the same tensors every time, so that passes are replayed."""
        return self.frame.cut(*self.whole)

    @cached_property
    def whole(self) -> tuple[dict[str, Any], Tensor]:
        """The same, with every place."""
        return self.frame.batch(self.source, (self.answer, *self.rivals))

    def joined(self, other: Constraint) -> Constraint | None:
        """Return both where their batches need no padding to be one."""
        return _Together((self,)).joined(other)

    @property
    def batches(self) -> tuple[Inputs, ...]:
        """The one batch of the answer and its rivals."""
        return (self.batch[0],)

    def asks(self) -> Iterator[Ask]:
        """Yield each token, after those before it: an answer contradicts another one where they part."""
        source = b"".join(bytes_of(leaf) for leaf in leaves(self.source))
        for place, token in enumerate(self.answer.tolist()):
            key = source + b"answer" + bytes_of(self.answer[:place])
            wanted = torch.tensor(token, dtype=torch.float64, device="cpu")
            yield Ask(key, wanted, 0.0, partial(_token, place))

    def record(self) -> Record:
        """Write the source, the answer, its rivals and the frame, without what decodes.

        A demand that comes back asks that every token is the likeliest in its place, which greedy decoding needs, and
        has the rivals of a beam that were found.
        """
        tensors, told = _recorded(self, [self.answer, *self.rivals])
        return Record("weightpatch/says", 1, tensors, told | {"decodes": self.decode is not None})

    @classmethod
    def restored(cls, record: Record) -> Says:
        """Read them."""
        source, (answer, *rivals), frame, margin = _restored(record)
        return cls(source, answer, frame, margin, rivals=tuple(rivals))

    def refined(self, model: nn.Module) -> Says | None:
        """Add what `model` generates instead as a rival, or ask for a larger margin; None where it says the answer."""
        if self.decode is None:
            return None
        said = self.decode(model).to(self.answer)
        if said[: len(self.answer)].tolist() == self.answer.tolist():
            return None
        known = not len(said) or any(said.tolist() == rival.tolist() for rival in self.rivals)
        begun = said.tolist() == self.answer[: len(said)].tolist()
        rivals = self.rivals if known or begun else (*self.rivals, said)
        # a beam has always one more where the answer barely wins: it runs out of them as its tokens grow likelier
        margin = self.margin if len(self.rivals) < len(rivals) <= _FEW else 2 * self.margin + 0.05
        return replace(self, rivals=rivals, margin=margin)


@final
@dataclass(frozen=True, eq=False)
class _Together(Constraint):
    """Demands of which each is some rows of one batch, unpadded: a place counted from an end stays where it was."""

    parts: tuple[Says, ...]

    def violation(self, function: Function) -> Tensor:
        inputs, labels = self._batch
        sizes = [len(part.whole[1]) for part in self.parts]
        logits = torch.split(_logits(function, inputs, labels), sizes)
        rows = zip(logits, torch.split(labels, sizes), strict=True)
        judged = [piece for part, own in zip(self.parts, rows, strict=True) for piece in part.judged(*own)]
        return torch.cat([piece.violation for piece in judged])

    def joined(self, other: Constraint) -> Constraint | None:
        if not isinstance(other, Says) or sum(len(part.whole[1]) for part in (*self.parts, other)) > _ROWS:
            return None
        options = (*self.parts[0].frame.options.values(), *other.frame.options.values())
        if any(isinstance(value, Tensor) for value in options):  # which of its dimensions is that of items?
            return None
        return _Together((*self.parts, other)) if _shape(*self.parts[0].whole) == _shape(*other.whole) else None

    @cached_property
    def _batch(self) -> tuple[dict[str, Any], Tensor]:
        batches = [part.whole for part in self.parts]
        inputs = {
            name: torch.cat([some[name] for some, _ in batches]) if isinstance(value, Tensor) else value
            for name, value in batches[0][0].items()
        }
        return self.parts[0].frame.cut(inputs, torch.cat([labels for _, labels in batches]))


def _shape(inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """Return what batches have in common whose rows can be one batch."""
    return {"": labels.shape[1:]} | {
        name: (value.shape[1:], value.dtype) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }


def _logits(function: Function, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    logits = outputs(function, inputs)
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ShapeMismatch(
            f"the model returned shape {tuple(logits.shape)}; a demand on sequences expects logits of shape "
            f"({labels.shape[0]}, {labels.shape[1]}, vocabulary)"
        )
    return logits


def _check(demand: Preferred | Says, name: str, tokens: Tensor) -> None:
    who = type(demand).__name__
    if name in ("target", "answer"):
        n = check_batch(demand.source, who)
        if n != 1:
            raise InvalidInput(f"{who} was given a source of {n} items; expected one, and & joins demands")
        if not 0 <= demand.margin < float("inf"):
            raise InvalidInput(f"{who} was given margin={demand.margin}; expected a finite number, at least 0")
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 1 or not len(tokens):
        given = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)[:80]
        raise InvalidInput(f"{who} was given {name} as {given}; expected token numbers, int64 of shape (tokens,)")
    if int(tokens.min()) < 0:
        raise InvalidInput(f"{who} was given {name} with token {int(tokens.min())}; expected numbers of at least 0")


def _with(first: Sequence[int], tokens: Tensor) -> Tensor:
    return torch.cat([tokens.new_tensor(first), tokens])


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """Return rows of different lengths as one tensor, (m, longest)."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _token(place: int, _: int, token: float) -> str:
    return f"token {int(token)} at place {place}"


def _recorded(demand: Preferred | Says, sequences: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, source = packed(demand.source, "source")
    tensors |= {f"tokens{place}": tokens for place, tokens in enumerate(sequences)}
    frame: dict[str, Any] = {f.name: getattr(demand.frame, f.name) for f in fields(demand.frame)}
    frame = {name: list(value) if isinstance(value, tuple) else value for name, value in frame.items()}
    options = frame["options"] = dict(frame["options"])
    odd = [name for name, value in options.items() if not isinstance(value, (bool, int, float, str, type(None)))]
    kind = type(demand.frame)
    if odd or kind not in _FRAMES.values():
        what = f"options {odd}" if odd else f"a {kind.__name__}"
        raise InvalidInput(f"its frame has {what}, which a patch file cannot hold")
    name = next(name for name, known in _FRAMES.items() if known is kind)
    told = {"source": source, "sequences": len(sequences), "margin": float(demand.margin), "frame": {name: frame}}
    return tensors, told


def _restored(record: Record) -> tuple[Mapping[str, Any], list[Tensor], Frame, float]:
    told: Mapping[str, Any] = record.scalars
    ((name, given),) = told["frame"].items()
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    source, count = unpacked(told["source"], record.tensors), told["sequences"]
    if not isinstance(source, dict) or not isinstance(count, int):
        raise ValueError("a source is no mapping")
    sequences = [record.tensors[f"tokens{place}"] for place in range(count)]
    return source, sequences, _FRAMES[name](**plain), float(told["margin"])


_FRAMES: dict[str, Any] = {"seq2seq": Seq2SeqFrame, "causal": CausalFrame}
