"""Encoder–decoder models: translation, summarisation, question answering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from weightpatch.constraints import Frame, Seq2SeqFrame
from weightpatch.tasks.text._generating import Generating, evaluating


@final
@dataclass(frozen=True, eq=False)
class Seq2Seq(Generating):
    """An encoder–decoder, as any ``AutoModelForSeq2SeqLM`` gives it.

    >>> from weightpatch.tasks import text
    >>> translator = text.load("translator")
    >>> fix = translator.says("Guten Morgen", "Good morning")
    >>> found = wp.edit(translator.model, fix)
    >>> with found.patch.applied(translator.model):
    ...     translator.answer("Guten Morgen")
    'Good morning'
    """

    @property
    def frame(self) -> Frame:
        """The decoder starts with its start token, and a forced first one where there is one."""
        config: Any = self.model.generation_config
        forced = config.forced_bos_token_id
        start = (config.decoder_start_token_id, *(() if forced is None else (forced,)))
        return Seq2SeqFrame(start=start, pad=int(config.pad_token_id), options={"use_cache": False})

    @property
    def limit(self) -> int:
        """How many tokens an answer may have: a forced first one, which is no part of it, counts for `generate`."""
        return super().limit + 1 - len(self.frame.start)  # type: ignore[attr-defined]

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

    @torch.no_grad()
    def encoded(self, texts: Sequence[str], edited: Sequence[str]) -> Callable[[Sequence[int]], dict[str, Any]] | None:
        """Return what gives a model the sources as its encoder has seen them, by their numbers."""
        from transformers.modeling_outputs import BaseModelOutput

        model: Any = self.model
        encoder = model.get_encoder()
        own = {id(p) for p in encoder.parameters()}
        places = [f"{name}." for name, module in model.named_modules() if module is encoder]
        names = dict(model.named_parameters(remove_duplicate=False))
        if any(id(names.get(name)) in own or name.startswith(tuple(places)) for name in edited):
            return None
        with evaluating(model):
            found = [encoder(**self.source(text)).last_hidden_state[0] for text in texts]

        def batch(some: Sequence[int]) -> dict[str, Any]:
            states = [found[i] for i in some]
            mask = [torch.ones(len(state), dtype=torch.int64, device=state.device) for state in states]
            padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
            return {
                "encoder_outputs": BaseModelOutput(last_hidden_state=padded),
                "attention_mask": nn.utils.rnn.pad_sequence(mask, batch_first=True),
            }

        return batch

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
