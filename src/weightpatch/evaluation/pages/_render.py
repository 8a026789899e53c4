"""From facts to files: one self-contained page, and beside it every number as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...errors import InvalidInput, MissingExtra
from .._plain import finite
from ._plots import require_matplotlib
from ._words import FILTERS

__all__ = ["page_path", "write"]

_TEMPLATES = Path(__file__).parents[1] / "templates"


def page_path(path: str | os.PathLike[str]) -> Path:
    """Check where a page should go, before any work is done for it, and that it can be drawn here.

    Raises:
        InvalidInput: the path ends like the JSON file that is written beside the page.
        MissingExtra: what renders the page or draws its figures is not installed.
    """
    found = Path(path)
    if found.suffix.lower() == ".json" or found.is_dir():
        raise InvalidInput(f"a page was asked at {found}; expected the name of an HTML file, such as report.html")
    _engine()
    require_matplotlib()
    return found


def write(path: Path, template: str, view: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    """Write the page and the JSON file of its facts, each whole or not at all; return the page's path."""
    numbers = path.with_suffix(".json")
    text = _engine().get_template(template).render(view, version=__version__, numbers=numbers.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.dumps(finite(facts), indent=1, allow_nan=False, ensure_ascii=False)
    _put(numbers, plain + "\n")
    _put(path, text)
    return path


def _engine() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra('an HTML page needs Jinja2; pip install "weightpatch[report]"') from error
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters.update(FILTERS)
    return engine


def _put(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
