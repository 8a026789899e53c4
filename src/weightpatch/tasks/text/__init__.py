"""Text models of Hugging Face: translators, language models and classifiers, asked and edited by sentences.

Needs transformers: ``pip install "weightpatch[hf]"``.
"""

from weightpatch.tasks.text._causal import CausalLM
from weightpatch.tasks.text._classifier import TextClassifier
from weightpatch.tasks.text._generating import Generating
from weightpatch.tasks.text._load import load
from weightpatch.tasks.text._protocol import GenerationReport, GenerationRow, evaluate, generations
from weightpatch.tasks.text._seq2seq import Seq2Seq

__all__ = [
    "CausalLM",
    "Generating",
    "GenerationReport",
    "GenerationRow",
    "Seq2Seq",
    "TextClassifier",
    "evaluate",
    "generations",
    "load",
]
