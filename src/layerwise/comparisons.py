"""One number above another: what the paper prints of it, what was measured, and whether the seeds decide it. No torch.

The rule: the difference of the means over seeds has the standard error of Welch, from the deviation of either side's seeds. A
comparison *holds* if the difference exceeds that error times Student's t for 95 % (Satterthwaite's degrees of freedom; about 2
for many seeds, 2.8 for three on either side that scatter alike), *does not hold* if it is below minus that, and is *undecided*
between. Where a side has a single seed, both get the deviation pooled over all rows of the same setting and column that have
several, with its degrees of freedom; where no row has, the comparison is undecided whatever the difference. Nothing corrects
for the number of comparisons: of those without any difference, one in twenty is decided by chance.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from statistics import fmean, variance

from layerwise.measured import Setting, gives, measured
from layerwise.paper import ROMAN, Row
from layerwise.records import Record

HOLDS, FAILS, UNDECIDED, UNMEASURED = "holds", "does not hold", "undecided", "not measured"
LIKELY = 0.975  # quantile of Student's t: 95 % between minus and plus
TERMS = {"global": ((1, "global"),), "gap": ((1, "global"), (-1, "layerwise"))}  # of every other kind: the layer-wise column
WORDS = {
    "layerwise": "layer-wise accuracy",
    "global": "global accuracy",
    "gap": "gap between global and layer-wise accuracy",
    "quarter": "layer-wise accuracy after a quarter of the epochs",
    "curve": "layer-wise accuracy at every epoch",
    "first unit": "accuracy of the first unit",
    "last unit": "accuracy of the last unit",
}


@dataclass(frozen=True)
class Number:
    """What a comparison is about: a row, and which of its numbers (a key of ``WORDS``), in percent or points."""

    row: Row
    kind: str

    @property
    def printed(self) -> float | None:
        """What the paper prints; None for what it only draws."""
        if self.kind not in ("layerwise", "global", "gap"):
            return None
        return sum(sign * self.row.accuracy(column) for sign, column in self.terms)

    @property
    def terms(self) -> tuple[tuple[int, str], ...]:
        """The columns that it is the signed sum of."""
        return TERMS.get(self.kind, ((1, "layerwise"),))

    @property
    def text(self) -> str:
        return f"{WORDS[self.kind]} of {self.where}"

    @property
    def where(self) -> str:
        return f"{self.row.name} (Table {ROMAN[self.row.table - 1]})"


@dataclass(frozen=True)
class Amount:
    """How large a sentence calls a difference, and from where to where, in points, that is taken to reach."""

    text: str
    low: float
    high: float = inf


@dataclass(frozen=True)
class Comparison:
    """A claim's smallest part: one number is above another, perhaps by some amount; the verdict is about the sign alone."""

    above: Number
    below: Number
    amount: Amount | None = None

    @property
    def printed(self) -> float | None:
        """The difference in the paper's tables, in points; None for what it only draws."""
        if self.above.printed is None or self.below.printed is None:
            return None
        return round(self.above.printed - self.below.printed, 2)

    @property
    def paper_agrees(self) -> bool | None:
        """Whether the paper's tables bear it out, the amount included."""
        if self.printed is None:
            return None
        return self.printed > 0 and (self.amount is None or self.amount.low <= self.printed <= self.amount.high)

    @property
    def text(self) -> str:
        below = self.below.text if self.below.kind != self.above.kind else f"that of {self.below.where}"
        return f"{self.above.text} above {below} on {self.above.row.data}"


@dataclass(frozen=True)
class Outcome:
    """What was measured of a comparison.

    Attributes:
        verdict: one of the four words.
        difference: in points; error: its standard error; margin: what it must exceed. None where unknown.
        seeds: of the side that has fewest; 0 where nothing is measured.
        remark: what else there is to say, such as the epoch of the smallest lead.
    """

    comparison: Comparison
    verdict: str = UNMEASURED
    difference: float | None = None
    error: float | None = None
    margin: float | None = None
    seeds: int = 0
    remark: str = ""

    @property
    def line(self) -> str:
        """All of it in words."""
        comparison = self.comparison
        paper = f"; paper {comparison.printed:+.2f}" if comparison.printed is not None else ""
        said = f", in words {comparison.amount.text}" if comparison.amount else ""
        if self.difference is None:
            return f"{comparison.text}: {self.verdict}{paper}{said}"
        error = f"standard error {self.error:.2f}" if self.error is not None else "no deviation known"
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        remark = f"; {self.remark}" if self.remark else ""
        return f"{comparison.text}: {self.difference:+.2f} points, {error}, {seeds}{remark}{paper}{said}: {self.verdict}"


@dataclass(frozen=True)
class Pool:
    """Variance between seeds over several rows, and its degrees of freedom."""

    variance: float
    degrees: int


@dataclass(frozen=True)
class Sample:
    """Accuracies over seeds in percent, with the sign that their mean has in a difference; ``pool`` goes before their own
    deviation."""

    sign: int
    values: tuple[float, ...]
    pool: Pool | None


