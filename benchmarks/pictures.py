"""Draw two figures of README: the chain of units, and the depth at which classes become separable.

The chain is a drawing. The map shows what was measured of ResNet18 [4,4,4,4] while it was trained
layer-wise and globally, from the runs in ``results/small-runs.tar.gz``: the mean over their seeds.
Nothing is trained. Needs matplotlib.

    python benchmarks/pictures.py --output docs/images
"""

import argparse
import tarfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import layerwise

RUNS = Path(__file__).parents[1] / "results" / "small-runs.tar.gz"
PANELS = {  # title -> beginning of the runs' names
    "layer-wise, by local losses": "resnet18-4-4-4-4-cifar10-simultaneous-predsim-seed",
    "global backpropagation": "resnet18-4-4-4-4-cifar10-global-seed",
}
SETTING = (
    "ResNet18 [4,4,4,4], a quarter of the width, 15,000 images of CIFAR-10 at 16 pixels; "
    "probes of held-out images; mean of 3 seeds"
)
STYLE: Any = {  # matplotlib's names, of which its types know each
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "figure.facecolor": "white",  # legible on a dark page too
    "svg.hashsalt": "layerwise",  # the same file every time
    "svg.fonttype": "path",
}
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito: the colour-blind tell them apart
DASHED: Any = (0, (3, 1.5))
UNIT, HEAD, LOSS = "#DCEBF5", "#F2F2F2", "#FBE5D6"

WIDTH, HEIGHT = 1.3, 0.62  # of a box
ROWS = {"unit": 0.0, "head": 1.15, "loss": 2.3}  # heights of the boxes' centres
COLUMNS = (1.55, 4.0, 6.45, 9.6)  # of the units' centres

Place = tuple[float, float]
Map = dict[int, list[float]]  # epoch -> accuracy of a linear probe by depth, percent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, figure in (("chain", chain()), ("separability-map", separability_map(RUNS))):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
            print(f"written: {folder / name}.svg, .png")


def chain() -> Figure:
    """Units with their heads and losses; features pass all of them, gradients one each."""
    figure = Figure(figsize=(8, 3.5))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-0.6, 11.8), ylim=(-1.5, 3.55))
    axes.axis("off")
    title = "Each unit learns from its own local loss; no gradient crosses its border"
    axes.text(5.6, 3.35, title, ha="center", va="top", fontsize=12, weight="bold")
    for column, name in zip(COLUMNS, ("1", "2", "3", "K"), strict=True):
        draw_unit(axes, column, name, last=name == "K")
    for x, text in ((-0.05, "image"), (8.05, "…"), (11.2, "class\nscores")):
        axes.text(x, 0, text, ha="center", va="center")
    edges = [(column - WIDTH / 2, column + WIDTH / 2) for column in COLUMNS]
    places = [(0.0, 0.4), *edges[:3], (7.8, 8.3), edges[3], (10.75, 11.0)]
    ways = [(left[1], right[0]) for left, right in pairwise(places)]
    for start, end in ways:
        forward(axes, (start, 0), (end, 0))
    for start, end in ways[1:-1]:
        middle = (start + end) / 2
        axes.plot([middle, middle], [-0.42, 0.42], color="black", linewidth=2.6)
    axes.legend(handles=legend(), loc="lower center", ncols=3, frameon=False)
    return figure


def draw_unit(axes: Axes, x: float, index: str, last: bool) -> None:
    """A unit, its auxiliary head and its loss; the last unit gives class scores and has no head."""
    box(axes, (x, ROWS["unit"]), f"unit {index}", UNIT)
    box(axes, (x, ROWS["loss"]), f"loss {index}", LOSS)
    if last:
        both_ways(axes, x, ROWS["unit"], ROWS["loss"])
        return
    box(axes, (x, ROWS["head"]), "auxiliary\nhead", HEAD)
    both_ways(axes, x, ROWS["unit"], ROWS["head"])
    both_ways(axes, x, ROWS["head"], ROWS["loss"])


