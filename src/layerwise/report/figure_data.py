"""The data of every figure, which the page draws as charts and ``figures`` as files.

No matplotlib.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from layerwise.hierarchy import format_hierarchy
from layerwise.paper.numbers import Setting
from layerwise.paper.rows import BY_NAME, COLUMNS, ROWS, Row
from layerwise.paper.verdicts import Evidence
from layerwise.report.curves import Curve, Depth, mean_curve, probe_depth, spread, unit_depth

DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
WORDS = {"layerwise": "layer-wise", "global": "global"}
NETWORKS = ("vgg8", "vgg11", "vgg16", "vgg19", "vgg8b", "resnet18", "resnet50")  # of figure 1
# figure -> the paper's table, and its four rows
ERRORS = {
    4: (5, ("resnet18", "resnet18_r4", "resnet50", "resnet50_r4")),
    5: (6, ("resnet18", "resnet18_r4", "resnet50", "resnet50_r2")),
}
# rows whose depth is drawn, as far as they were run, by row and then by scale: table and name
DEPTHS = (
    *((5, name) for name in ("resnet18", "resnet18_r4", "resnet50", "resnet50_r4")),
    *((3, "resnet18_e2"), (1, "vgg16"), (1, "vgg8b")),
    *((6, name) for name in ("resnet18", "resnet18_r5", "resnet50", "resnet50_r2")),
)
MOST = 6  # figures over depth: a page stays small
LINES = 4  # epochs or units that have a line

Bar = tuple[float | None, float | None]  # accuracy in percent and its deviation


@dataclass(frozen=True)
class Bars:
    """Figure 1: layer-wise against global training over the published networks.

    Attributes:
        panels: by data set, the rows with a bar per column; rows without any bar are left out.
    """

    name: str
    title: str
    caption: str
    panels: Mapping[str, Mapping[Row, tuple[Bar, Bar]]]


@dataclass(frozen=True)
class Errors:
    """Figure 4 or 5: test error of layer-wise training over epochs.

    Attributes:
        lines: look, name and error in percent of each row that was run.
    """

    name: str
    title: str
    caption: str
    lines: Sequence[tuple[int, str, Curve]]


@dataclass(frozen=True)
class Depths:
    """Every unit's accuracy over depth and epochs, which the paper argues about but does not draw.

    Attributes:
        kind: the measure in words.
        panels: by column, a ``Depth`` per seed; all of a column have the same units and epochs.
    """

    name: str
    title: str
    caption: str
    kind: str
    panels: Mapping[str, Sequence[Depth]]


Figure = Bars | Errors | Depths


def all_figures(evidence: Evidence) -> list[Figure]:
    """Every figure that the runs give."""
    return [*all_bars(evidence), *all_errors(evidence), *islice(all_depths(evidence), MOST)]


def all_bars(evidence: Evidence) -> Iterator[Bars]:
    """The paper's numbers, and in figures of their own those of every setting."""
    yield Bars(
        "figure-1-paper",
        "The paper's numbers (Tables I to IV)",
        "Figure 1 with the paper's numbers (Tables I to IV): test accuracy of layer-wise and "
        "global training.",
        bar_panels(
            {
                row: ((row.layerwise_accuracy, None), (row.global_accuracy, None))
                for row in base_rows()
            }
        ),
    )
    for setting in evidence.settings:
        if evidence.has(setting, base_rows()):
            yield Bars(
                f"figure-1-{setting.key}",
                f"Measured at {setting.title}",
                f"Figure 1 as measured at {setting.title}: test accuracy of layer-wise and global "
                "training; with several seeds, the mean and one standard deviation of a single "
                "run.",
                bar_panels(
                    {
                        row: (
                            bar(evidence, setting, row, "layerwise"),
                            bar(evidence, setting, row, "global"),
                        )
                        for row in base_rows()
                    }
                ),
            )


def base_rows() -> list[Row]:
    """The published networks, from the first table that has each."""
    first = {(row.data, row.name): row for row in reversed(ROWS) if row.name in NETWORKS}
    return [first[data, name] for data in DATA for name in NETWORKS]


def bar(evidence: Evidence, setting: Setting, row: Row, column: str) -> Bar:
    number = evidence.number(setting, row, column)
    return (number.mean, number.deviation) if number else (None, None)


