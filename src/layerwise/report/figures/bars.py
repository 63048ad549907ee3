"""Figure 1: bars of layer-wise and global training over the published networks."""

from collections.abc import Sequence
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise.hierarchy import format_hierarchy
from layerwise.paper.rows import Row
from layerwise.report.figure_data import Bar, Bars
from layerwise.report.figures.style import GLOBAL, LAYERWISE, faint_grid

WIDTH = 0.38  # of a bar
FEWEST = 4  # networks that there is room for


def draw(bars: Bars) -> Figure:
    lines = wrap(bars.title, 62)
    head, foot = 0.38 + 0.15 * len(lines), 0.42  # inches
    height = head + foot + 0.1 + 2.1 * len(bars.panels)
    figure = Figure(figsize=(7.2, height))
    figure.subplots_adjust(
        left=0.075, right=0.99, top=1 - head / height, bottom=foot / height, hspace=0.42
    )
    axes = figure.subplots(len(bars.panels), 1, squeeze=False)[:, 0]
    for place, (title, panel) in zip(axes, bars.panels.items(), strict=True):
        draw_panel(place, title, list(panel), list(panel.values()))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, bbox_to_anchor=(0.99, 1.0))
    figure.text(0.01, 0.985, "\n".join(lines), va="top", fontsize=9, fontweight="bold")
    return figure


def draw_panel(axes: Axes, title: str, rows: Sequence[Row], bars: Sequence[Sequence[Bar]]) -> None:
    for side, (label, look) in enumerate((("layer-wise", LAYERWISE), ("global", GLOBAL))):
        values = [pair[side] for pair in bars]
        places = [index + (side - 0.5) * WIDTH for index in range(len(rows))]
        heights = [value or 0.0 for value, _ in values]
        axes.bar(places, heights, WIDTH, label=label, linewidth=0.6, **look)
        spread = [
            (at, value, deviation)
            for at, (value, deviation) in zip(places, values, strict=True)
            if deviation
        ]
        if spread:
            centres, means, halves = zip(*spread, strict=True)
            axes.errorbar(
                centres, means, yerr=halves, fmt="none", ecolor="black", elinewidth=0.8, capsize=2
            )
        for at, (value, deviation) in zip(places, values, strict=True):
            if value is not None:
                axes.text(
                    at,
                    value + (deviation or 0) + 0.2,
                    f"{value:.1f}",
                    ha="center",
                    va="bottom",
                    fontsize=6.5,
                )
    accuracies = [value for pair in bars for value, _ in pair if value is not None]
    room = max(2.0, max(accuracies) - min(accuracies))
    axes.set_ylim(max(0, min(accuracies) - 0.35 * room), max(accuracies) + 0.22 * room)
    axes.set_xlim(-0.6, max(len(rows), FEWEST) - 0.4)
    axes.set_xticks(
        range(len(rows)),
        [f"{row.name}\n{format_hierarchy(row.hierarchy)}" for row in rows],
        fontsize=7,
    )
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{title} (the axis does not begin at 0)")
    faint_grid(axes)
