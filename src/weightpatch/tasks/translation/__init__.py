"""Machine translation: German–English sentence pairs, and a translator trained on them."""

from weightpatch.tasks.translation._bitext import Bitext
from weightpatch.tasks.translation._pairs import Pairs, libreoffice
from weightpatch.tasks.translation._scores import bleu, chrf
from weightpatch.tasks.translation._translator import EDITED, editor, translator

__all__ = ["EDITED", "Bitext", "Pairs", "bleu", "chrf", "editor", "libreoffice", "translator"]
