"""The record formats of the field: CounterFact, zsRE in its two forms, and KnowEdit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

from weightpatch.errors import InvalidInput
from weightpatch.tasks.language._facts import Fact, Question
from weightpatch.tasks.language._fields import Fields


class Format(ABC):
    """How one record of a file stands for a fact."""

    @abstractmethod
    def fits(self, fields: Fields) -> bool:
        """Say whether a record looks like one of this format."""

    @abstractmethod
    def fact(self, fields: Fields) -> Fact | None:
        """Return the fact of one record; None where the record asks for nothing.

        Raises:
            InvalidInput: the record is not as the format says.
        """

    @abstractmethod
    def record(self, fact: Fact) -> dict[str, Any]:
        """Return the record of one fact.

        Raises:
            InvalidInput: the format cannot hold it.
        """


@final
@dataclass(frozen=True)
class CounterFact(Format):
    """ROME's ``counterfact.json``: a statement to complete, and what it becomes.

    Neighbours are other subjects with the same true answer, or, of kind ``attribute``, with the new one. Source: Meng
    et al., NeurIPS 2022.
    """

    def fits(self, fields: Fields) -> bool:
        """Say whether there is a ``requested_rewrite``."""
        return "requested_rewrite" in fields

    def fact(self, fields: Fields) -> Fact:
        """Return the fact, the subject put into the prompt."""
        asked = fields.part("requested_rewrite")
        new, true = asked.part("target_new"), asked.part("target_true")
        template, subject = asked.text("prompt"), asked.text("subject")
        if template.count("{}") != 1:
            raise asked.wrong("prompt", "text with one {} where the subject goes")
        target, truth = new.text("str"), true.text("str")
        neighbours = [Question(prompt, (truth,)) for prompt in fields.texts("neighborhood_prompts")]
        neighbours += [Question(prompt, (target,), "attribute") for prompt in fields.texts("attribute_prompts")]
        known = ("case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts")
        rest = fields.rest(*known, "generation_prompts")
        inner = asked.rest("prompt", "subject", "target_new", "target_true")
        inner |= {
            key: extra for key, part in (("target_new", new), ("target_true", true)) if (extra := part.rest("str"))
        }
        return Fact(
            template.replace("{}", subject),
            target,
            subject,
            (truth,),
            fields.texts("paraphrase_prompts"),
            tuple(neighbours),
            generation=fields.texts("generation_prompts"),
            id=fields.id("case_id"),
            place=template.index("{}"),
            source=type(self).__name__,
            rest=rest | ({"requested_rewrite": inner} if inner else {}),
        )

    def record(self, fact: Fact) -> dict[str, Any]:
        """Return the record, with a template for the prompt."""
        template = "" if fact.place is None else f"{fact.prompt[: fact.place]}{{}}{fact.prompt[fact.subject_end :]}"
        if template.count("{}") != 1 or template.index("{}") != fact.place:
            raise _cannot(self, fact, f"needs a subject inside of the prompt, no other {{}}, and has {fact.subject!r}")
        if len(fact.truth) != 1 or fact.portability:
            raise _cannot(self, fact, "holds one true answer, and no portability questions")
        kinds = {"": fact.truth, "attribute": (fact.target,)}
        for question in fact.neighbours:
            if kinds.get(question.kind) != question.answers:
                raise _cannot(self, fact, f"holds neighbours with the true answer alone, and has {question}")
        rest = _rest(self, fact)
        inner = dict(rest.pop("requested_rewrite", {}))
        asked = {
            "prompt": template,
            "subject": fact.subject,
            "target_new": {"str": fact.target, **inner.pop("target_new", {})},
            "target_true": {"str": fact.truth[0], **inner.pop("target_true", {})},
        }
        return {
            **_numbered(fact),
            "requested_rewrite": asked | inner,
            "paraphrase_prompts": list(fact.paraphrases),
            "neighborhood_prompts": [question.prompt for question in fact.neighbours if not question.kind],
            "attribute_prompts": [question.prompt for question in fact.neighbours if question.kind],
            "generation_prompts": list(fact.generation),
            **rest,
        }


@final
@dataclass(frozen=True)
class ZsRE(Format):
    """The flat zsRE of MEND's evaluation, ``zsre_mend_eval.json``, as ROME, MEMIT and EasyEdit read it.

    The same file is read in two ways, and results of the two cannot be compared: MEND and EasyEdit ask for ``alt``,
    which is wrong, and leave out the records that have none; ROME and MEMIT ask for the first of ``answers``, which is
    right. Source: Levy et al. 2017; De Cao et al. 2021; Mitchell et al., ICLR 2022.

    Args:
        correct: ask for the right answer, as ROME does.
    """

    correct: bool = False

    def fits(self, fields: Fields) -> bool:
        """Say whether there are ``src`` and ``answers``."""
        return "src" in fields and "answers" in fields

    def fact(self, fields: Fields) -> Fact | None:
        """Return the fact; None where a wrong answer is asked for, and none is given."""
        answers = fields.texts("answers")
        if self.correct and not answers:
            raise fields.wrong("answers", "at least one answer")
        target = answers[0] if self.correct else fields.text("alt")
        if not target:
            return None
        loc = (Question(fields.text("loc"), fields.texts("loc_ans")),) if "loc" in fields else ()
        ported: tuple[Question, ...] = ()
        known = ["case_id", "src", "subject", "rephrase", "loc", "loc_ans"]
        if "portability" in fields and "New Question" in (portability := fields.part("portability")):
            ported = (Question(portability.text("New Question"), portability.texts("New Answer")),)
        return Fact(
            fields.text("src"),
            target,
            fields.text("subject"),
            () if self.correct else answers,
            fields.texts("rephrase"),
            loc,
            ported,
            id=fields.id("case_id"),
            source=type(self).__name__,
            rest=fields.rest(*known, *(() if self.correct else ("alt", "answers"))),
        )

    def record(self, fact: Fact) -> dict[str, Any]:
        """Return the record."""
        for name, most in (("paraphrases", 1), ("neighbours", 1), ("portability", 1), ("generation", 0)):
            if len(getattr(fact, name)) > most:
                raise _cannot(self, fact, f"holds at most {most} of its {len(getattr(fact, name))} {name}")
        if any(question.kind for question in (*fact.neighbours, *fact.portability)):
            raise _cannot(self, fact, "holds questions without a kind alone")
        rest = _rest(self, fact)
        asked = {"answers": rest.pop("answers", [fact.target])} if self.correct else {"alt": fact.target}
        found = {"subject": fact.subject, "src": fact.prompt, **asked}
        if not self.correct:
            found["answers"] = list(fact.truth)
        elif fact.truth or found["answers"][:1] != [fact.target]:
            raise _cannot(self, fact, "has the target as its true answer")
        for prompt in fact.paraphrases:
            found["rephrase"] = prompt
        for question in fact.neighbours:
            found |= {"loc": question.prompt, "loc_ans": _one(question.answers)}
        for question in fact.portability:
            old = rest.pop("portability", {})
            found["portability"] = {**old, "New Question": question.prompt, "New Answer": _one(question.answers)}
        return _numbered(fact) | found | rest


@final
@dataclass(frozen=True)
class KiltZsRE(Format):
    """The zsRE that MEND trains on: JSON lines in the form of KILT, with several wrong answers and paraphrases.

    MEND draws one of the ``alternatives``; here the first one is asked for, and the others stay in `Fact.rest`. There
    is no subject. Source: Petroni et al. 2021; Mitchell et al., ICLR 2022.
    """

    def fits(self, fields: Fields) -> bool:
        """Say whether there are ``alternatives`` and ``output``."""
        return "alternatives" in fields and "output" in fields

    def fact(self, fields: Fields) -> Fact | None:
        """Return the fact; None where there is no alternative."""
        alternatives, prompt = fields.texts("alternatives"), fields.text("input")
        if not alternatives:
            return None
        outputs = fields.record["output"]
        if not isinstance(outputs, list):
            raise fields.wrong("output", "a list of objects with an answer")
        truth = [Fields(item, f"{fields.where}: output") for item in outputs]
        return Fact(
            prompt,
            alternatives[0],
            truth=tuple(item.text("answer") for item in truth if "answer" in item),
            paraphrases=tuple(other for other in fields.texts("filtered_rephrases") if other != prompt),
            id=fields.id("id"),
            source=type(self).__name__,
            rest=fields.rest("id", "input", "output", "alternatives", "filtered_rephrases")
            | ({"alternatives": list(alternatives[1:])} if alternatives[1:] else {}),
        )

    def record(self, fact: Fact) -> dict[str, Any]:
        """Return the record."""
        if fact.subject or fact.neighbours or fact.portability or fact.generation:
            raise _cannot(self, fact, "holds a prompt, its target, its true answers and paraphrases alone")
        rest = _rest(self, fact)
        return {
            **({} if fact.id is None else {"id": fact.id}),
            "input": fact.prompt,
            "output": [{"answer": answer} for answer in fact.truth],
            "alternatives": [fact.target, *rest.pop("alternatives", [])],
            "filtered_rephrases": list(fact.paraphrases),
            **rest,
        }


@final
@dataclass(frozen=True)
class KnowEdit(Format):
    """KnowEdit's records, and those that EasyEdit's examples take: questions in groups.

    Read are WikiData_recent, WikiData_counterfact, ZsRE and WikiBio (``text``, ``labels``, ``concept``), and EasyEdit's
    flat ``locality_prompt``, ``portability_prompt``. An answer may be text, a list, or a list of lists of aliases; it
    is written as a list. ConvSent and Sanitation have other files. Source: Zhang et al. 2024, arXiv 2401.01286.
    """

    def fits(self, fields: Fields) -> bool:
        """Say whether there is a prompt with a target."""
        return ("prompt" in fields and "target_new" in fields) or ("text" in fields and "labels" in fields)

    def fact(self, fields: Fields) -> Fact:
        """Return the fact."""
        prompt, target, subject = _NAMES if "prompt" in fields else ("text", "labels", "concept")
        again = "rephrase_prompt" if "rephrase_prompt" in fields else "rephrase"
        known = ["case_id", prompt, target, subject, "ground_truth", again, "locality", "portability"]
        known += [f"{name}_{part}" for name in _GROUPS for part in ("prompt", "ground_truth")]
        return Fact(
            fields.text(prompt),
            fields.text(target),
            fields.text(subject) if subject in fields else "",
            fields.texts("ground_truth"),
            fields.texts(again),
            tuple(_questions(fields, "locality")),
            tuple(_questions(fields, "portability")),
            fields.texts("generation_prompts"),
            fields.id("case_id"),
            source=type(self).__name__,
            rest=fields.rest(*known, "generation_prompts"),
        )

    def record(self, fact: Fact) -> dict[str, Any]:
        """Return the record."""
        found: dict[str, Any] = {"subject": fact.subject} if fact.subject else {}
        found |= {"prompt": fact.prompt, "target_new": fact.target}
        for key, texts in (
            ("ground_truth", fact.truth),
            ("rephrase_prompt", fact.paraphrases),
            ("generation_prompts", fact.generation),
        ):
            found |= {key: list(texts)} if texts else {}
        for key, questions in (("portability", fact.portability), ("locality", fact.neighbours)):
            groups: dict[str, list[dict[str, Any]]] = {}
            for question in questions:
                asked = {"prompt": question.prompt, "ground_truth": list(question.answers)}
                groups.setdefault(question.kind or _GROUPS[key], []).append(asked)
            found |= {key: groups} if groups else {}
        return _numbered(fact) | found | _rest(self, fact)


_NAMES = ("prompt", "target_new", "subject")
_GROUPS = {"locality": "neighborhood", "portability": "one_hop"}  # what EasyEdit calls questions without a group


def _questions(fields: Fields, key: str) -> Iterable[Question]:
    """Yield the questions of all groups, and a flat one."""
    groups = fields.part(key) if key in fields else Fields({}, fields.where)
    for kind, items in groups.record.items():
        where = f"{groups.where}: {kind}"
        for item in items if isinstance(items, list) else [items]:
            yield from _asked(Fields(item, where), "prompt", "ground_truth", "" if kind == _GROUPS[key] else kind)
    if f"{key}_prompt" in fields:
        yield from _asked(fields, f"{key}_prompt", f"{key}_ground_truth", "")


def _asked(fields: Fields, prompt: str, answer: str, kind: str) -> Iterable[Question]:
    """Yield one question a prompt: with its own answer where there are as many of these, else with all answers."""
    prompts, answers = fields.texts(prompt), fields.record.get(answer)
    if not prompts:
        raise fields.wrong(prompt, "text")
    paired = len(prompts) > 1 and isinstance(answers, list) and len(answers) == len(prompts)
    for place, text in enumerate(prompts):
        own = Fields({answer: answers[place]}, fields.where) if paired and answers is not None else fields
        yield Question(text, own.texts(answer), kind)


def _numbered(fact: Fact) -> dict[str, Any]:
    return {} if fact.id is None else {"case_id": fact.id}


def _rest(own: Format, fact: Fact) -> dict[str, Any]:
    return dict(fact.rest) if fact.source == type(own).__name__ else {}


def _one(answers: tuple[str, ...]) -> str | list[str]:
    return answers[0] if len(answers) == 1 else list(answers)


def _cannot(own: Format, fact: Fact, why: str) -> InvalidInput:
    named = f"the fact {fact.prompt!r:.60}" if fact.id is None else f"fact {fact.id}"
    return InvalidInput(f"{type(own).__name__} {why}: {named} cannot be written so; KnowEdit() holds everything")