def box(axes: Axes, centre: Place, text: str, colour: str) -> None:
    corner = centre[0] - WIDTH / 2, centre[1] - HEIGHT / 2
    style = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, style, facecolor=colour, edgecolor="0.25"))
    axes.text(*centre, text, ha="center", va="center", linespacing=0.95)


def both_ways(axes: Axes, x: float, low: float, high: float) -> None:
    """Features up to the next box, its gradient back down."""
    low, high = low + HEIGHT / 2, high - HEIGHT / 2
    forward(axes, (x - 0.2, low), (x - 0.2, high))
    arrow(axes, (x + 0.2, high), (x + 0.2, low), ORANGE, DASHED)


def forward(axes: Axes, start: Place, end: Place) -> None:
    arrow(axes, start, end, BLUE, "-")


def arrow(axes: Axes, start: Place, end: Place, colour: str, line: Any) -> None:
    look: Any = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, linestyle=line, linewidth=1.6, **look))


def legend() -> list[Line2D]:
    border: Any = {"marker": "|", "markersize": 16, "markeredgewidth": 2.6, "linestyle": ""}
    return [
        Line2D([], [], color=BLUE, linewidth=1.6, label="features, forward"),
        Line2D([], [], color=ORANGE, linewidth=1.6, linestyle=DASHED, label="gradients, in a unit"),
        Line2D([], [], color="black", label="border, where gradients stop", **border),
    ]


def separability_map(archive: Path) -> Figure:
    """Accuracy of a linear probe over depth and epochs, layer-wise beside global, on one scale."""
    with TemporaryDirectory() as folder, tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
        maps = {title: mean_map(folder, beginning) for title, beginning in PANELS.items()}
    values = [value for panel in maps.values() for row in panel.values() for value in row]
    local, joint = (added_by_depth(panel) for panel in maps.values())
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    figure.suptitle(
        "Features hardly become more separable with depth when trained layer-wise:\n"
        f"{local:+.0f} points from the first unit to the best, {joint:+.0f} when trained globally",
        fontsize=12,
        weight="bold",
    )
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, panel) in zip(panels, maps.items(), strict=True):
        drawn = draw_map(axes, panel, min(values), max(values))
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("epoch")
    figure.supxlabel(SETTING, fontsize=8.5)
    figure.colorbar(drawn, ax=panels, label="accuracy of a linear probe, %", aspect=16)
    return figure


def mean_map(folder: str, beginning: str) -> Map:
    """The mean over the runs whose names begin so, which differ in their seeds alone."""
    values: dict[tuple[int, int], list[float]] = defaultdict(list)
    for run in sorted(Path(folder).glob(f"{beginning}*")):
        for row in layerwise.separability_over_epochs(run):
            values[row["epoch"], row["depth"]].append(row["linear_probe"])
    rows: Map = defaultdict(list)
    for epoch, depth in sorted(values):
        rows[epoch].append(fmean(values[epoch, depth]))
    return rows


def added_by_depth(panel: Map) -> float:
    """Points between the first unit's accuracy and the best unit's, after the last epoch."""
    accuracies = panel[max(panel)][1:]  # without the image
    return max(accuracies) - accuracies[0]


def draw_map(axes: Axes, panel: Map, low: float, high: float) -> AxesImage:
    """Depth from left to right, epochs upwards."""
    epochs, depths = list(panel), len(next(iter(panel.values())))
    extent = (-0.5, depths - 0.5, -0.5, len(epochs) - 0.5)
    look: Any = {"aspect": "auto", "origin": "lower", "cmap": "cividis", "interpolation": "nearest"}
    drawn = axes.imshow(list(panel.values()), extent=extent, vmin=low, vmax=high, **look)
    axes.set_yticks(range(len(epochs)), [str(epoch) for epoch in epochs])
    axes.set_xticks(range(0, depths, 4))
    axes.set_xlabel("depth, units (0: the image)")
    return drawn


if __name__ == "__main__":
    main()
