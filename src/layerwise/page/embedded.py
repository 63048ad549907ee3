"""What the page's script reads: every run with its curves and units, and the rows' curves over epochs, as JSON."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from layerwise.curves import ACCURACY, Curve, Depth, mean_curve, measured_depths, number, sample, separable, unit_depth, units
from layerwise.evidence import Evidence
from layerwise.headings import HEADINGS
from layerwise.hierarchy import format_hierarchy
from layerwise.measured import Setting
from layerwise.page.markup import Markup
from layerwise.paper import COLUMNS, ROMAN, ROWS, TABLES, Row
from layerwise.records import Record
from layerwise.runs import Run
from layerwise.tables import command, hierarchy, machine

# numbers in the page, whatever the number of runs: with 1,000 of them it stays under 5 MB
OF_CURVES, OF_UNITS = 80_000, 100_000
FEWEST, MOST = 2, 24  # epochs at which a run's units are shown
RESULTS = (
    "parameters",
    "seconds",
    "train_seconds",
    "images_per_second",
    "peak_memory_bytes",
    "best_epoch",
    "best_test_accuracy",
)


def embedded(evidence: Evidence) -> Markup:
    """JSON that no text in it can end early."""
    records = evidence.records
    names: dict[tuple[str, ...], int] = {}
    data = {
        "defaults": asdict(Run()),
        "runs": [one_run(record, len(records), names) for record in records],
        "charts": list(charts(evidence)),
        "names": list(names),
    }
    return Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def one_run(record: Record, runs: int, names: dict[tuple[str, ...], int]) -> dict[str, Any]:
    """A run; its configuration as far as it differs from the defaults."""
    most = max(10, min(60, OF_CURVES // (2 * runs)))
    chosen = [record.epochs[index] for index in sample(len(record.epochs), most)]
    # a run with several measures shows fewer epochs of each
    shown_at = units_shown(record, runs * (1 + len(measured_depths(record, FEWEST))))
    depths = [own for own in [unit_depth(record, shown_at)] if own] + measured_depths(record, shown_at)
    return {
        "path": record.path,
        "config": {name: shown(value) for name, value in asdict(record.run).items() if value != getattr(Run, name)},
        "hierarchy": hierarchy(record),
        "machine": machine(record.facts),
        "commit": str(record.facts.get("commit") or "not noted"),
        "command": command(record.run),
        "result": {name: number((record.result or {}).get(name)) for name in RESULTS},
        "epochs": [entry["epoch"] for entry in chosen],
        "test": [short(entry.get("test_accuracy")) for entry in chosen],
        "val": [short(entry.get("val_accuracy")) for entry in chosen],
        "last": last_units(record, names),
        "separable": last_separable(record, names),
        "units": [compact(found, names) for found in depths],
    }


def units_shown(record: Record, runs: int) -> int:
    """At how many epochs a run's units are shown, so that all runs together stay within ``OF_UNITS``."""
    noted = record.facts.get("units")
    count = len(noted) if isinstance(noted, list) and noted else 20
    return max(FEWEST, min(MOST, OF_UNITS // (runs * count)))


def last_units(record: Record, names: dict[tuple[str, ...], int]) -> dict[str, Any]:
    """Loss and accuracy of every unit on the training images, in the last epoch."""
    found = [unit for unit in units(record, len(record.epochs) - 1) if isinstance(unit, dict)] if record.epochs else []
    return {
        "names": names.setdefault(tuple(str(unit.get("name")) for unit in found), len(names)),
        "loss": [short(unit.get("loss"), 4) for unit in found],
        "accuracy": [short(unit.get("accuracy"), 1) for unit in found],
    }


def last_separable(record: Record, names: dict[tuple[str, ...], int]) -> dict[str, Any] | None:
    """The last that was measured of the features: of the image and of every unit's output."""
    rows = separable(record)
    rows = [row for row in rows if row.epoch == rows[-1].epoch]
    if not rows:
        return None
    return {
        "epoch": rows[0].epoch,
        "names": names.setdefault(tuple(row.name for row in rows), len(names)),
        "resolution": ["×".join(map(str, row.resolution or ())) for row in rows],
        "measures": {
            text: [short(row.values.get(name)) for row in rows]
            for name, text in HEADINGS.items()
            if any(name in row.values for row in rows)
        },
        "gain": [short(row.gain) for row in rows],
        "gain_error": [short(row.gain_error) for row in rows],
        "mismatched": [row.mismatched for row in rows],
    }


def compact(found: Depth, names: dict[tuple[str, ...], int]) -> dict[str, Any]:
    """Units' names are kept once for all runs that share them."""
    digits = 1 if found.axis == ACCURACY else 2
    values = [[short(value, digits) for value in of_unit] for of_unit in found.values]
    kept = names.setdefault(found.names, len(names))
    return {"names": kept, "epochs": found.epochs, "values": values, "kind": found.kind, "axis": found.axis}


def short(value: Any, digits: int = 2) -> float | None:
    found = number(value)
    return None if found is None else round(found, digits)


def charts(evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Accuracy over epochs: one chart for each setting, table and network that was run."""
    for setting in evidence.settings:
        for table in TABLES:
            rows = [row for row in ROWS if row.table == table]
            for model in dict.fromkeys(row.model for row in rows):
                lines = list(series(evidence, setting, [row for row in rows if row.model == model]))
                if lines:
                    title = f"Table {ROMAN[table - 1]}: {model} on {rows[0].data}, {setting.title}"
                    yield {"title": title, "series": lines}


def series(evidence: Evidence, setting: Setting, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """A row's lines: layer-wise and global."""
    for colour, row in enumerate(rows):
        for column in COLUMNS:
            measured = evidence.number(setting, row, column)
            found = mean_curve(measured.records) if measured else None
            if found:
                words = "layer-wise" if column == "layerwise" else "global"
                yield {"name": f"{format_hierarchy(row.hierarchy)} {words}", "colour": colour, **drawn(found, column)}


def drawn(found: Curve, column: str) -> dict[str, Any]:
    return {
        "epochs": found.epochs,
        "values": list(map(short, found.mean)),
        "spread": list(map(short, found.deviation)) if found.deviation else None,
        "seeds": found.seeds,
        "dashed": column == "global",
    }


def shown(value: Any) -> Any:
    """A field's value, as JSON can hold it."""
    return str(value) if isinstance(value, float) and number(value) is None else value
