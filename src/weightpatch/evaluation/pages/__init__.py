"""Pages: what an edit did, or how two models differ, as one self-contained HTML file and a JSON file of its numbers."""

from ._comparison_page import comparison_page
from ._edit_page import edit_page
from ._sentence_page import sentence_comparison_page, sentence_page

__all__ = ["comparison_page", "edit_page", "sentence_comparison_page", "sentence_page"]
