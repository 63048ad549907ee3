"""Statistics of the paper's numbers: paired differences over seeds and their errors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from layerwise.paper.comparisons import Comparison, Measure
from layerwise.paper.numbers import Setting, gives, own_columns, place_of
from layerwise.paper.rows import Row
from layerwise.runs.lines import is_number
from layerwise.runs.records import Record
from layerwise.utils.words import counted

Numbers = NDArray[np.float64]  # one, or of a curve one per epoch
RESOLUTION = 0.01  # points: an accuracy of 10,000 images is a multiple of this
AT_EPOCHS = (
    "curve",
    "quarter",
)  # kinds of numbers that are compared at epochs that both sides have
HOLDS, FAILS, UNDECIDED, UNMEASURED = "holds", "does not hold", "undecided", "not measured"
# how often chance alone may decide a comparison, or say of a claim that it does not hold
UNLIKELY = 0.05


@dataclass(frozen=True)
class Scatter:
    """Variance of a row's measure for one seed, without the effect of the seed on all rows.

    Attributes:
        degrees: of freedom.
        rows: how many rows it was estimated from.
    """

    variance: Numbers
    degrees: int
    rows: int


class Scores:
    """The finished runs of a setting; where a seed was trained twice, the first of its runs counts.

    Attributes:
        columns: those whose numbers say something of the setting, which global ones do not of a
            local loss.
    """

    def __init__(self, records: Sequence[Record], setting: Setting) -> None:
        self.columns = own_columns(setting)
        self.runs: dict[tuple[Row, str], dict[int, Record]] = {}
        self.rows: dict[str, list[Row]] = {}  # by data set; of the rows that share runs the first
        for record in records:
            place = place_of(record)
            if place and gives(record, place.rows[0], place.column, setting):
                for row in place.rows:
                    runs = self.runs.setdefault((row, place.column), {})
                    runs.setdefault(record.run.seed, record)
                rows = self.rows.setdefault(place.rows[0].data, [])
                if place.rows[0] not in rows:
                    rows.append(place.rows[0])
        self.scatter = cache(self._scatter)

    def records(self, row: Row, measure: Measure) -> list[Record]:
        """The runs that a row's measure is of."""
        return [
            record for term in measure for record in self.runs.get((row, term.column), {}).values()
        ]

    def values(
        self, row: Row, measure: Measure, epochs: tuple[int, ...] = ()
    ) -> dict[int, Numbers]:
        """A row's measure, by seed; only of seeds that have all its terms.

        Args:
            epochs: of what is compared at epochs.
        """
        terms: list[dict[int, Numbers]] = []
        for term in measure:
            numbers = {
                seed: value(record, term.kind, epochs)
                for seed, record in self.runs.get((row, term.column), {}).items()
            }
            terms.append(
                {seed: term.sign * number for seed, number in numbers.items() if number is not None}
            )
        seeds = sorted(set.intersection(*map(set, terms)))
        return {seed: np.sum([numbers[seed] for numbers in terms], axis=0) for seed in seeds}

    def _scatter(
        self, data: str, measure: Measure, epochs: tuple[int, ...] = (), paired: bool = True
    ) -> Scatter | None:
        """The scatter of a measure that rows do not explain; None where unknown.

        Args:
            paired: leave out what seeds explain too, which a difference of two rows cancels.
        """
        groups = [self.values(row, measure, epochs) for row in self.rows.get(data, ())]
        several = [group for group in groups if len(group) > 1]
        seeds = sorted({seed for group in several for seed in group})
        lines = [
            (place, seeds.index(seed), number)
            for place, group in enumerate(several)
            for seed, number in group.items()
        ]
        design = np.zeros((len(lines), len(several) + len(seeds)))
        for line, (place, seed, _) in enumerate(lines):
            design[line, [place, len(several) + seed] if paired else place] = 1
        degrees = len(lines) - int(np.linalg.matrix_rank(design)) if lines else 0
        if degrees == 0:
            return None
        observed = np.stack([number for *_, number in lines])
        residuals = observed - design @ np.linalg.lstsq(design, observed, rcond=None)[0]
        variance = np.square(residuals).sum(0) / degrees
        # of rounding, at least
        return Scatter(np.maximum(variance, RESOLUTION**2 / 12), degrees, len(several))


def value(record: Record, kind: str, epochs: tuple[int, ...] = ()) -> Numbers | None:
    """A run's number in percent; None where it was not evaluated."""
    if kind in AT_EPOCHS:
        scores = curve(record)
        return (
            np.array([scores[epoch] for epoch in epochs])
            if epochs and scores.keys() >= set(epochs)
            else None
        )
    number = NUMBERS[kind](record)
    return None if number is None else np.array([number])


def curve(record: Record) -> dict[int, float]:
    """Test accuracy in percent by epoch, where it was evaluated, in the order of the epochs."""
    scores = {entry["epoch"]: entry.get("test_accuracy") for entry in record.epochs}
    return {epoch: accuracy for epoch, accuracy in sorted(scores.items()) if accuracy is not None}


