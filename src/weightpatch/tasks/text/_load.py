"""Models from local folders, by what their configuration says they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from weightpatch.errors import InvalidInput, MissingExtra
from weightpatch.tasks.text._causal import CausalLM
from weightpatch.tasks.text._classifier import TextClassifier
from weightpatch.tasks.text._seq2seq import Seq2Seq

__all__ = ["load"]

Kind = Literal["translation", "lm", "text-classification"]


def load(
    folder: str | Path,
    kind: Kind | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    chat: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Seq2Seq | CausalLM | TextClassifier:
    """Load a model and its tokenizer from a folder that ``save_pretrained`` wrote, or from a .gguf file.

    Args:
        folder: the folder, or the file.
        kind: what it is: translation (any encoder–decoder), lm or text-classification; found from the configuration
            when not given.
        dtype: of the weights; float32 edits exactly, half precision takes half the memory.
        chat: put prompts of a language model into its chat template.
        settings: how the model is deployed, as `generate` takes it, such as ``{"num_beams": 5}``.

    Raises:
        MissingExtra: transformers is not installed.
        InvalidInput: there is no model.
    """
    try:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoModelForSeq2SeqLM,
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )
    except ImportError as error:
        raise MissingExtra('text models need transformers; pip install "weightpatch[hf]"') from error
    path = Path(folder)
    if not path.exists():
        raise InvalidInput(f"{path} does not exist; expected a model folder with config.json, or a .gguf file")
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    home = path.parent if where else path
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")
        try:
            config = AutoConfig.from_pretrained(home, **where)
            tokenizer = AutoTokenizer.from_pretrained(home, **where)
        except (OSError, ValueError, KeyError) as error:
            raise InvalidInput(f"{path} does not hold a model that transformers can load: {error}") from error
    kinds = {
        "translation": AutoModelForSeq2SeqLM,
        "lm": AutoModelForCausalLM,
        "text-classification": AutoModelForSequenceClassification,
    }
    found = kind or _kind(config)
    if found not in kinds:
        raise InvalidInput(f"load was given kind={kind!r}; expected one of {', '.join(kinds)}")
    model = kinds[found].from_pretrained(home, dtype=dtype, **where).eval()
    if found == "text-classification":
        return TextClassifier(model, tokenizer)
    told = dict(settings or {})
    return Seq2Seq(model, tokenizer, told) if found == "translation" else CausalLM(model, tokenizer, told, chat)


def _kind(config: Any) -> Kind:
    if getattr(config, "is_encoder_decoder", False):
        return "translation"
    named = " ".join(getattr(config, "architectures", None) or ())
    return "text-classification" if "SequenceClassification" in named else "lm"
