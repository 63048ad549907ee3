"""Accuracy against multiply-adds and against memory: a point per method, and the fronts.

Needs matplotlib.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from math import cos, radians, sin
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from layerwise.experiments.methods.table import peak_key, title_of
from layerwise.report.figures.style import COLOURS, DPI, MARKERS, RULES, faint_grid
from layerwise.utils.files import figure_metadata, replacing

WHOLE = {"global": ("*", 11.0), "checkpointed": ("X", 7.5)}  # marker and size
Points = list[tuple[float, float]]
# places of a label around its point, nearest first: points of type, degrees
DISTANCES, ANGLES = (7, 14, 22, 32, 44), (0, 180, 45, 315, 135, 225, 90, 270)
NEAR = 7  # a label within is its point's at sight
FAR = 200  # points of type away are as bad as covering as much as the label's area
# pixels around lines and around points that labels leave free
LINE, POINT = 0.02 * DPI, 0.07 * DPI
FRONT: dict[str, Any] = {"color": "0.45", "linewidth": 0.9, "linestyle": "--", "zorder": 1}


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
    figure = Figure(figsize=(9.6, 4.4), dpi=DPI, layout="constrained")
    figure.suptitle(title_of(table), fontsize=9, x=0.01, ha="left")
    work, memory = figure.subplots(1, 2, sharey=True)
    equal_work, key = table["equal"] == "multiply-adds", peak_key(rows)
    # where all trainings cost alike, steps are shown, and there is no front
    works = [row["multiply_adds_ratio" if equal_work else "training_ratio"] for row in rows]
    peaks = [row[key] / 1e6 for row in rows]
    lines = [
        draw_panel(work, rows, works, None if equal_work else "front_multiply_adds"),
        draw_panel(memory, rows, peaks, "front_memory"),
    ]
    step = "a step" if equal_work or table["equal"] == "epochs" else "the training"
    measured = "measured" if key == "peak_memory_bytes" else "predicted"
    work.set(ylabel="test accuracy, %", xlabel=f"multiply-adds of {step}, relative to global")
    memory.set(xlabel=f"peak of memory, MB ({measured})")
    memory.tick_params(labelleft=True)
    figure.legend(handles=legend(rows), loc="upper right", ncols=3)
    figure.draw_without_rendering()  # labels are placed by what is drawn
    figure.set_layout_engine("none")
    for axes, places, front in zip((work, memory), (works, peaks), lines, strict=True):
        label_points(axes, rows, places, front)
    return figure


def legend(rows: Sequence[dict[str, Any]]) -> list[Line2D]:
    """What lines and fillings mean."""
    look: dict[str, Any] = {"color": "0.3", "linestyle": "none", "marker": "o", "markersize": 6}
    handles = [Line2D([], [], label="front", **FRONT)]
    if len({row["span"] for row in rows if row["loss"] is not None}) > 1:
        handles += [
            Line2D([], [], label="span 1", markerfacecolor="white", **look),
            Line2D([], [], label="span above 1", **look),
        ]
    return handles


def draw_panel(
    axes: Axes, rows: Sequence[dict[str, Any]], places: Sequence[float], front: str | None
) -> Points:
    """Draw a panel, and return the corners of its front.

    Args:
        front: entry of the rows that says which are on it; None: there is none.
    """
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
    axes.margins(x=0.18, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    faint_grid(axes)
    pairs = zip(rows, places, strict=True)
    corners = sorted((at, row["test_accuracy"]) for row, at in pairs if front and row[front])
    if corners:
        right = axes.get_xlim()[1]
        corners = [
            corner
            for pair in pairwise([*corners, (right, corners[-1][1])])
            for corner in (pair[0], (pair[1][0], pair[0][1]))
        ]
        axes.plot(*zip(*corners, strict=True), **FRONT)
        axes.set_xlim(right=right)
    return corners


def look_of(row: dict[str, Any], losses: Sequence[str]) -> dict[str, Any]:
    if row["loss"] is None:
        marker, size = WHOLE.get(row["method"], ("p", 8.0))
        return {"marker": marker, "markersize": size, "color": "black"}
    number = losses.index(row["loss"])
    colours = [colour for colour in COLOURS if colour != "#000000"]
    colour = colours[number % len(colours)]
    filled = colour if row["span"] != 1 else "white"
    marker = MARKERS[number % 4]
    return {"marker": marker, "markersize": 6, "color": colour, "markerfacecolor": filled}


def label_points(
    axes: Axes, rows: Sequence[dict[str, Any]], places: Sequence[float], front: Points
) -> None:
    """Write every method's name beside its point, where it covers nothing else."""
    heights = [row["test_accuracy"] for row in rows]
    taken = [box_of(axes, pair) for pair in pairwise(front)]
    for place, height, row in zip(places, heights, rows, strict=True):
        spread = row["deviation"] or 0.0
        taken.append(box_of(axes, [(place, height - spread), (place, height + spread)]))
        taken.append(box_of(axes, [(place, height)] * 2, POINT))
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


def box_of(axes: Axes, ends: Sequence[tuple[float, float]], around: float = LINE) -> Bbox:
    """The part of a panel around a line, in pixels."""
    (left, low), (right, high) = sorted(map(tuple, axes.transData.transform(ends)))
    low, high = sorted((low, high))
    return Bbox.from_extents(left - around, low - around, right + around, high + around)


def place_label(label: Any, taken: Sequence[Bbox], inside: Bbox) -> None:
    """Move a label to where little is covered, near its point."""

    def cost(choice: tuple[int, int]) -> float:
        move(label, *choice)
        box = label.get_window_extent()
        covered = sum(area(Bbox.intersection(box, other)) for other in taken)
        outside = area(box) - area(Bbox.intersection(box, inside))
        return (covered + 2 * outside) / area(box) + choice[0] / FAR

    choices = list(product(DISTANCES, ANGLES))
    costs = {choice: cost(choice) for choice in choices}
    distance, angle = min(choices, key=lambda choice: costs[choice])  # the first of equals
    move(label, distance, angle)
    if distance > NEAR:
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