def probe(record: Record, place: int) -> float | None:
    """A linear probe's accuracy behind a convolution after the last epoch, in percent.

    Args:
        place: 0, the first convolution; -1, the last. The output layer's logits are no feature.
    """
    try:
        last = record.separability()[-1]
        features = [unit for unit in last["units"] if unit["index"] >= 0 and unit["resolution"]]
        number = features[place]["linear_probe"]
        return number if is_number(number) and last["epoch"] == record.run.epochs else None
    except (KeyError, IndexError, TypeError):  # not measured, by another measure, or altered
        return None


NUMBERS = {
    "last": lambda record: record.test_accuracy,
    "first probe": lambda record: probe(record, 0),
    "last probe": lambda record: probe(record, -1),
}


@dataclass(frozen=True)
class Outcome:
    """The measured result of a comparison.

    Attributes:
        verdict: one of the four words.
        difference: in points; error: its standard error. None where
            unknown.
        chance: how often so large a difference either way would come of chance alone; None where no
            error is known.
        seeds: that both sides have; where they have none in common, of the side that has fewest; 0
            where nothing is measured.
        remark: what else there is to say, such as the epoch of the smallest lead.
    """

    comparison: Comparison
    verdict: str = UNMEASURED
    difference: float | None = None
    error: float | None = None
    chance: float | None = None
    seeds: int = 0
    remark: str = ""

    @property
    def line(self) -> str:
        """All of it in words."""
        comparison = self.comparison
        paper = f"; paper {comparison.printed:+.2f}" if comparison.printed is not None else ""
        said = f", in words {comparison.amount.text}" if comparison.amount else ""
        if self.difference is None:
            return f"{comparison.text}: {joined(self.verdict, self.remark)}{paper}{said}"
        error = (
            f"standard error {self.error:.2f}" if self.error is not None else "no deviation known"
        )
        seeds = counted(self.seeds, "seed")
        remark = f"; {self.remark}" if self.remark else ""
        numbers = f"{self.difference:+.2f} points, {error}, {seeds}{remark}{paper}{said}"
        return f"{comparison.text}: {numbers}: {self.verdict}"


def compare(comparison: Comparison, scores: Scores) -> Outcome:
    """Hold a comparison against the finished runs of a setting."""
    measure, rows = comparison.measured
    if not any(term.column in scores.columns for term in measure):
        return Outcome(comparison)
    runs = [record for row in rows for record in scores.records(row, measure)]
    epochs = compared_epochs(comparison.above.kind, runs)
    sides = [scores.values(row, measure, epochs) for row in rows]
    if not all(sides) or unlike(runs):
        return Outcome(comparison, remark=unlike(runs) if all(sides) else "")
    seeds = sorted(set.intersection(*map(set, sides)))
    means = [np.mean([side[seed] for seed in seeds or side], axis=0) for side in sides]
    lead = means[0] - means[1] if len(means) == 2 else means[0]
    scatter = scores.scatter(rows[0].data, measure, epochs, len(sides) == 2)
    if not seeds or scatter is None:
        remark = "" if seeds else "no seed in common"
        return Outcome(
            comparison,
            UNDECIDED,
            float(lead.min()),
            seeds=len(seeds) or min(map(len, sides)),
            remark=remark,
        )
    errors = np.sqrt(len(sides) * scatter.variance / len(seeds))
    least = int(np.argmin(lead / errors))
    difference, error = float(lead[least]), float(errors[least])
    chance = two_sided(difference / error, scatter.degrees)
    if difference < 0:  # after one of many epochs, each of which may seem behind by chance
        chance = min(1.0, len(lead) * chance)
    verdict = UNDECIDED if chance >= UNLIKELY else HOLDS if difference > 0 else FAILS
    where = f"at epoch {epochs[least]}" if epochs else ""
    if len(epochs) > 1:
        where += f", where it leads least; ahead at {(lead > 0).sum()} of {len(lead)} epochs"
    borrowed = f"deviation of {scatter.rows} other rows" if len(seeds) == 1 else ""
    return Outcome(
        comparison, verdict, difference, error, chance, len(seeds), joined(where, borrowed)
    )


def joined(*remarks: str) -> str:
    return "; ".join(filter(None, remarks))


def unlike(runs: Iterable[Record]) -> str:
    """Words for networks of different widths in a comparison; mostly empty.

    A difference would then be one of widths.
    """
    widths = sorted({record.run.width for record in runs})
    return (
        f"the widths are {' and '.join(f'{width:g}' for width in widths)}"
        if len(widths) > 1
        else ""
    )


def compared_epochs(kind: str, runs: Sequence[Record]) -> tuple[int, ...]:
    """The epochs whose accuracies are compared: all after which all runs were evaluated.

    Of ``quarter``, the last of them in the first quarter of the training. A run whose log is lost
    has no say, and no part in the comparison.
    """
    curves = [set(scores) for record in runs if (scores := curve(record))]
    if kind not in AT_EPOCHS or not curves:
        return ()
    common = sorted(set.intersection(*curves))
    if kind == "quarter":
        common = [epoch for epoch in common if 4 * epoch <= runs[0].run.epochs][-1:]
    return tuple(common)


def two_sided(t: float, degrees: float) -> float:
    """The probability that Student's t is as far from 0, or farther, by chance."""
    from scipy.special import stdtr

    return float(2 * stdtr(degrees, -abs(t)))
