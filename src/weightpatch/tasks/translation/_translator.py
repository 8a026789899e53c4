"""The German–English translator that comes with weightpatch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import as_file
from typing import Any

from weightpatch.editors import Editor, GradientDescent
from weightpatch.errors import MissingExtra
from weightpatch.tasks.text import Seq2Seq, load
from weightpatch.tasks.translation._pairs import SHIPPED

EDITED = "model.decoder.layers.2.*"


def translator(*, editable: bool = False, settings: Mapping[str, Any] | None = None) -> Seq2Seq:
    """Load the translator that comes with weightpatch, German to English, of LibreOffice's help.

    A Transformer in the Marian architecture: three layers of width 192 each way, 4,000 subwords, 4 million parameters,
    trained by ``scripts/train_translator.py`` with ``examples/translator/first.toml`` and then ``plain.toml``.

    Args:
        editable: the one that Editable Training made of it, by ``examples/translator/editable.toml``; edit its
            parameters `EDITED` with `editor()`.
        settings: how it is deployed, as `generate` takes it, such as ``{"num_beams": 5}``; greedy when not given.

    Raises:
        MissingExtra: transformers or sentencepiece is not installed.
    """
    try:
        import sentencepiece  # noqa: F401
    except ImportError as error:
        raise MissingExtra('the translator needs sentencepiece; pip install "weightpatch[mt]"') from error
    with as_file(SHIPPED / ("editable" if editable else "plain")) as folder:
        found = load(folder, "translation", settings=settings)
    assert isinstance(found, Seq2Seq)
    return found


def editor() -> Editor:
    """Return what edits the editable translator: gradient descent with the step sizes that were learned."""
    rates = json.loads((SHIPPED / "editable" / "measured.json").read_text())["lr"]
    return GradientDescent(lr=rates, max_steps=50)
