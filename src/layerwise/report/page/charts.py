"""Figures and curves over epochs as the page's script draws them."""

from collections.abc import Iterable, Iterator, Sequence
from functools import singledispatch
from typing import Any

from layerwise.hierarchy import format_hierarchy
from layerwise.paper.numbers import Setting
from layerwise.paper.rows import COLUMNS, ROMAN, ROWS, TABLES, Row
from layerwise.paper.verdicts import Evidence
from layerwise.report.curves import ACCURACY, Curve, Depth, mean_curve, number
from layerwise.report.figure_data import WORDS, Bars, Depths, Errors, mean_depth


class Names:
    """Lists of units' names, each held once for all that share it."""

    def __init__(self) -> None:
        self.places: dict[tuple[str, ...], int] = {}

    def place(self, names: Iterable[str]) -> int:
        return self.places.setdefault(tuple(names), len(self.places))

    def listed(self) -> list[tuple[str, ...]]:
        return list(self.places)


@singledispatch
def charts_of(figure: Any, names: Names) -> dict[str, Any]:
    """A figure's kind and panels."""
    raise TypeError(f"no chart of {type(figure).__name__}")


@charts_of.register
def bar_charts(figure: Bars, names: Names) -> dict[str, Any]:
    return {
        "kind": "bars",
        "panels": [
            {
                "title": title,
                "labels": [[row.name, format_hierarchy(row.hierarchy)] for row in rows],
                "bars": [
                    {
                        "name": word,
                        "values": [short(pair[side][0]) for pair in rows.values()],
                        "spread": [short(pair[side][1]) for pair in rows.values()],
                    }
                    for side, word in enumerate(WORDS.values())
                ],
            }
            for title, rows in figure.panels.items()
        ],
    }


@charts_of.register
def error_charts(figure: Errors, names: Names) -> dict[str, Any]:
    series = [{"name": label, "colour": look, **line(curve)} for look, label, curve in figure.lines]
    return {
        "kind": "lines",
        "panels": [{"title": figure.title, "y": "test error, %", "series": series}],
    }


@charts_of.register
def depth_charts(figure: Depths, names: Names) -> dict[str, Any]:
    panels = []
    for column, depths in figure.panels.items():
        mean, deviation = mean_depth(depths)
        panel = compact(mean, names) | {"kind": WORDS[column]}
        panels.append(panel | {"spread": values(deviation)} if deviation else panel)
    return {"kind": "depths", "panels": panels}


def compact(depth: Depth, names: Names) -> dict[str, Any]:
    """A measure over depth and epochs."""
    return {
        "names": names.place(depth.names),
        "epochs": depth.epochs,
        "values": values(depth),
        "kind": depth.kind,
        "axis": depth.axis,
    }


def values(depth: Depth) -> list[list[float | None]]:
    digits = 1 if depth.axis == ACCURACY else 2
    return [[short(value, digits) for value in of_unit] for of_unit in depth.values]


def epoch_charts(evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Accuracy over epochs: a chart for each setting, table and network that was run."""
    for setting in evidence.settings:
        for table in TABLES:
            rows = [row for row in ROWS if row.table == table]
            for model in dict.fromkeys(row.model for row in rows):
                lines = list(series(evidence, setting, [row for row in rows if row.model == model]))
                if lines:
                    title = f"Table {ROMAN[table - 1]}: {model} on {rows[0].data}, {setting.title}"
                    yield {"title": title, "y": "test accuracy, %", "series": lines}


def series(evidence: Evidence, setting: Setting, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """A row's lines: layer-wise and global."""
    for colour, row in enumerate(rows):
        for column in COLUMNS:
            measured = evidence.number(setting, row, column)
            curve = mean_curve(measured.records) if measured else None
            if curve:
                name = f"{format_hierarchy(row.hierarchy)} {WORDS[column]}"
                yield {"name": name, "colour": colour, **line(curve), "dashed": column == "global"}


def line(curve: Curve) -> dict[str, Any]:
    return {
        "epochs": curve.epochs,
        "values": list(map(short, curve.mean)),
        "spread": list(map(short, curve.deviation)) if curve.deviation else None,
        "seeds": curve.seeds,
    }


def short(value: Any, digits: int = 2) -> float | None:
    """A number to so many digits behind the point; None for anything else."""
    finite = number(value)
    return None if finite is None else round(finite, digits)
