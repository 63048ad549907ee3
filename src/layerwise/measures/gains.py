"""What each unit adds to separability, and where it is held to labels that it does not get nearer
to.
"""

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
    """Add each unit's gain, its standard error, and whether it is mismatched: no gain while the
    unit's loss still pushes.

    A gain is negative or nil when it is not larger than its standard error (``gain_error``); of
    measures that are no accuracies, which have none, when it is not above 0. It is None where a
    value is missing, and the mark also where the unit has no loss of its own.

    Args:
        right: of each row, which of the scored images an accuracy had right (N,), bool; None of
            other measures.
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


def paired_error(one: Tensor, other: Tensor) -> float:
    """Standard error of the difference of two accuracies of the same images, in points.

    √(v/n), where v is the variance over images of one's hit less the other's (McNemar 1947 counts
    the same disagreements). Two units agree on most images, so it is smaller than that of
    accuracies of different images.

    Shapes: (N,), (N,), bool.
    """
    gained, lost, count = int((one & ~other).sum()), int((other & ~one).sum()), len(one)
    mean = (gained - lost) / count
    return 100.0 * sqrt(((gained + lost) / count - mean**2) / max(1, count - 1))


def losses_push(log: Iterable[Mapping[str, Any]]) -> dict[int, bool]:
    """Whether each unit's loss still pushes: its mean over the last epoch is more than
    ``NEAR_ZERO`` of that over the first.
    """
    first: dict[int, float] = {}
    latest: dict[int, float] = {}
    for record in log:
        for unit in record["units"]:
            first.setdefault(unit["index"], unit["loss"])
            latest[unit["index"]] = unit["loss"]
    return {index: loss > NEAR_ZERO * first[index] for index, loss in latest.items()}
