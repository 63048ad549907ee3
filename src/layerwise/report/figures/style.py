"""Looks of figures, written so that the same runs give the same bytes.

Needs matplotlib.
"""

import io
import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise.report.curves import Curve
from layerwise.utils.files import figure_metadata, replacing

# Okabe and Ito's colours, which the colour-blind tell apart; dashes and markers do without colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (9, 2)),
    "-",
    (0, (3, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "x", "P")
LAYERWISE: dict[str, Any] = {"facecolor": "#0072B2", "edgecolor": "black"}
GLOBAL: dict[str, Any] = {"facecolor": "#F4D9A6", "edgecolor": "black", "hatch": "////"}
RULES: Any = {  # matplotlib's names, of which its types know each
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": True,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "none",
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
    "path.simplify": True,
    "svg.hashsalt": "layerwise",  # identifiers from contents alone
    "svg.fonttype": "path",  # the same on every machine
}
DPI = 300
# hundredths of a point are enough, and a third of the size
PLACES, DECIMALS, INDENTATION = (
    re.compile(r' (?:d|x|y)="[^"]*"'),
    re.compile(r"(\.\d\d)\d+"),
    re.compile(r"^ +", re.MULTILINE),
)


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure beside ``path`` as SVG and PNG."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=figure_metadata("svg"))
    svg = PLACES.sub(
        lambda place: DECIMALS.sub(r"\1", place[0]), INDENTATION.sub("", text.getvalue())
    )
    files = [path.parent / f"{path.name}{kind}" for kind in (".svg", ".png")]
    with replacing(files[0]) as draft:
        draft.write_text(svg, encoding="utf-8")
    with replacing(files[1]) as draft:
        figure.savefig(draft, format="png", dpi=DPI, metadata=figure_metadata("png"))
    return files


def line(axes: Axes, curve: Curve, index: int, label: str) -> None:
    """A mean over seeds with its band; looks by ``index``."""
    look = index % len(COLOURS)
    every = max(1, len(curve.epochs) // 8)
    axes.plot(
        curve.epochs,
        curve.mean,
        color=COLOURS[look],
        linestyle=DASHES[look],
        marker=MARKERS[look],
        markevery=(min(look, every - 1), every),
        label=label,
    )
    if curve.deviation:
        low = [mean - spread for mean, spread in zip(curve.mean, curve.deviation, strict=True)]
        high = [mean + spread for mean, spread in zip(curve.mean, curve.deviation, strict=True)]
        axes.fill_between(curve.epochs, low, high, color=COLOURS[look], alpha=0.18, linewidth=0)


def faint_grid(axes: Axes) -> None:
    axes.grid(axis="y", color="0.88", linewidth=0.5)
    axes.set_axisbelow(True)