def compare(comparison: Comparison, records: Sequence[Record], setting: Setting) -> Outcome:
    """Hold a comparison against the finished runs of a setting."""
    groups = [
        (side * sign, number.kind, column, found.records if found else ())
        for side, number in ((1, comparison.above), (-1, comparison.below))
        for sign, column in number.terms
        for found in [measured(records, number.row, column, setting)]
    ]
    epoch, remark = None, ""
    if comparison.above.kind == "curve":
        epoch, remark = smallest_lead([(sign, runs) for sign, _, _, runs in groups])
    values = [known(value(record, kind, epoch) for record in runs) for _, kind, _, runs in groups]
    if not all(values):
        return Outcome(comparison)
    single = {column for (_, _, column, _), numbers in zip(groups, values, strict=True) if len(numbers) == 1}
    samples = [
        Sample(sign, numbers, pooled(records, setting, column, kind, epoch) if column in single else None)
        for (sign, kind, column, _), numbers in zip(groups, values, strict=True)
    ]
    return replace(decide(comparison, samples), remark="; ".join(filter(None, [remark, unlike(groups)])))


def unlike(groups: Sequence[tuple[int, str, str, Sequence[Record]]]) -> str:
    """In words, that a scale gives the networks of a comparison different widths, so that it is of them too."""
    widths = sorted({record.run.width for *_, runs in groups for record in runs})
    return f"of widths {' and '.join(f'{width:g}' for width in widths)}" if len(widths) > 1 else ""


def decide(comparison: Comparison, samples: Sequence[Sample]) -> Outcome:
    """Apply the rule."""
    difference = sum(sample.sign * fmean(sample.values) for sample in samples)
    seeds = min(len(sample.values) for sample in samples)
    spread = standard_error(samples)
    if spread is None:
        return Outcome(comparison, UNDECIDED, difference, seeds=seeds)
    error, degrees = spread
    margin = quantile(degrees) * error
    verdict = HOLDS if difference > margin else FAILS if difference < -margin else UNDECIDED
    return Outcome(comparison, verdict, difference, error, margin, seeds)


def quantile(degrees: float) -> float:
    """Student's t that is exceeded either way in one of twenty cases."""
    from scipy.special import stdtrit  # slow to import, and a page without runs needs none

    return float(stdtrit(degrees, LIKELY))


def standard_error(samples: Iterable[Sample]) -> tuple[float, float] | None:
    """Of a sum of means, in points, by Welch, with Satterthwaite's degrees of freedom; None where a deviation is unknown."""
    parts: dict[object, tuple[float, int]] = {}
    for index, sample in enumerate(samples):
        count = len(sample.values)
        if sample.pool:  # one estimate for several samples: their parts are added up before degrees are counted
            parts[sample.pool] = parts.get(sample.pool, (0.0, 0))[0] + sample.pool.variance / count, sample.pool.degrees
        elif count > 1:
            parts[index] = variance(sample.values) / count, count - 1
        else:
            return None
    total = sum(part for part, _ in parts.values())
    doubt = sum(part**2 / degrees for part, degrees in parts.values())
    return sqrt(total), total**2 / doubt if doubt > 0 else 1.0


def pooled(records: Iterable[Record], setting: Setting, column: str, kind: str, epoch: int | None) -> Pool | None:
    """The variance between seeds over all rows of a setting and column that have several; None where none has."""
    groups: dict[Row, dict[int, float]] = {}
    for record in records:
        if record.match and gives(record, record.match.rows[0], column, setting):  # tables that share a row count it once
            number = value(record, kind, epoch)
            if number is not None:
                groups.setdefault(record.match.rows[0], {}).setdefault(record.run.seed, number)
    several = [tuple(numbers.values()) for numbers in groups.values() if len(numbers) > 1]
    degrees = sum(len(values) - 1 for values in several)
    if not degrees:
        return None
    return Pool(sum((len(values) - 1) * variance(values) for values in several) / degrees, degrees)


def known(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None)


def value(record: Record, kind: str, epoch: int | None = None) -> float | None:
    """A run's number in percent; None where it was not evaluated."""
    if kind == "quarter":
        scores = [accuracy for at, accuracy in curve(record).items() if 4 * at <= record.run.epochs]
        return scores[-1] if scores else None
    if kind == "curve":
        return curve(record).get(epoch) if epoch is not None else None
    if kind in UNITS:
        return UNITS[kind](record)
    return record.test_accuracy


def curve(record: Record) -> dict[int, float]:
    """Test accuracy in percent by epoch, where it was evaluated, in the order of the epochs."""
    scores = {entry["epoch"]: entry.get("test_accuracy") for entry in record.epochs}
    return {epoch: accuracy for epoch, accuracy in sorted(scores.items()) if accuracy is not None}


def smallest_lead(groups: Sequence[tuple[int, Sequence[Record]]]) -> tuple[int | None, str]:
    """The epoch at which one side's mean curve is least above the other's, and in words how often it is above."""
    curves = [(sign, curve(record), len(runs)) for sign, runs in groups for record in runs]
    epochs = sorted(set.intersection(*(set(scores) for _, scores, _ in curves))) if curves else []
    leads = {epoch: sum(sign * scores[epoch] / count for sign, scores, count in curves) for epoch in epochs}
    if not leads:
        return None, ""
    lowest = min(leads, key=leads.__getitem__)
    ahead = sum(lead > 0 for lead in leads.values())
    return lowest, f"at epoch {lowest}, where it leads least; ahead at {ahead} of {len(leads)} epochs"


def unit_accuracy(index: int) -> Callable[[Record], float | None]:
    """Reads a unit's accuracy of the last epoch in percent: of the held-out images, of the training images where none are."""

    def read(record: Record) -> float | None:
        try:
            unit = (record.result or {})["units"][index]
            return float(unit.get("val_accuracy", unit["accuracy"]))
        except (KeyError, IndexError, TypeError, AttributeError):  # a result that was altered
            return None

    return read


UNITS = {"first unit": unit_accuracy(0), "last unit": unit_accuracy(-1)}
