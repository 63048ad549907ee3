"""Every unit's accuracy over depth and epochs, layer-wise beside global.

The paper argues about it but does not draw it.
"""

from collections.abc import Sequence
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layerwise.report.curves import Depth, sample
from layerwise.report.figure_data import LINES, WORDS, Depths, mean_depth
from layerwise.report.figures.style import COLOURS, DASHES, MARKERS, faint_grid


def draw(depths: Depths) -> Figure:
    panels = {column: mean_depth(of_seeds) for column, of_seeds in depths.panels.items()}
    figure = Figure(figsize=(1.5 + 3.2 * len(panels), 8.0))
    figure.subplots_adjust(
        left=0.6 / figure.get_figwidth(),
        right=1 - 0.62 / figure.get_figwidth(),
        top=0.9,
        bottom=0.1,
        hspace=0.62,
    )
    columns = figure.subplots(3, len(panels), squeeze=False, sharey="row")
    accuracies = [
        value
        for mean, _ in panels.values()
        for unit in mean.values
        for value in unit
        if value is not None
    ]
    scale = Normalize(min(accuracies), max(accuracies))
    for index, (column, (mean, deviation)) in enumerate(panels.items()):
        top, middle, low = columns[:, index]
        draw_map(top, mean, scale)
        top.set_title(WORDS[column])
        over_depth(middle, mean, deviation)
        over_epochs(low, mean, deviation)
    for axes, label in zip(columns[:, 0], ("epoch", "accuracy, %", "accuracy, %"), strict=True):
        axes.set_ylabel(label)
    box = columns[0, -1].get_position()
    place = figure.add_axes(
        (box.x1 + 0.08 / figure.get_figwidth(), box.y0, 0.1 / figure.get_figwidth(), box.height)
    )
    figure.colorbar(ScalarMappable(scale, "cividis"), cax=place, label="accuracy, %")
    title = "\n".join(
        line
        for part in (depths.title, depths.kind)
        for line in wrap(part, int(14 * figure.get_figwidth()))
    )
    figure.text(0.01, 0.99, title, va="top", fontsize=8.5)
    return figure


def draw_map(axes: Axes, depth: Depth, scale: Normalize) -> None:
    """Depth from left to right, epochs upwards."""
    values = [
        [float("nan") if value is None else value for value in row]
        for row in zip(*depth.values, strict=True)
    ]
    edges = [
        depth.epochs[0] - 0.5,
        *((a + b) / 2 for a, b in zip(depth.epochs, depth.epochs[1:], strict=False)),
        depth.epochs[-1] + 0.5,
    ]
    axes.pcolormesh(
        [index - 0.5 for index in range(len(depth.names) + 1)],
        edges,
        values,
        norm=scale,
        cmap="cividis",
        rasterized=True,
    )
    axes.set_yticks(evenly(depth.epochs))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel(f"depth, units ({depth.names[0]} … {depth.names[-1]})")


def over_depth(axes: Axes, mean: Depth, deviation: Depth | None) -> None:
    places = range(len(mean.names))
    for look, at in enumerate(sample(len(mean.epochs), LINES)):
        spreads = [unit[at] for unit in deviation.values] if deviation else None
        draw_line(
            axes,
            places,
            [unit[at] for unit in mean.values],
            spreads,
            look,
            f"epoch {mean.epochs[at]}",
        )
    axes.set_xlabel("depth, units")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    below(axes)
    faint_grid(axes)


def over_epochs(axes: Axes, mean: Depth, deviation: Depth | None) -> None:
    for look, unit in enumerate(sample(len(mean.names), LINES)):
        spreads = deviation.values[unit] if deviation else None
        draw_line(
            axes, mean.epochs, mean.values[unit], spreads, look, f"{unit}: {mean.names[unit]}"
        )
    axes.set_xlabel("epoch")
    axes.set_xticks(evenly(mean.epochs))
    below(axes)
    faint_grid(axes)


def below(axes: Axes) -> None:
    """The legend under the axis' label, where it hides no line."""
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.24), borderaxespad=0.0)


def draw_line(
    axes: Axes,
    places: Sequence[int],
    means: Sequence[float | None],
    spreads: Sequence[float | None] | None,
    look: int,
    label: str,
) -> None:
    """A mean over seeds with its band, where it has a value."""
    points = [(at, mean) for at, mean in zip(places, means, strict=True) if mean is not None]
    if not points:
        return
    axes.plot(
        *zip(*points, strict=True),
        color=COLOURS[look],
        linestyle=DASHES[look],
        marker=MARKERS[look],
        markevery=max(1, len(points) // 10),
        markersize=3,
        linewidth=1.1,
        label=label,
    )
    if spreads:
        half = [value for value in spreads if value is not None]
        low, high = (
            [mean + sign * value for (_, mean), value in zip(points, half, strict=True)]
            for sign in (-1, 1)
        )
        axes.fill_between(
            [at for at, _ in points], low, high, color=COLOURS[look], alpha=0.18, linewidth=0
        )


def evenly(epochs: Sequence[int]) -> list[int]:
    """At most six of the epochs that were measured, evenly, the last among them."""
    every = -(-len(epochs) // 6)
    return list(epochs[::-1][::every][::-1])
