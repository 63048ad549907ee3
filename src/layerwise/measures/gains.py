"""Gains: the separability that each unit adds, and units whose loss pushes without a gain."""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

from torch import Tensor

NEAR_ZERO = 0.01  # share of its first epoch's loss below which a loss no longer pushes


def add_gains(
    rows: Sequence[dict[str, Any]],
    measure: str,
    right: Sequence[Tensor | None],
    pushing: Mapping[int, bool],
) -> None:
    """Add each unit's gain, its standard error, and whether the unit is mismatched.

    A unit is mismatched if it has no gain while its loss is still active. There is no gain if the
    difference is not larger than its standard error (``gain_error``), or not above 0 for measures
    that are no accuracies, which have no such error. A gain is None where a value is missing, and
    ``mismatched`` is None there and where the unit has no loss of its own.

    Args:
        rows: rows of the depths, from the image on, changed in place.
        measure: name of the measure.
        right: for each row, which of the scored images an accuracy had right, (N,), bool; None for
            other measures.
        pushing: whether a unit's loss is still active, by index.
    """
    rows[0] |= dict.fromkeys(("gain", "gain_error", "mismatched"))
    pairs = zip(rows, rows[1:], right, right[1:], strict=False)
    for before, row, right_before, right_now in pairs:
        value, earlier = row[measure], before[measure]
        gain = None if value is None or earlier is None else value - earlier
        error = (
            None
            if right_now is None or right_before is None
            else paired_error(right_now, right_before)
        )
        pushed = pushing.get(row["index"])
        mismatched = None if gain is None or pushed is None else pushed and gain <= (error or 0.0)
        row |= {"gain": gain, "gain_error": error, "mismatched": mismatched}


def paired_error(right: Tensor, right_before: Tensor) -> float:
    """Standard error of the difference of two accuracies of the same images, in points.

    √(v/n), where v is the variance over images of the difference of hits (McNemar 1947 counts the
    same disagreements). Two units agree on most images, so it is smaller than that of accuracies of
    different images.

    Shapes: (N,), (N,), bool.
    """
    gained, lost = int((right & ~right_before).sum()), int((right_before & ~right).sum())
    count = len(right)
    mean = (gained - lost) / count
    return 100.0 * sqrt(((gained + lost) / count - mean**2) / max(1, count - 1))


def losses_push(log: Iterable[Mapping[str, Any]]) -> dict[int, bool]:
    """Whether each unit's loss is still active, by the unit's index.

    It is if its mean over the last epoch is farther from 0 than ``NEAR_ZERO`` of the first epoch's.
    """
    first: dict[int, float] = {}
    latest: dict[int, float] = {}
    for record in log:
        for unit in record["units"]:
            first.setdefault(unit["index"], unit["loss"])
            latest[unit["index"]] = unit["loss"]
    return {index: abs(loss) > NEAR_ZERO * abs(first[index]) for index, loss in latest.items()}
