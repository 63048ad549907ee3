"""Accuracy against work: what ``layerwise accelerate`` found."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise.hierarchy import design_of
from layerwise.report.figures.style import COLOURS, MARKERS, faint_grid

WAYS = {"simultaneous": "layer-wise", "global": "global"}


def draw(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw layer-wise and global test accuracy over multiply-adds, and the Pareto front.

    Points are means, bars deviations; the front is that of layer-wise training.

    Args:
        rows: of ``results.result_rows``.
    """
    rows_by_work = sorted(rows, key=lambda row: row["multiply_adds"])
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, rule in enumerate(WAYS):
        draw_points(
            axes, [(work(row), row["rules"][rule]) for row in rows_by_work], number, WAYS[rule]
        )
    front = [
        (work(row), row["rules"]["simultaneous"]["test_accuracy"])
        for row in rows_by_work
        if row["pareto"]
    ]
    if len(front) > 1:  # of a single point there is no line to draw
        axes.step(
            *zip(*sorted(front), strict=True),
            where="post",
            color=COLOURS[0],
            linewidth=0.8,
            label="Pareto front",
        )
    most = max((work(row) for row in rows_by_work), default=0.0)
    least = min((work(row) for row in rows_by_work), default=0.0)
    for row in rows_by_work:  # below the point, off the front, and into the figure
        place = work(row), row["rules"]["simultaneous"]["test_accuracy"]
        right = 2 * place[0] > least + most
        offset, side = ((-4, -12), "right") if right else ((4, -12), "left")
        axes.annotate(
            design_of(row).text, place, offset, textcoords="offset points", fontsize=7, ha=side
        )
    axes.set(
        title=title, xlabel="multiply-adds of a forward pass, millions", ylabel="test accuracy, %"
    )
    axes.margins(x=0.15)
    faint_grid(axes)
    axes.legend()
    return figure


def draw_points(
    axes: Axes, points: Sequence[tuple[float, Mapping[str, Any]]], number: int, label: str
) -> None:
    axes.errorbar(
        [x for x, _ in points],
        [cell["test_accuracy"] for _, cell in points],
        [cell["deviation"] or 0.0 for _, cell in points],
        fmt=MARKERS[number],
        color=COLOURS[number],
        elinewidth=0.8,
        capsize=2 + 2 * number,  # where both lie at the same work, the caps tell them apart
        label=label,
    )


def work(row: Mapping[str, Any]) -> float:
    millions: float = row["multiply_adds"] / 1e6
    return millions
