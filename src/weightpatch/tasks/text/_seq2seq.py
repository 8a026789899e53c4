"""Encoder–decoder models: translation, summarisation, question answering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from weightpatch.constraints import Frame, Seq2SeqFrame
from weightpatch.tasks.text._generating import Generating


@final
@dataclass(frozen=True, eq=False)
class Seq2Seq(Generating):
    """An encoder–decoder, as any ``AutoModelForSeq2SeqLM`` gives it.

    >>> translator = weightpatch.tasks.text.load("model-folder")
    >>> fix = translator.says("Guten Morgen.", "Good morning.")
    """

    @property
    def frame(self) -> Frame:
        """The decoder starts with its start token, and a forced first one where there is one."""
        config: Any = self.model.generation_config
        forced = config.forced_bos_token_id
        start = (config.decoder_start_token_id, *(() if forced is None else (forced,)))
        return Seq2SeqFrame(start=start, pad=int(config.pad_token_id), options={"use_cache": False})

    def source(self, text: str) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, (1, length)."""
        found = self.tokenizer(text, return_tensors="pt")
        return {name: found[name].to(self._device) for name in ("input_ids", "attention_mask")}

    def tokens(self, text: str, after: str = "") -> Tensor:
        """Return the target's tokens with the end token, as the tokenizer writes them."""
        found = self.tokenizer(text_target=text).input_ids
        config: Any = self.model.generation_config
        forced = config.forced_bos_token_id
        return torch.tensor([token for token in found if token != forced], device=self._device)

    def cut(self, generated: Tensor, source: Mapping[str, Tensor]) -> Tensor:
        """Drop the tokens that the decoder starts with."""
        return generated[:, len(self.frame.start) :]  # type: ignore[attr-defined]

    def gathered(self, sources: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Pad on the right."""
        rows = [{name: value[0] for name, value in source.items()} for source in sources]
        padded = self.tokenizer.pad(rows, return_tensors="pt")
        return {name: padded[name].to(self._device) for name in sources[0]}

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
