"""Accuracy over epochs and over depth, from runs as they lie on disk.

What a file holds that is no number is left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from layerwise.paper.statistics import curve
from layerwise.runs.headings import headings_of
from layerwise.runs.lines import is_number
from layerwise.runs.records import Record

SHOWN = 60  # points of a curve: no screen shows more, and a page of 1,000 runs stays small
ACCURACY = "accuracy, %"
GAIN = "gain of each unit, its output's separability less its input's"
OWN, OWN_TRAINING, PROBE = (
    "accuracy of each unit's own classifier, held-out images",
    "accuracy of each unit's own classifier, training images (none were held out)",
    "accuracy of a linear probe of each unit's features",
)
CKA = "similarity of each unit's features to those of another run"


@dataclass(frozen=True)
class Curve:
    """A mean over seeds, percent; ``deviation`` is of a single seed, None with one."""

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...] | None
    seeds: int


@dataclass(frozen=True)
class Depth:
    """Accuracy, or another measure, of every unit, shallow to deep.

    Attributes:
        values: a list per unit with an entry per epoch; None where a unit did not learn then.
        kind: what the values are of, in words.
        axis: what an axis of them says: a measure and its unit.
    """

    names: tuple[str, ...]
    epochs: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    kind: str
    axis: str = ACCURACY


def sample(count: int, most: int = SHOWN) -> list[int]:
    """At most so many of the indices 0 … count - 1, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(index * (count - 1) / (most - 1)) for index in range(most)})


def mean_curve(records: Sequence[Record]) -> Curve | None:
    """Test accuracy at some of the epochs that all of some runs have; None where there are none."""
    curves = [curve(record) for record in records]
    epochs = sorted(set.intersection(*map(set, curves))) if curves else []
    if not epochs:
        return None
    epochs = [epochs[index] for index in sample(len(epochs))]
    columns = [[scores[epoch] for scores in curves] for epoch in epochs]
    means = tuple(sum(column) / len(column) for column in columns)
    deviation = tuple(map(spread, columns, means)) if len(curves) > 1 else None
    return Curve(tuple(epochs), means, deviation, len(curves))


def spread(values: Sequence[float], mean: float) -> float:
    """Standard deviation of a single value.

    ``statistics`` counts in exact fractions and takes 50 times as long.
    """
    return sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    return float(value) if is_number(value) else None


def unit_depth(record: Record, most: int = SHOWN) -> Depth | None:
    """Accuracy of every unit's own classifier at some of the epochs.

    None where fewer than two units learn.

    Only the epochs that are returned are parsed.
    """
    held_out = record.run.val_fraction > 0
    key = "val_accuracy" if held_out else "accuracy"
    epochs = [
        (record.epochs[index]["epoch"], units(record, index))
        for index in sample(len(record.epochs), most)
    ]
    return depth(
        ((epoch, entries) for epoch, entries in epochs if entries),
        key,
        OWN if held_out else OWN_TRAINING,
    )


def units(record: Record, index: int) -> list[Any]:
    try:
        return list(record.units(index))
    except (
        ValueError,
        KeyError,
        TypeError,
        OSError,
    ):  # a line that was altered, or a log that is gone
        return []


def probe_depth(record: Record, most: int = SHOWN) -> Depth | None:
    """Accuracy of a linear probe of every unit's features at some of the epochs.

    None where it was not measured.
    """
    return depth(evenly(measured_epochs(record), most), "linear_probe", PROBE)


def evenly(entries: Sequence[tuple[int, list[Any]]], most: int) -> list[tuple[int, list[Any]]]:
    return [entries[index] for index in sample(len(entries), most)]


def measured_epochs(record: Record) -> list[tuple[int, list[Any]]]:
    """The epochs after which features were measured while training, with the rows of each."""
    entries = [entry for entry in record.separability() if isinstance(entry.get("epoch"), int)]
    return [
        (entry["epoch"], entry["units"])
        for entry in entries
        if isinstance(entry.get("units"), list)
    ]


def measured_depths(record: Record, most: int = SHOWN) -> list[Depth]:
    """All measures of the features at some epochs: a ``Depth`` each, and one of the gains."""
    epochs = evenly(measured_epochs(record), most)
    kinds = {
        name: (f"{text.removesuffix(', %')} of each unit's features", text)
        for name, text in headings_of(record.separability()).items()
    }
    kinds |= {"linear_probe": (PROBE, ACCURACY), "cka": (CKA, "CKA"), "gain": (GAIN, "points")}
    return [made for name, words in kinds.items() if (made := depth(epochs, name, *words))]


@dataclass(frozen=True)
class Separable:
    """Separability of a unit's features after an epoch; None for what is unknown.

    Attributes:
        index: the unit's; −1 is the image.
        values: by measure, such as ``linear_probe`` in percent.
        gain: the first measure less that of the row before; gain_error, mismatched: see
            ``gains.add_gains``.
    """

    epoch: int
    index: int
    name: str
    resolution: tuple[int, ...] | None
    values: dict[str, float]
    gain: float | None
    gain_error: float | None
    mismatched: bool | None


def separable(record: Record) -> list[Separable]:
    """All measurements of the features while training, epoch by epoch, from the image on."""
    depths, entries = [], record.separability()
    names = headings_of(entries)
    for entry in entries:
        rows = entry.get("units")
        if not isinstance(entry.get("epoch"), int) or not isinstance(rows, list):
            continue
        depths += [
            separable_row(entry["epoch"], row, names)
            for row in rows
            if isinstance(row, dict) and isinstance(row.get("index"), int)
        ]
    return depths


def separable_row(epoch: int, row: dict[str, Any], names: Iterable[str]) -> Separable:
    """A row of the file.

    Args:
        names: of measures.
    """
    size, mismatched = row.get("resolution"), row.get("mismatched")
    values = {name: value for name in names if (value := number(row.get(name))) is not None}
    return Separable(
        epoch,
        row["index"],
        str(row.get("name", row["index"])),
        tuple(size)
        if isinstance(size, list) and all(isinstance(side, int) for side in size)
        else None,
        values,
        number(row.get("gain")),
        number(row.get("gain_error")),
        mismatched if isinstance(mismatched, bool) else None,
    )


def depth(
    entries_by_epoch: Iterable[tuple[int, list[Any]]], key: str, kind: str, axis: str = ACCURACY
) -> Depth | None:
    """Gather what is a list per epoch into a list per unit."""
    names: dict[int, str] = {}
    by_epoch: dict[int, dict[int, float | None]] = {}
    for epoch, entries in entries_by_epoch:
        for entry in entries:
            if isinstance(entry, dict) and isinstance(entry.get("index"), int) and key in entry:
                names[entry["index"]] = str(entry.get("name", entry["index"]))
                by_epoch.setdefault(epoch, {})[entry["index"]] = number(entry[key])
    any_value = any(value is not None for values in by_epoch.values() for value in values.values())
    if len(names) < 2 or not any_value:
        return None
    epochs, order = sorted(by_epoch), sorted(names)
    values = tuple(tuple(by_epoch[epoch].get(index) for epoch in epochs) for index in order)
    return Depth(tuple(names[index] for index in order), tuple(epochs), values, kind, axis)
