"""Text models on the command line: a folder or a .gguf file, and how each kind is asked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InvalidInput, MissingExtra, WeightpatchError
from ._texts import Texts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..constraints import Constraint
    from ..evaluation import Answering, Scoring
    from ..locality import Locality
    from ..tasks.text import Generating, TextClassifier

TextTask = Literal["translation", "lm", "text-classification"]
TEXT_TASKS = ("translation", "lm", "text-classification")

_TOKENS = {"translation": 128, "lm": 32}


@dataclass(frozen=True)
class Serving:
    """How the model is loaded, and how it answers."""

    num_beams: int = 1
    """The width of the beam it is deployed with; 1 is greedy decoding."""
    max_new_tokens: int | None = None
    """The longest answer; 128 tokens of a translation, 32 of a language model when not given."""
    chat: bool = False
    """Put prompts of a language model into its chat template."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights: a patch fits a file of weights of the same type alone."""

    def load(self, where: Path, task: TextTask) -> Speaker:
        """Load a model folder or .gguf file."""
        import torch

        from ..tasks.text import TextClassifier

        given: dict[str, Any] = {
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens or _TOKENS.get(task),
        }
        if self.num_beams < 1 or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            raise InvalidInput(
                f"--num-beams was given {self.num_beams} and --max-new-tokens {self.max_new_tokens}; "
                "expected at least 1"
            )
        kind = quietly_loaded(where, task, dtype=getattr(torch, self.dtype), chat=self.chat, settings=given)
        if self.chat and task != "lm":
            raise InvalidInput(f"--chat is for --task lm; this is --task {task}")
        if self.chat and not getattr(kind.tokenizer, "chat_template", None):
            raise InvalidInput(f"--chat was given, and the tokenizer in {where} has no chat template; leave --chat out")
        return Classes(kind) if isinstance(kind, TextClassifier) else Generator(kind)


@dataclass(frozen=True)
class Generator:
    """A model that generates text, asked on the command line."""

    kind: Generating

    @property
    def answering(self) -> Answering:
        """What answers texts."""
        return self.kind

    def asked(self, sources: Sequence[str], targets: Sequence[str], margin: float) -> Constraint:
        """Ask that each source is answered by its target."""
        found = [self.kind.says(source, target, margin) for source, target in zip(sources, targets, strict=True)]
        for target, demand in zip(targets, found, strict=True):
            self._check(target, demand.answer)
        joined: Constraint = found[0]
        for demand in found[1:]:
            joined = joined & demand
        return joined

    def kept(self, texts: Sequence[str]) -> Locality:
        """Return what should stay."""
        return self.kind.kept(texts)

    def runner_up(self, source: str) -> tuple[str, Constraint]:
        """Ask that the answer begins with the second likeliest token, as an example; return that token's text too."""
        import torch

        inputs, labels = self.kind.forced([source])
        with torch.no_grad():
            logits = self.kind.model(**inputs).logits[labels >= 0][0]
        logits[[*self.kind.tokenizer.all_special_ids, int(labels[labels >= 0][0])]] = -torch.inf
        token = logits.argmax()[None]
        return self.kind.text(token), self.kind.says(source, token)

    def scoring(self) -> Scoring:
        """Return how answers are judged by references."""
        from ..evaluation import translated, verbatim
        from ..tasks.text import CausalLM

        return verbatim(begins=True) if isinstance(self.kind, CausalLM) else translated()

    def _check(self, target: str, tokens: Tensor) -> None:
        unknown = getattr(self.kind.tokenizer, "unk_token_id", None)
        if unknown is not None and unknown in tokens.tolist():
            raise InvalidInput(
                f"the target is {target!r}, which the tokenizer can only write as {self.kind.text(tokens)!r}: it "
                "has no token for some of it, so that no edit makes the model say it; choose other words"
            )


@dataclass(frozen=True)
class Classes:
    """A classifier as what answers texts: an answer is one token, the number of a class."""

    classifier: TextClassifier

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.classifier.model

    @property
    def answering(self) -> Answering:
        """What answers texts."""
        return self

    def generate(self, texts: Sequence[str], model: nn.Module | None = None) -> list[Tensor]:
        """Return the class of each text, (1,)."""
        import torch

        model = self.model if model is None else model
        found: list[Tensor] = []
        with torch.no_grad():
            for begin in range(0, len(texts), 64):
                logits: Tensor = model(**self.classifier.inputs(texts[begin : begin + 64])).logits
                found += logits.argmax(1)[:, None].unbind()
        return found

    def text(self, tokens: Tensor) -> str:
        """Return the name of a class."""
        return self.names[int(tokens[0])]

    def forced(self, texts: Sequence[str], answers: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """Return the model's inputs, and classes as labels, (n,)."""
        import torch

        return self.classifier.inputs(texts), torch.cat(list(answers))

    @property
    def names(self) -> Mapping[int, str]:
        """The names of the classes."""
        config: Any = self.model.config
        return {int(number): str(name) for number, name in config.id2label.items()}

    def asked(self, sources: Sequence[str], targets: Sequence[str], margin: float) -> Constraint:
        """Ask for the classes of texts; tags and numbers are refused, with what to use in Python."""
        numbers = {str(number): name for number, name in self.names.items()}
        return self.classifier.classified(sources, [numbers.get(target, target) for target in targets], margin)

    def kept(self, texts: Sequence[str]) -> Locality:
        """Return what should stay."""
        return self.classifier.kept(texts)

    def runner_up(self, source: str) -> tuple[str, Constraint]:
        """Ask for the second likeliest class, as an example; return its name too."""
        import torch

        with torch.no_grad():
            logits: Tensor = self.model(**self.classifier.inputs([source])).logits[0]
        name = self.names[int(logits.topk(2).indices[1])]
        return name, self.asked([source], [name], 0.1)

    def scoring(self) -> Scoring:
        """Return how answers are judged by references."""
        from ..evaluation import verbatim

        return verbatim()


Speaker = Generator | Classes


def served(task: TextTask, where: Path, serving: Serving, texts: Texts) -> tuple[Speaker, Texts]:
    """Load a model, and check the references that it is to be judged by."""
    speaker = serving.load(where, task)
    if isinstance(speaker, Classes) and texts.references is not None:
        names = {
            **{str(number): name for number, name in speaker.names.items()},
            **{n: n for n in speaker.names.values()},
        }
        if unknown := [reference for reference in texts.references if reference not in names]:
            raise InvalidInput(
                f"a reference is {unknown[0]!r}; expected one of the classes {', '.join(speaker.names.values())}"
            )
        texts = replace(texts, references=tuple(names[reference] for reference in texts.references))
    return speaker, texts


def quietly_loaded(where: Path, task: TextTask | None = None, **settings: Any) -> Any:
    """Load a text model without a word on the terminal or the network, and explain what goes wrong."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read once, on import
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from ..tasks.text import load

    try:
        with silent():
            return load(where, task, **settings)
    except WeightpatchError:
        raise
    except ImportError as error:  # such as sentencepiece, which some tokenizers need
        raise MissingExtra(f'{where} needs more packages: {error}; pip install "weightpatch[mt]"') from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0][:300]
        told = "" if task is None else f" for --task {task}"
        raise InvalidInput(f"{where} cannot be loaded{told}: {first}") from error


@contextmanager
def silent() -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    try:
        from transformers.utils import logging
    except ImportError:  # which load explains
        yield
        return
    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
