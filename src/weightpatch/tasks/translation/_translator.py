"""The German–English translator that comes with weightpatch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import as_file
from typing import Any

from safetensors.torch import load as tensors

from weightpatch.editors import Editor, MinimumNorm
from weightpatch.errors import InvalidInput, MissingExtra
from weightpatch.likelihoods import Categorical
from weightpatch.statistics import second_moments
from weightpatch.tasks.text import Seq2Seq, load
from weightpatch.tasks.translation._pairs import SHIPPED, libreoffice
from weightpatch.training import SparseBlock, add_block

EDITED = "lm_head.block.outer.weight"


def translator(*, editable: bool = False, settings: Mapping[str, Any] | None = None) -> Seq2Seq:
    """Load the translator that comes with weightpatch, German to English, of LibreOffice's help.

    A Transformer in the Marian architecture: three layers of width 192 each way, 4,000 subwords, 4 million parameters,
    trained by ``scripts/train_translator.py`` with ``examples/translator/first.toml`` and then ``plain.toml``.

    Args:
        editable: with a `SparseBlock` before its readout, whose code Editable Training made
            (``examples/translator/editable.toml``): it translates as the plain one, bit for bit, until its parameters
            `EDITED` are edited, with `editor`. It is built by this function alone, not from a saved folder.
        settings: how it is deployed, as `generate` takes it, such as ``{"num_beams": 5}``; greedy when not given.

    Raises:
        MissingExtra: transformers or sentencepiece is not installed.
    """
    try:
        import sentencepiece  # noqa: F401
    except ImportError as error:
        raise MissingExtra('the translator needs sentencepiece; pip install "weightpatch[mt]"') from error
    with as_file(SHIPPED / "plain") as folder:
        found = load(folder, "translation", settings=settings)
    assert isinstance(found, Seq2Seq)
    if editable:
        inner = tensors((SHIPPED / "editable" / "block.safetensors").read_bytes())
        add_block(found.model, "lm_head", len(inner["weight"]), kind=SparseBlock)
        found.model.get_submodule("lm_head.block.inner").load_state_dict(inner)
    return found


def editor(kind: Seq2Seq, reference: int = 500) -> Editor:
    """Return what edits the editable translator: `MinimumNorm`, in the metric of its code at training translations.

    Args:
        kind: of ``translator(editable=True)``.
        reference: how many training pairs the metric is measured on, in some seconds; the more, the more local.

    Raises:
        InvalidInput: the translator has no block, or no pairs are asked for.
    """
    if EDITED not in dict(kind.model.named_parameters()) or reference < 1:
        raise InvalidInput(
            f"editor was given a model of {type(kind.model).__name__} and reference={reference}; expected that of "
            "translation.translator(editable=True), and at least 1 pair"
        )
    pairs = libreoffice("train")[:reference]
    keep = kind.kept(pairs.german, pairs.english)
    moments = second_moments(kind.model, keep, parameters=EDITED, likelihood=Categorical())
    return MinimumNorm(metric=moments.metric())
