"""Files of the figures that the report's page draws as charts. Needs matplotlib.

Nothing in them is random or dated.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure

from layerwise.report.figure_data import Bars, Depths, Errors, Figure
from layerwise.report.figures import bars, depth, errors
from layerwise.report.figures.style import RULES, save

DRAW: dict[type, Callable[[Any], matplotlib.figure.Figure]] = {
    Bars: bars.draw,
    Errors: errors.draw,
    Depths: depth.draw,
}


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write every figure as ``name.svg`` and ``name.png``.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(RULES):
        drawn = ((DRAW[type(figure)](figure), folder / figure.name) for figure in figures)
        return [path for figure, place in drawn for path in save(figure, place)]
