"""Figures 4 and 5: test error over epochs of layer-wise training, published networks and their accelerated forms."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from textwrap import wrap

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layerwise.curves import Curve, mean_curve
from layerwise.evidence import Evidence
from layerwise.figures.bars import DATA
from layerwise.figures.style import Drawing, faint_grid, line
from layerwise.hierarchy import format_hierarchy
from layerwise.measured import Setting
from layerwise.paper import ROWS, Row

# figure -> the paper's table, and its four rows
FIGURES = {
    4: (5, ("resnet18", "resnet18_r4", "resnet50", "resnet50_r4")),
    5: (6, ("resnet18", "resnet18_r4", "resnet50", "resnet50_r2")),
}


def drawings(evidence: Evidence) -> Iterator[Drawing]:
    for setting in evidence.settings:
        for number, (table, names) in FIGURES.items():
            rows = [row for row in ROWS if row.table == table and row.name in names]
            lines = list(curves(evidence, setting, rows))
            if lines:
                data = DATA[rows[0].data]
                yield Drawing(
                    f"figure-{number}-{setting.key}",
                    f"Figure {number} as measured at {setting.title}: test error of layer-wise training over epochs on {data}. "
                    "With several seeds: the mean, and a band of one standard deviation of a single run.",
                    partial(draw, f"{data}, measured at {setting.title}", lines),
                )


def curves(evidence: Evidence, setting: Setting, rows: Sequence[Row]) -> Iterator[tuple[int, str, Curve]]:
    """Look, label and error of each row that was run."""
    for index, row in enumerate(rows):
        number = evidence.number(setting, row, "layerwise")
        found = mean_curve(number.records) if number else None
        if found:
            seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
            yield index, f"{row.name} {format_hierarchy(row.hierarchy)}, {seeds}", error(found)


def error(accuracy: Curve) -> Curve:
    """Percent of the test images that are classified wrongly."""
    return replace(accuracy, mean=tuple(100 - mean for mean in accuracy.mean))


def draw(title: str, lines: Sequence[tuple[int, str, Curve]]) -> Figure:
    figure = Figure(figsize=(5.2, 3.4))
    figure.subplots_adjust(left=0.11, right=0.985, top=0.9, bottom=0.13)
    axes = figure.subplots()
    for index, label, curve in lines:
        line(axes, curve, index, label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylabel("test error, %")
    axes.set_title("\n".join(wrap(title, 72)))
    axes.margins(x=0.02)
    axes.legend()
    faint_grid(axes)
    return figure
