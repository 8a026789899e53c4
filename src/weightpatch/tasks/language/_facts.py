"""The nouns of knowledge editing: a fact, and questions that show what else an edit did."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from weightpatch.errors import InvalidInput


@final
@dataclass(frozen=True)
class Question:
    """A prompt and the answers that count as right.

    Args:
        prompt: what the model is given.
        answers: any of them is right; the first one is the usual one.
        kind: the group that it belongs to in its file, as ``Forgetfulness`` or ``Reasoning``; "" where there is none.
    """

    prompt: str
    answers: tuple[str, ...] = ()
    kind: str = ""


@final
@dataclass(frozen=True)
class Fact:
    """One edit request of a benchmark, with all that it is judged by.

    Args:
        prompt: the whole text that the model is given, the subject in its place.
        target: what should follow it after the edit.
        subject: what the fact is about; "" where the file does not say.
        truth: the answers that are right without the edit, the usual one first; empty where the file does not say.
        paraphrases: other prompts that ask the same, for generality.
        neighbours: what should stay, for locality (specificity).
        portability: what should follow from the fact.
        generation: prompts that the model is to continue, for fluency and consistency.
        id: the record's own number or name; None where it has none.
        place: where the subject begins in the prompt, in characters; searched for when not given, and None where it is
            not found.
        source: the format that it was read from; "" where it was not.
        rest: what its record says besides, by key; a writer of the same format writes it again.

    Raises:
        InvalidInput: the prompt or the target is empty, or the subject is not at its place.
    """

    prompt: str
    target: str
    subject: str = ""
    truth: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()
    generation: tuple[str, ...] = ()
    id: int | str | None = None
    place: int | None = None
    source: str = field(default="", compare=False)
    rest: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        for name in ("prompt", "target"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InvalidInput(f"a fact was given {name}={getattr(self, name)!r}; expected text")
        if self.place is None:
            object.__setattr__(self, "place", _place(self.prompt, self.subject))
        elif self.place < 0 or not self.prompt.startswith(self.subject, self.place):
            raise InvalidInput(f"a fact was given subject={self.subject!r} at {self.place} of {self.prompt!r:.80}")

    @property
    def subject_end(self) -> int | None:
        """How many characters of the prompt there are up to the end of the subject; None where it is not found.

        The last token of the subject, at which ROME and its kin write, is the one that holds the character before.
        """
        return None if self.place is None else self.place + len(self.subject)


def _place(prompt: str, subject: str) -> int | None:
    """Return where the subject begins: as a word if it can be, in the same letters if it can be."""
    if not subject:
        return None
    word, part = rf"(?<!\w){re.escape(subject)}(?!\w)", re.escape(subject)
    found = re.search(word, prompt) or re.search(part, prompt)
    return None if found is None else found.start()
