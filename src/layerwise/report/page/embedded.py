"""Data of the page's script: runs with their curves and units, figures, charts."""

from collections.abc import Sequence
from typing import Any, TypeGuard

from layerwise.paper.verdicts import Evidence
from layerwise.report.curves import (
    measured_depths,
    number,
    sample,
    separable,
    unit_depth,
    units,
)
from layerwise.report.figure_data import Figure
from layerwise.report.page.charts import Names, charts_of, compact, epoch_charts, short
from layerwise.report.tables import command_of, hierarchy, machine
from layerwise.runs.command import flat
from layerwise.runs.headings import headings_of
from layerwise.runs.records import Record
from layerwise.runs.run import Run

# numbers in the page, whatever the number of runs: with 1,000 of them it stays under 5 MB
OF_CURVES, OF_UNITS = 80_000, 100_000
FEWEST, MOST = 2, 24  # epochs at which a run's units are shown
DEFAULTS = flat(Run())
ENSEMBLE = "ensemble of all heads"
RESULTS = (
    "parameters",
    "seconds",
    "train_seconds",
    "images_per_second",
    "peak_memory_bytes",
    "best_epoch",
    "best_test_accuracy",
)


def embedded(evidence: Evidence, figures: Sequence[Figure]) -> dict[str, Any]:
    """Everything that JSON can hold of the runs, and that the script draws."""
    records = evidence.records
    names = Names()
    return {
        "defaults": DEFAULTS,
        "runs": [one_run(record, len(records), names) for record in records],
        "charts": list(epoch_charts(evidence)),
        "figures": {figure.name: charts_of(figure, names) for figure in figures},
        "names": names.listed(),
    }


def one_run(record: Record, runs: int, names: Names) -> dict[str, Any]:
    """A run; its configuration as far as it differs from the defaults."""
    most = max(10, min(60, OF_CURVES // (2 * runs)))
    chosen = [record.epochs[index] for index in sample(len(record.epochs), most)]
    # a run with several measures shows fewer epochs of each
    shown_at = units_shown(record, runs * (1 + len(measured_depths(record, FEWEST))))
    depths = [own for own in [unit_depth(record, shown_at)] if own] + measured_depths(
        record, shown_at
    )
    return {
        "path": record.path,
        "config": {
            name: shown(value)
            for name, value in flat(record.run).items()
            if name not in DEFAULTS or value != DEFAULTS[name]
        },
        "hierarchy": hierarchy(record),
        "machine": machine(record.facts),
        "commit": str(record.facts.get("commit") or "not noted"),
        "command": command_of(record),
        "result": {name: number((record.result or {}).get(name)) for name in RESULTS},
        "epochs": [entry["epoch"] for entry in chosen],
        "test": [short(entry.get("test_accuracy")) for entry in chosen],
        "val": [short(entry.get("val_accuracy")) for entry in chosen],
        "last": last_units(record, names),
        "separable": last_separable(record, names),
        "units": [compact(depth, names) for depth in depths],
        "exits": early_exits(record, names),
    }


def units_shown(record: Record, runs: int) -> int:
    """Number of epochs at which a run's units are shown.

    All runs together stay within ``OF_UNITS``.
    """
    noted = record.facts.get("units")
    count = len(noted) if isinstance(noted, list) and noted else 20
    return max(FEWEST, min(MOST, OF_UNITS // (runs * count)))


def last_units(record: Record, names: Names) -> dict[str, Any]:
    """Loss and accuracy of every unit on the training images, in the last epoch."""
    shown_units = (
        [unit for unit in units(record, len(record.epochs) - 1) if isinstance(unit, dict)]
        if record.epochs
        else []
    )
    return {
        "names": names.place(str(unit.get("name")) for unit in shown_units),
        "loss": [short(unit.get("loss"), 4) for unit in shown_units],
        "accuracy": [short(unit.get("accuracy"), 1) for unit in shown_units],
    }


def last_separable(record: Record, names: Names) -> dict[str, Any] | None:
    """The last that was measured of the features: of the image and of every unit's output."""
    rows = separable(record)
    rows = [row for row in rows if row.epoch == rows[-1].epoch]
    if not rows:
        return None
    return {
        "epoch": rows[0].epoch,
        "names": names.place(row.name for row in rows),
        "resolution": ["×".join(map(str, row.resolution or ())) for row in rows],
        "measures": {
            text: [short(row.values.get(name)) for row in rows]
            for name, text in headings_of(record.separability()).items()
            if any(name in row.values for row in rows)
        },
        "gain": [short(row.gain) for row in rows],
        "gain_error": [short(row.gain_error) for row in rows],
        "mismatched": [row.mismatched for row in rows],
    }


def early_exits(record: Record, names: Names) -> dict[str, Any] | None:
    """Test accuracy and cost of every early exit, and last of the ensemble of local heads.

    None where they were not measured.
    """
    result = record.result or {}
    exits, ensemble = result.get("exits"), result.get("ensemble")
    if not isinstance(exits, list) or not is_exit(ensemble):
        return None
    rows = [row for row in exits if is_exit(row)] + [{**ensemble, "name": ENSEMBLE}]
    return {
        "names": names.place(str(row.get("name")) for row in rows),
        "accuracy": [short(row["test_accuracy"]) for row in rows],
        "multiply_adds": [number(row["multiply_adds"]) for row in rows],
    }


def is_exit(row: Any) -> TypeGuard[dict[str, Any]]:
    """Whether an entry of a result has an accuracy and a cost."""
    names = "test_accuracy", "multiply_adds"
    return isinstance(row, dict) and all(number(row.get(name)) is not None for name in names)


def shown(value: Any) -> Any:
    """A field's value, as JSON can hold it."""
    return str(value) if isinstance(value, float) and number(value) is None else value
