"""Figure 1: layer-wise against global training as bars over the published networks, on both data sets."""

from collections.abc import Iterator, Sequence
from functools import partial
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layerwise.evidence import Evidence
from layerwise.figures.style import GLOBAL, LAYERWISE, Drawing, faint_grid
from layerwise.hierarchy import format_hierarchy
from layerwise.measured import Setting
from layerwise.paper import ROWS, Row

NETWORKS = ("vgg8", "vgg11", "vgg16", "vgg19", "vgg8b", "resnet18", "resnet50")
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
WIDTH = 0.38  # of a bar
FEWEST = 4  # networks that there is room for

Bar = tuple[float | None, float | None]  # accuracy in percent and its deviation


def drawings(evidence: Evidence) -> Iterator[Drawing]:
    """The paper's numbers, and in figures of their own those of every setting."""
    yield Drawing(
        "figure-1-paper",
        "Figure 1 with the paper's numbers (Tables I to IV): test accuracy of layer-wise and global training.",
        partial(draw, "The paper's numbers (Tables I to IV)", None, None),
    )
    for setting in evidence.settings:
        if evidence.has(setting, base_rows()):
            yield Drawing(
                f"figure-1-{setting.key}",
                f"Figure 1 as measured at {setting.title}: test accuracy of layer-wise and global training; with several "
                "seeds, the mean and one standard deviation of a single run.",
                partial(draw, f"Measured at {setting.title}", evidence, setting),
            )


def base_rows() -> list[Row]:
    """The published networks, from the first table that has each."""
    found = {(row.data, row.name): row for row in reversed(ROWS) if row.name in NETWORKS}
    return [found[data, name] for data in DATA for name in NETWORKS]


def draw(title: str, evidence: Evidence | None, setting: Setting | None) -> Figure:
    panels = {data: [row for row in base_rows() if row.data == data] for data in DATA}
    bars = {row: [bar(row, column, evidence, setting) for column in ("layerwise", "global")] for row in base_rows()}
    shown = {data: rows for data, rows in panels.items() if any(value for row in rows for value, _ in bars[row])}
    lines = wrap(title, 62)
    head, foot = 0.38 + 0.15 * len(lines), 0.42  # inches
    height = head + foot + 0.1 + 2.1 * len(shown)
    figure = Figure(figsize=(7.2, height))
    figure.subplots_adjust(left=0.075, right=0.99, top=1 - head / height, bottom=foot / height, hspace=0.42)
    for axes, (data, rows) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown.items(), strict=True):
        known = [row for row in rows if any(value for value, _ in bars[row])]
        draw_panel(axes, DATA[data], known, [bars[row] for row in known])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, bbox_to_anchor=(0.99, 1.0))
    figure.text(0.01, 0.985, "\n".join(lines), va="top", fontsize=9, fontweight="bold")
    return figure


def bar(row: Row, column: str, evidence: Evidence | None, setting: Setting | None) -> Bar:
    if evidence is None or setting is None:
        return row.accuracy(column), None
    number = evidence.number(setting, row, column)
    return (number.mean, number.deviation) if number else (None, None)


def draw_panel(axes: Axes, title: str, rows: Sequence[Row], bars: Sequence[Sequence[Bar]]) -> None:
    for side, (label, look) in enumerate((("layer-wise", LAYERWISE), ("global", GLOBAL))):
        values = [pair[side] for pair in bars]
        places = [index + (side - 0.5) * WIDTH for index in range(len(rows))]
        heights = [value or 0.0 for value, _ in values]
        axes.bar(places, heights, WIDTH, label=label, linewidth=0.6, **look)
        spread = [(at, value, deviation) for at, (value, deviation) in zip(places, values, strict=True) if deviation]
        if spread:
            centres, means, halves = zip(*spread, strict=True)
            axes.errorbar(centres, means, yerr=halves, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
        for at, (value, deviation) in zip(places, values, strict=True):
            if value is not None:
                axes.text(at, value + (deviation or 0) + 0.2, f"{value:.1f}", ha="center", va="bottom", fontsize=6.5)
    known = [value for pair in bars for value, _ in pair if value is not None]
    room = max(2.0, max(known) - min(known))
    axes.set_ylim(max(0, min(known) - 0.35 * room), max(known) + 0.22 * room)
    axes.set_xlim(-0.6, max(len(rows), FEWEST) - 0.4)
    axes.set_xticks(range(len(rows)), [f"{row.name}\n{format_hierarchy(row.hierarchy)}" for row in rows], fontsize=7)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{title} (the axis does not begin at 0)")
    faint_grid(axes)