def bar_panels(bars: Mapping[Row, tuple[Bar, Bar]]) -> dict[str, dict[Row, tuple[Bar, Bar]]]:
    measured = {row: pair for row, pair in bars.items() if any(mean for mean, _ in pair)}
    panels = {
        title: {row: pair for row, pair in measured.items() if row.data == data}
        for data, title in DATA.items()
    }
    return {title: rows for title, rows in panels.items() if rows}


def all_errors(evidence: Evidence) -> Iterator[Errors]:
    for setting in evidence.settings:
        for number, (table, names) in ERRORS.items():
            rows = [row for row in ROWS if row.table == table and row.name in names]
            lines = list(error_lines(evidence, setting, rows))
            if lines:
                data = DATA[rows[0].data]
                yield Errors(
                    f"figure-{number}-{setting.key}",
                    f"{data}, measured at {setting.title}",
                    f"Figure {number} as measured at {setting.title}: test error of layer-wise "
                    f"training over epochs on {data}. With several seeds: the mean, and a band of "
                    "one standard deviation of a single run.",
                    lines,
                )


def error_lines(
    evidence: Evidence, setting: Setting, rows: Sequence[Row]
) -> Iterator[tuple[int, str, Curve]]:
    for index, row in enumerate(rows):
        number = evidence.number(setting, row, "layerwise")
        accuracy = mean_curve(number.records) if number else None
        if accuracy:
            error = replace(accuracy, mean=tuple(100 - mean for mean in accuracy.mean))
            yield index, f"{row.name} {format_hierarchy(row.hierarchy)}", error


def all_depths(evidence: Evidence) -> Iterator[Depths]:
    """Rows, at every scale by the first setting of it that has them."""
    for key in DEPTHS:
        drawn: set[str] = set()
        for setting in evidence.settings:
            if setting.scale in drawn:
                continue
            if panels := depth_panels(evidence, setting, BY_NAME[key]):
                drawn.add(setting.scale)
                yield depths_of(BY_NAME[key], setting, panels)


def depths_of(row: Row, setting: Setting, panels: Mapping[str, Sequence[Depth]]) -> Depths:
    kind = next(iter(panels.values()))[0].kind
    title = (
        f"{row.name} {format_hierarchy(row.hierarchy)} on {row.data}, measured at {setting.title}"
    )
    return Depths(
        f"depth-{row.table}-{row.name}-{setting.key}",
        title,
        f"{title}: {kind}. As a map over depth and epochs, over depth at some epochs, and over "
        "epochs at some depths; with several seeds the mean, and a band of one standard "
        "deviation.",
        kind,
        panels,
    )


def depth_panels(evidence: Evidence, setting: Setting, row: Row) -> dict[str, list[Depth]]:
    """Accuracy over depth by column.

    It is that of linear probes where any column has them, else that of the units' classifiers.
    """
    numbers = {column: evidence.number(setting, row, column) for column in COLUMNS}
    for measure in (probe_depth, unit_depth):
        panels = {
            column: alike([depth for record in number.records if (depth := measure(record))])
            for column, number in numbers.items()
            if number
        }
        panels = {column: depths for column, depths in panels.items() if depths}
        if panels:
            return panels
    return {}


def alike(depths: Sequence[Depth]) -> list[Depth]:
    """Those that have the first one's units and epochs: only they have a mean."""
    keys = [(depth.names, depth.epochs, depth.kind) for depth in depths]
    return [depth for depth, key in zip(depths, keys, strict=True) if key == keys[0]]


def mean_depth(depths: Sequence[Depth]) -> tuple[Depth, Depth | None]:
    """Mean and standard deviation over seeds, where every seed has a value.

    With one seed there is no deviation.
    """
    means, deviations = [], []
    for units in zip(*(depth.values for depth in depths), strict=True):
        by_epoch = list(zip(*units, strict=True))
        means.append(
            tuple(None if None in values else sum(values) / len(values) for values in by_epoch)
        )
        if len(depths) > 1:
            pairs = zip(by_epoch, means[-1], strict=True)
            deviations.append(
                tuple(None if mean is None else spread(values, mean) for values, mean in pairs)
            )
    mean = replace(depths[0], values=tuple(means))
    return mean, replace(mean, values=tuple(deviations)) if deviations else None
