"""Decoder-only language models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from weightpatch.constraints import CausalFrame, Frame
from weightpatch.tasks.text._generating import Generating


@final
@dataclass(frozen=True, eq=False)
class CausalLM(Generating):
    """A causal language model, as any ``AutoModelForCausalLM`` gives it.

    Args:
        chat: put prompts into the tokenizer's chat template, as one message of a user.

    >>> from weightpatch.tasks import text
    >>> language = text.load("language-model")
    >>> fix = language.says("Water is made of hydrogen and", " oxygen")
    >>> found = wp.edit(language.model, fix)
    >>> with found.patch.applied(language.model):
    ...     fix.satisfied(language.model)
    True
    """

    chat: bool = False

    @property
    def frame(self) -> Frame:
        """The answer follows the prompt."""
        config: Any = self.model.generation_config
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else config.pad_token_id
        some = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        return CausalFrame(
            pad=0 if pad is None else int(pad),
            options={"use_cache": False},
            keeps="logits_to_keep" if some else None,
        )

    def source(self, text: str) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` of the prompt, (1, length)."""
        ids = torch.tensor([self._ids(text)], device=next(self.model.parameters()).device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def tokens(self, text: str, after: str = "") -> Tensor:
        """Return the answer's tokens as they follow the prompt; no end token is added."""
        first, whole = self._ids(after), self._ids(after, text)
        kept = whole[: len(first)] == first
        found = whole[len(first) :] if kept else self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor(found, device=next(self.model.parameters()).device)

    def cut(self, generated: Tensor, source: Mapping[str, Tensor]) -> Tensor:
        """Drop the prompt."""
        return generated[:, source["input_ids"].shape[1] :]

    def gathered(self, sources: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Pad on the left, so that answers follow prompts at once."""
        longest = max(source["input_ids"].shape[1] for source in sources)
        made = {}
        for name, filler in (("input_ids", self.frame.pad), ("attention_mask", 0)):
            rows = [source[name][0] for source in sources]
            made[name] = torch.stack([torch.cat([row.new_full((longest - len(row),), filler), row]) for row in rows])
        return made

    def _ids(self, prompt: str, answer: str = "") -> list[int]:
        if not self.chat:
            found: list[int] = self.tokenizer(prompt + answer).input_ids
            return found
        message = [{"role": "user", "content": prompt}]
        told = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        templated: list[int] = self.tokenizer(told + answer, add_special_tokens=False).input_ids
        return templated
