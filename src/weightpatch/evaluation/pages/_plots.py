"""The page's figures: drawn by matplotlib as SVG that stands in the page, in the page's own colours and font."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ...errors import MissingExtra
from ..curve import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["drawdown_line", "histogram", "require_matplotlib", "slack_line"]

_COLUMNS = 21  # odd, so that one column holds the items that did not move
_WIDTH, _HEIGHT = 4.2, 2.7  # inches; the page stretches them to the width of a card

# Colours and a font that stand for variables of the page's style sheet, so that a figure follows light and dark
_SOFT, _LINE, _WAS, _NOW, _GOOD = "#010203", "#010204", "#010205", "#010206", "#010207"
_FONT = "DejaVu Sans"  # comes with matplotlib, so that all machines measure alike
_VARIABLES = {_SOFT: "soft", _LINE: "line", _WAS: "was", _NOW: "now", _GOOD: "good", f"'{_FONT}'": "sans"}

_STYLE = {
    "svg.fonttype": "none",
    "font.family": _FONT,
    "font.size": 10,
    "text.color": _SOFT,
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _WAS,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.autolimit_mode": "round_numbers",
    "xtick.major.pad": 7,
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("xtick.color", "ytick.color"), _SOFT),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "ytick.minor.size"), 0),
    **dict.fromkeys(("figure.constrained_layout.w_pad", "figure.constrained_layout.h_pad"), 0.02),
    "grid.color": _LINE,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


def require_matplotlib() -> None:
    """Check that figures can be drawn here.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtra('an HTML page needs matplotlib; pip install "weightpatch[report]"') from error


def slack_line(curve: Curve) -> str:
    """Draw the slack of the constraint over the strength, as SVG; where the constraint holds is shaded."""

    def paint(axes: Axes) -> None:
        _over_strength(axes, curve, [p.slack for p in curve.points])
        low, high = axes.get_ylim()
        axes.axhspan(0, high, color=_GOOD, alpha=0.1, linewidth=0)
        axes.set_ylim(low, high)
        if (start := curve.threshold) is not None:
            shift, side = (-5, "right") if start > 0.5 else (5, "left")
            label = axes.annotate("holds", (100 * start, high), (shift, -4), textcoords="offset points")
            label.set(color=_GOOD, weight="bold", ha=side, va="top")

    return _draw("slack", paint)


def drawdown_line(curve: Curve) -> str:
    """Draw the drawdown, with its 95 % interval, over the strength, as SVG."""

    def paint(axes: Axes) -> None:
        ranges = [(p.drawdown.low, p.drawdown.high) for p in curve.points]
        axes.fill_between(_percent(curve), *np.transpose(ranges), color=_NOW, alpha=0.14, linewidth=0)
        _over_strength(axes, curve, [p.drawdown.value for p in curve.points])
        axes.yaxis.set_major_formatter(_signed)

    return _draw("drawdown", paint)


def histogram(shift: Tensor, what: str = "change of probability") -> str:
    """Draw how far items moved, as SVG, those whose move is finite; items are on a logarithmic scale."""
    values = shift[shift.isfinite()].double().numpy()
    reach = max(float(np.abs(values).max(initial=0.0)), 1e-6)
    counts, edges = np.histogram(values, _COLUMNS, (-reach, reach))
    colours = [_WAS if i == _COLUMNS // 2 else _NOW for i in range(_COLUMNS)]

    def paint(axes: Axes) -> None:
        axes.bar((edges[:-1] + edges[1:]) / 2, counts, 1.76 * reach / _COLUMNS, color=colours, log=True)
        # One item has to be seen too, so the axis starts below 1
        axes.set_ylim(0.6, 10 ** max(1.0, np.ceil(np.log10(max(1, counts.max())))))
        axes.locator_params("x", nbins=4)
        axes.xaxis.set_major_formatter(_signed)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(f"{what}; items on a logarithmic scale")

    return _draw("shift", paint, height=3.2)


def _over_strength(axes: Axes, curve: Curve, values: Sequence[float]) -> None:
    axes.axhline(0, color=_SOFT, linewidth=0.8, linestyle="--")
    if curve.threshold is not None:
        axes.axvline(100 * curve.threshold, color=_GOOD, linewidth=1.2, clip_on=False)
    axes.plot(_percent(curve), values, "o-", color=_NOW, clip_on=False)
    axes.locator_params("y", nbins=5)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 25))
    axes.xaxis.set_major_formatter("{x:.0f}\u2009%")
    axes.set_xlabel("strength of the patch")


def _percent(curve: Curve) -> list[float]:
    return [100 * p.strength for p in curve.points]


def _signed(value: float, _: float) -> str:
    return f"{value:+g}".replace("-", "\u2212") if value else "0"


def _draw(name: str, paint: Callable[[Axes], None], height: float = _HEIGHT) -> str:
    """Let matplotlib draw a figure, whatever its user has configured; a page holds one figure of each name."""
    import matplotlib.style
    from matplotlib.figure import Figure

    out = BytesIO()
    with matplotlib.style.context(["default", {**_STYLE, "svg.hashsalt": f"weightpatch {name}"}]):
        figure = Figure((_WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _inline(out.getvalue().decode())


def _inline(text: str) -> str:
    """Turn an SVG document into an element of the page: no prolog, no style sheet, no id that nothing refers to."""
    text = re.sub(r'^.*?<svg[^>]*?( viewBox="[^"]*")[^>]*>', r"<svg\1>", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL).replace("xlink:href", "href")
    used = set(re.findall(r"#(\w+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var(--{variable})")
    return text.strip()
