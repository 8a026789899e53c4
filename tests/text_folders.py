"""Tiny text models as folders, as `save_pretrained` writes them, with a tokenizer of forty words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_text as tiny
import torch

PAD, UNKNOWN = tiny.WORDS - 1, tiny.WORDS - 2
WORDS = tuple(f"w{i}" for i in range(1, UNKNOWN))  # token i is the word wi


def tokenizer(end: bool, words: Sequence[str] = WORDS) -> Any:
    """Words, with an end token behind them where `end`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {"</s>": 0, **{word: i for i, word in enumerate(words, 1)}, "<unk>": UNKNOWN, "<pad>": PAD}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=64
    )


def translator(folder: Path, seed: int = 0, words: Sequence[str] = WORDS) -> Path:
    tiny.marian(seed).save_pretrained(folder)
    tokenizer(end=True, words=words).save_pretrained(folder)
    return folder


def language(folder: Path, seed: int = 0, words: Sequence[str] = WORDS) -> Path:
    tiny.gpt2(seed).save_pretrained(folder)
    tokenizer(end=False, words=words).save_pretrained(folder)
    return folder


def classifier(folder: Path, seed: int = 0) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=tiny.WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=PAD,
        id2label={0: "sad", 1: "happy", 2: "bored"},
        label2id={"sad": 0, "happy": 1, "bored": 2},
    )
    tiny.spread(BertForSequenceClassification(config).eval()).save_pretrained(folder)
    tokenizer(end=False).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[str]:
    drawn = torch.randint(len(WORDS), (count, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    return [" ".join(WORDS[i] for i in row) for row in drawn]


MAKE = {"translation": translator, "lm": language, "text-classification": classifier}
