"""Accuracy against multiply-adds and against memory: a point per method, and the fronts.

Needs matplotlib.
"""

from collections.abc import Sequence
from itertools import product
from math import cos, radians, sin
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from layerwise.experiments.methods.table import peak_key, title_of
from layerwise.report.figures.style import COLOURS, DPI, MARKERS, RULES, faint_grid
from layerwise.utils.files import figure_metadata, replacing

WHOLE = {"global": ("*", 11.0), "checkpointed": ("X", 7.5)}  # marker and size
# places of a label around its point, nearest first: points of type, degrees
DISTANCES, ANGLES = (7, 14, 22, 32, 44), (0, 180, 45, 315, 135, 225, 90, 270)
NEAR = 7  # a label within is its point's at sight
SPARE = 4.0  # pixels around a point that labels leave free


def write_figure(path: Path, table: dict[str, Any]) -> None:
    """Draw the figure and write it, as SVG or PNG by the path's end."""
    kind = path.suffix[1:]
    with matplotlib.rc_context(RULES), replacing(path) as draft:
        draw(table).savefig(draft, format=kind, dpi=DPI, metadata=figure_metadata(kind))


def draw(table: dict[str, Any]) -> Figure:
    """Draw both panels.

    Points are means over seeds, bars deviations. A loss has one colour and marker, filled where its
    span is above 1.
    """
    rows = table["rows"]
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    figure.suptitle(title_of(table), fontsize=9, x=0.01, ha="left")
    work, memory = figure.subplots(1, 2, sharey=True)
    equal_work = table["equal"] == "multiply-adds"
    draw_panel(work, rows, work_places(rows, equal_work), not equal_work, "front_multiply_adds")
    step = "a step" if equal_work or table["equal"] == "epochs" else "the training"
    work.set(ylabel="test accuracy, %", xlabel=f"multiply-adds of {step}, relative to global")
    key = peak_key(rows)
    draw_panel(memory, rows, [row[key] / 1e6 for row in rows], True, "front_memory")
    measured = "measured" if key == "peak_memory_bytes" else "predicted"
    memory.set(xlabel=f"peak of memory, MB ({measured})")
    memory.tick_params(labelleft=True)
    figure.draw_without_rendering()  # labels are placed by what is drawn
    figure.set_layout_engine("none")
    for axes, places in (
        (work, work_places(rows, equal_work)),
        (memory, [row[key] / 1e6 for row in rows]),
    ):
        label_points(axes, rows, places)
    return figure


def work_places(rows: Sequence[dict[str, Any]], equal_work: bool) -> list[float]:
    """Multiply-adds of each method; of a step where those of the training are equal."""
    return [row["multiply_adds_ratio" if equal_work else "training_ratio"] for row in rows]


def draw_panel(
    axes: Axes,
    rows: Sequence[dict[str, Any]],
    places: Sequence[float],
    has_front: bool,
    front: str,
) -> None:
    losses = list(dict.fromkeys(row["loss"] for row in rows if row["loss"] is not None))
    for row, place in zip(rows, places, strict=True):
        axes.errorbar(
            place,
            row["test_accuracy"],
            row["deviation"] or None,
            elinewidth=0.8,
            capsize=2,
            zorder=3,
            **look_of(row, losses),
        )
    on_front = sorted(
        (place, row["test_accuracy"])
        for row, place in zip(rows, places, strict=True)
        if row[front] and has_front
    )
    if len(on_front) > 1:  # of a single point there is no line to draw
        axes.step(
            *zip(*on_front, strict=True), where="post", color="0.45", linewidth=0.9, zorder=1
        )
    axes.margins(x=0.18, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    faint_grid(axes)


def look_of(row: dict[str, Any], losses: Sequence[str]) -> dict[str, Any]:
    if row["loss"] is None:
        marker, size = WHOLE.get(row["method"], ("p", 8.0))
        return {"marker": marker, "markersize": size, "color": "black"}
    number = losses.index(row["loss"])
    colours = [colour for colour in COLOURS if colour != "#000000"]
    colour = colours[number % len(colours)]
    filled = colour if row["span"] > 1 else "white"
    marker = MARKERS[number % 4]
    return {"marker": marker, "markersize": 6, "color": colour, "markerfacecolor": filled}


def label_points(axes: Axes, rows: Sequence[dict[str, Any]], places: Sequence[float]) -> None:
    """Write every method's name beside its point, where it covers no other."""
    heights = [row["test_accuracy"] for row in rows]
    points = [axes.transData.transform(pair) for pair in zip(places, heights, strict=True)]
    taken = [Bbox.from_extents(x - SPARE, y - SPARE, x + SPARE, y + SPARE) for x, y in points]
    inside = axes.get_window_extent()
    order = sorted(range(len(rows)), key=lambda index: -heights[index])
    for index in order:
        label = axes.annotate(
            rows[index]["method"],
            (places[index], heights[index]),
            (0, 0),
            textcoords="offset points",
            fontsize=7.5,
            va="center",
            zorder=4,
        )
        place_label(label, taken, inside)
        taken.append(label.get_window_extent())


def place_label(label: Any, taken: Sequence[Bbox], inside: Bbox) -> None:
    """Move a label to the nearest place around its point that is free, else to the freest."""

    def cost(choice: tuple[int, int]) -> float:
        move(label, *choice)
        box = label.get_window_extent()
        covered = sum(area(Bbox.intersection(box, other)) for other in taken)
        return covered + 2 * (area(box) - area(Bbox.intersection(box, inside)))

    choices = list(product(DISTANCES, ANGLES))
    costs = {choice: cost(choice) for choice in choices}
    distance, angle = min(choices, key=lambda choice: costs[choice])  # the first of equals
    move(label, distance, angle)
    if distance > NEAR:
        label.arrowprops = {}
        axes = label.axes
        axes.annotate(
            "",
            label.xy,
            label.get_position(),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.5", "shrinkB": 3},
            zorder=2,
        )


def move(label: Any, distance: int, angle: int) -> None:
    across, up = cos(radians(angle)), sin(radians(angle))
    label.set_position((distance * across, distance * up))
    label.set_horizontalalignment(
        "center" if abs(across) < 0.1 else "left" if across > 0 else "right"
    )


def area(box: Bbox | None) -> float:
    return 0.0 if box is None else box.width * box.height
