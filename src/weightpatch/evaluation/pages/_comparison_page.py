"""The page of two models: what else changed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..._calling import Inputs, length
from ...errors import ShapeMismatch
from ...verdict import Limits
from ..comparison import Comparison
from ._changes import changes
from ._judgement import judgement
from ._pictures import Picture
from ._render import page_path, write
from ._words import Names

__all__ = ["comparison_page"]

_LIMITS = Limits()


def comparison_page(
    path: str | os.PathLike[str],
    comparison: Comparison,
    *,
    title: str,
    inputs: Inputs,
    classes: Sequence[str] = (),
    picture: Picture | None = None,
    limits: Limits = _LIMITS,
) -> Path:
    """Write what `compare` found as an HTML page, with every number in a JSON file beside it; return the page's path.

    Args:
        path: where the page goes; the numbers go to the same name with the suffix `.json`.
        comparison: what `compare` returned.
        title: the page's heading, such as "v41 -> v42".
        inputs: the test set's inputs, in the order of the comparison.
        classes: the names of the classes, tags or outputs.
        picture: how to draw one input: a function of the item, without its batch dimension, to pixels (height, width)
            or (height, width, 3), bytes or numbers from 0 to 1. When not given, inputs (n, 1 or 3, height, width) are
            drawn with each channel stretched over its range in the test set, and others by their row alone.
        limits: what the verdict goes by.

    Raises:
        ShapeMismatch: the inputs are not as many as the comparison's items.
        MissingExtra: Jinja2 or matplotlib is not installed.
    """
    place = page_path(path)
    if length(inputs) != len(comparison.before):
        raise ShapeMismatch(
            f"the comparison has {len(comparison.before)} items and the inputs {length(inputs)}; expected the same"
        )
    verdict = comparison.judge(limits, classes)
    view = {"judged": judgement(title, verdict), "changes": changes(comparison, inputs, Names(classes), picture)}
    facts = {
        "title": title,
        "classes": list(classes),
        "verdict": verdict.to_json(),
        "comparison": comparison.to_json(limits),
    }
    return write(place, "comparison.html.j2", view, facts)
