"""Tiny sequence models with random weights: two of transformers, and a plain encoder–decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WORDS = 40


def marian(seed: int = 0) -> Any:
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=WORDS,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=WORDS - 1,
        eos_token_id=0,
        forced_eos_token_id=0,
        decoder_start_token_id=WORDS - 1,
        max_position_embeddings=64,
        scale_embedding=True,
    )
    return spread(MarianMTModel(config).eval())


def gpt2(seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return spread(GPT2LMHeadModel(config).eval())


def spread(model: Any) -> Any:
    """Make the weights larger, so that answers differ between inputs."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "position" not in name:
                p.mul_(12 if "embed" in name or "shared" in name or "wte" in name else 4)
    return model


class Plain(nn.Module):
    """An encoder–decoder of torch's own layers: (source, target so far) to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.1, batch_first=True)
        self.out = nn.Linear(16, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        ahead = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.out(self.transformer(self.embed(source), self.embed(target), tgt_mask=ahead))


class Words:
    """A tokenizer of numbers: "7 3" is tokens 7 and 3."""

    def __init__(self, pad: int, end: int | None = None) -> None:
        self.pad_token_id, self._end = pad, end

    def __call__(self, text: str | None = None, text_target: str | None = None, **options: Any) -> Any:
        from transformers import BatchEncoding

        ids = [int(word) for word in (text if text_target is None else text_target or "").split()]
        ids += [] if self._end is None else [self._end]
        found: Any = [ids] if options.get("return_tensors") else ids
        found = torch.tensor(found) if options.get("return_tensors") else found
        mask = torch.ones_like(found) if isinstance(found, Tensor) else [1] * len(ids)
        return BatchEncoding({"input_ids": found, "attention_mask": mask})

    def pad(self, rows: list[dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
        def padded(name: str, value: int) -> Tensor:
            return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

        return {"input_ids": padded("input_ids", self.pad_token_id), "attention_mask": padded("attention_mask", 0)}

    def decode(self, tokens: Any, **options: Any) -> str:
        special = {self.pad_token_id, self._end}
        return " ".join(str(token) for token in torch.as_tensor(tokens).tolist() if token not in special)
