"""What each unit adds to separability, and where it is held to labels that it does not get nearer to."""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

NEAR_ZERO = 0.01  # share of its first epoch's loss below which a loss no longer pushes


def add_gains(rows: Sequence[dict[str, Any]], measure: str, scored: int | None, pushing: Mapping[int, bool]) -> None:
    """Add each unit's gain, and whether it is mismatched: its gain is negative or nil while its loss still pushes.

    A gain is nil when it is smaller than the standard error √(p(100 − p)/n) of an accuracy of p percent of n scored images; for
    other measures, of which ``scored`` is None, when it is 0. It is None where a value is missing, and the mark also where the
    unit has no loss of its own.
    """
    rows[0] |= {"gain": None, "mismatched": None}
    for row, before in zip(rows[1:], rows, strict=False):
        value, earlier = row[measure], before[measure]
        gain = None if value is None or earlier is None else value - earlier
        error = sqrt(value * (100 - value) / scored) if value is not None and scored is not None else 0.0
        pushed = pushing.get(row["index"])
        row |= {"gain": gain, "mismatched": None if gain is None or pushed is None else pushed and gain <= error}


def losses_push(log: Iterable[Mapping[str, Any]]) -> dict[int, bool]:
    """Whether each unit's loss still pushes: its mean over the last epoch is more than ``NEAR_ZERO`` of that over the first."""
    first: dict[int, float] = {}
    latest: dict[int, float] = {}
    for record in log:
        for unit in record["units"]:
            first.setdefault(unit["index"], unit["loss"])
            latest[unit["index"]] = unit["loss"]
    return {index: loss > NEAR_ZERO * first[index] for index, loss in latest.items()}
