"""What the paper argues about but does not draw: every unit's accuracy over depth and epochs, layer-wise beside global."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layerwise.curves import Depth, probe_depth, unit_depth
from layerwise.evidence import Evidence
from layerwise.figures.style import COLOURS, DASHES, MARKERS, Drawing, faint_grid
from layerwise.hierarchy import format_hierarchy
from layerwise.measured import Setting
from layerwise.paper import COLUMNS, ROWS, Row

# which rows are drawn, as far as they were run, the first ones first: table and name
DRAWN = (
    *((5, name) for name in ("resnet18", "resnet18_r4", "resnet50", "resnet50_r4")),
    *((3, "resnet18_e2"), (1, "vgg16"), (1, "vgg8b")),
    *((6, name) for name in ("resnet18", "resnet18_r5", "resnet50", "resnet50_r2")),
)
MOST = 6  # figures: a page stays small
LINES = 4  # epochs or units that have a line
BY_NAME = {(row.table, row.name): row for row in ROWS}
WORDS = {"layerwise": "layer-wise", "global": "global"}


def drawings(evidence: Evidence) -> Iterator[Drawing]:
    """Rows of the first setting that has them."""
    made = 0
    for key in DRAWN:
        for setting in evidence.settings:
            panels = found(evidence, setting, BY_NAME[key])
            if panels and made < MOST:
                made += 1
                yield drawing(BY_NAME[key], setting, panels)
                break


def drawing(row: Row, setting: Setting, panels: Mapping[str, Sequence[Depth]]) -> Drawing:
    kind = next(iter(panels.values()))[0].kind
    title = f"{row.name} {format_hierarchy(row.hierarchy)} on {row.data}, measured at {setting.title}"
    return Drawing(
        f"depth-{row.table}-{row.name}-{setting.key}",
        f"{title}: {kind}. Above, as a map over depth and epochs (first seed); below, over depth at some epochs and over "
        "epochs at some depths; with several seeds the mean, and a band of one standard deviation.",
        partial(draw, f"{title}\n{kind}", panels),
    )


def found(evidence: Evidence, setting: Setting, row: Row) -> dict[str, list[Depth]]:
    """Accuracy over depth by column, a ``Depth`` per seed: by linear probes where both columns have them, else of either."""
    records = {}
    for column in COLUMNS:
        number = evidence.number(setting, row, column)
        if number:
            records[column] = number.records
    for measure in (probe_depth, unit_depth):
        panels = {column: [depth for record in of for depth in [measure(record)] if depth] for column, of in records.items()}
        panels = {column: alike(depths) for column, depths in panels.items() if depths}
        if panels:
            return panels
    return {}


def alike(depths: Sequence[Depth]) -> list[Depth]:
    """Those that have the first one's units and epochs: only they have a mean."""
    first = depths[0]
    return [depth for depth in depths if (depth.names, depth.epochs, depth.kind) == (first.names, first.epochs, first.kind)]


def draw(title: str, panels: Mapping[str, Sequence[Depth]]) -> Figure:
    figure = Figure(figsize=(1.5 + 3.2 * len(panels), 8.0))
    figure.subplots_adjust(
        left=0.6 / figure.get_figwidth(), right=1 - 0.62 / figure.get_figwidth(), top=0.9, bottom=0.1, hspace=0.62
    )
    columns = figure.subplots(3, len(panels), squeeze=False, sharey="row")
    known = [value for depths in panels.values() for unit in depths[0].values for value in unit if value is not None]
    scale = Normalize(min(known), max(known))
    for index, (column, depths) in enumerate(panels.items()):
        top, middle, low = columns[:, index]
        draw_map(top, depths[0], scale)
        top.set_title(WORDS[column])
        over_depth(middle, depths)
        over_epochs(low, depths)
    for axes, label in zip(columns[:, 0], ("epoch", "accuracy, %", "accuracy, %"), strict=True):
        axes.set_ylabel(label)
    box = columns[0, -1].get_position()
    place = figure.add_axes((box.x1 + 0.08 / figure.get_figwidth(), box.y0, 0.1 / figure.get_figwidth(), box.height))
    figure.colorbar(ScalarMappable(scale, "cividis"), cax=place, label="accuracy, %")
    title = "\n".join(line for part in title.splitlines() for line in wrap(part, int(14 * figure.get_figwidth())))
    figure.text(0.01, 0.99, title, va="top", fontsize=8.5)
    return figure


def draw_map(axes: Axes, depth: Depth, scale: Normalize) -> None:
    """Depth from left to right, epochs upwards."""
    values = [[float("nan") if value is None else value for value in row] for row in zip(*depth.values, strict=True)]
    edges = [
        depth.epochs[0] - 0.5,
        *((a + b) / 2 for a, b in zip(depth.epochs, depth.epochs[1:], strict=False)),
        depth.epochs[-1] + 0.5,
    ]
    axes.pcolormesh(
        [index - 0.5 for index in range(len(depth.names) + 1)], edges, values, norm=scale, cmap="cividis", rasterized=True
    )
    axes.set_yticks(some(depth.epochs))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel(f"depth, units ({depth.names[0]} … {depth.names[-1]})")


def over_depth(axes: Axes, depths: Sequence[Depth]) -> None:
    first = depths[0]
    for look, place in enumerate(spaced(len(first.epochs))):
        points = [(unit, [depth.values[unit][place] for depth in depths]) for unit in range(len(first.names))]
        draw_line(axes, points, look, f"epoch {first.epochs[place]}")
    axes.set_xlabel("depth, units")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    below(axes)
    faint_grid(axes)


def over_epochs(axes: Axes, depths: Sequence[Depth]) -> None:
    first = depths[0]
    for look, unit in enumerate(spaced(len(first.names))):
        points = [(epoch, [depth.values[unit][place] for depth in depths]) for place, epoch in enumerate(first.epochs)]
        draw_line(axes, points, look, f"{unit}: {first.names[unit]}")
    axes.set_xlabel("epoch")
    axes.set_xticks(some(first.epochs))
    below(axes)
    faint_grid(axes)


def below(axes: Axes) -> None:
    """The legend under the axis' label, where it hides no line."""
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.24), borderaxespad=0.0)


def draw_line(axes: Axes, points: Sequence[tuple[int, Sequence[float | None]]], look: int, label: str) -> None:
    """The mean over seeds with a band, where every seed has a value."""
    whole = [(at, [value for value in values if value is not None]) for at, values in points if None not in values]
    if not whole:
        return
    places, means = [at for at, _ in whole], [fmean(values) for _, values in whole]
    axes.plot(
        places,
        means,
        color=COLOURS[look],
        linestyle=DASHES[look],
        marker=MARKERS[look],
        markevery=max(1, len(places) // 10),
        markersize=3,
        linewidth=1.1,
        label=label,
    )
    if len(points[0][1]) > 1:
        spreads = [stdev(values) for _, values in whole]
        low, high = ([mean + sign * spread for mean, spread in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=COLOURS[look], alpha=0.18, linewidth=0)


def some(epochs: Sequence[int]) -> list[int]:
    """At most six of the epochs that were measured, evenly, the last among them."""
    every = -(-len(epochs) // 6)
    return list(epochs[::-1][::every][::-1])


def spaced(count: int) -> list[int]:
    """The first, the last and up to two between."""
    return sorted({round(index * (count - 1) / (LINES - 1)) for index in range(LINES)})
