"""Runs of a setting by row and seed, and how far their numbers scatter once row and seed are accounted for. No torch.

Runs with the same seed learn from the same images in the same order, so what a seed does is common to all rows: it is taken out
of their differences. What is left is estimated over all rows of a data set (a randomised block design, whose blocks are seeds).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from layerwise.measured import Setting, gives, own_columns
from layerwise.paper import Row
from layerwise.records import Record

Numbers = NDArray[np.float64]  # one, or of a curve one per epoch
RESOLUTION = 0.01  # points: an accuracy of 10,000 images is a multiple of this


@dataclass(frozen=True)
class Term:
    """A part of a measure: a run's number, with its sign. ``kind``: a key of ``NUMBERS``, or ``curve``."""

    sign: int
    column: str
    kind: str = "last"


Measure = tuple[Term, ...]  # a sum of numbers of one row


@dataclass(frozen=True)
class Scatter:
    """Variance of a row's measure for one seed, without what the seed does to all rows; its degrees of freedom.

    Attributes:
        rows: how many rows it was estimated from.
    """

    variance: Numbers
    degrees: int
    rows: int


class Scores:
    """The finished runs of a setting; where a seed was trained twice, the first of its runs counts.

    Attributes:
        columns: those whose numbers say something of the setting, which global ones do not of a local loss.
    """

    def __init__(self, records: Sequence[Record], setting: Setting) -> None:
        self.columns = own_columns(setting)
        self.runs: dict[tuple[Row, str], dict[int, Record]] = {}
        self.rows: dict[str, list[Row]] = {}  # by data set; of the rows that share runs the first
        for record in records:
            if record.match and gives(record, record.match.rows[0], record.match.column, setting):
                for row in record.match.rows:
                    self.runs.setdefault((row, record.match.column), {}).setdefault(record.run.seed, record)
                rows = self.rows.setdefault(record.match.rows[0].data, [])
                if record.match.rows[0] not in rows:
                    rows.append(record.match.rows[0])
        self.scatter = cache(self._scatter)

    def records(self, row: Row, measure: Measure) -> list[Record]:
        """The runs that a row's measure is of."""
        return [record for term in measure for record in self.runs.get((row, term.column), {}).values()]

    def values(self, row: Row, measure: Measure, epochs: tuple[int, ...] = ()) -> dict[int, Numbers]:
        """A row's measure, by seed; only of seeds that have all its terms.

        Args:
            epochs: of curves.
        """
        found: list[dict[int, Numbers]] = []
        for term in measure:
            numbers = {seed: value(record, term.kind, epochs) for seed, record in self.runs.get((row, term.column), {}).items()}
            found.append({seed: term.sign * number for seed, number in numbers.items() if number is not None})
        seeds = sorted(set.intersection(*map(set, found)))
        return {seed: np.sum([numbers[seed] for numbers in found], axis=0) for seed in seeds}

    def _scatter(self, data: str, measure: Measure, epochs: tuple[int, ...] = ()) -> Scatter | None:
        """What is left of a measure when rows and seeds have had their effects; None where that cannot be told."""
        groups = [self.values(row, measure, epochs) for row in self.rows.get(data, ())]
        several = [group for group in groups if len(group) > 1]
        seeds = sorted({seed for group in several for seed in group})
        lines = [(place, seeds.index(seed), number) for place, group in enumerate(several) for seed, number in group.items()]
        design = np.zeros((len(lines), len(several) + len(seeds)))
        for line, (place, seed, _) in enumerate(lines):
            design[line, [place, len(several) + seed]] = 1
        degrees = len(lines) - int(np.linalg.matrix_rank(design)) if lines else 0
        if degrees == 0:
            return None
        observed = np.stack([number for *_, number in lines])
        residuals = observed - design @ np.linalg.lstsq(design, observed, rcond=None)[0]
        variance = np.square(residuals).sum(0) / degrees
        return Scatter(np.maximum(variance, RESOLUTION**2 / 12), degrees, len(several))  # of rounding, at least


def value(record: Record, kind: str, epochs: tuple[int, ...] = ()) -> Numbers | None:
    """A run's number in percent; None where it was not evaluated."""
    if kind == "curve":
        scores = curve(record)
        return np.array([scores[epoch] for epoch in epochs]) if epochs and scores.keys() >= set(epochs) else None
    number = NUMBERS[kind](record)
    return None if number is None else np.array([number])


def curve(record: Record) -> dict[int, float]:
    """Test accuracy in percent by epoch, where it was evaluated, in the order of the epochs."""
    scores = {entry["epoch"]: entry.get("test_accuracy") for entry in record.epochs}
    return {epoch: accuracy for epoch, accuracy in sorted(scores.items()) if accuracy is not None}


def quarter(record: Record) -> float | None:
    """Test accuracy in percent after a quarter of the epochs, or where it was evaluated last before."""
    scores = [accuracy for epoch, accuracy in curve(record).items() if 4 * epoch <= record.run.epochs]
    return scores[-1] if scores else None


def unit_accuracy(record: Record, index: int) -> float | None:
    """A unit's accuracy of the last epoch in percent: of the held-out images, of the training images where none are."""
    try:
        unit = (record.result or {})["units"][index]
        return float(unit.get("val_accuracy", unit["accuracy"]))
    except (KeyError, IndexError, TypeError, AttributeError):  # a result that was altered
        return None


NUMBERS = {
    "last": lambda record: record.test_accuracy,
    "quarter": quarter,
    "first unit": lambda record: unit_accuracy(record, 0),
    "last unit": lambda record: unit_accuracy(record, -1),
}
