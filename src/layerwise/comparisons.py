"""One number above another: what the paper prints of it, what was measured, and whether the seeds decide it. No torch.

The rule: runs with the same seed are paired, so a difference is averaged over the seeds that both sides have. Its standard
error comes from how far runs of the data set scatter once row and seed are accounted for (``paired.Scatter``). A comparison
*holds* if the difference exceeds that error times Student's t for 95 %, *does not hold* if it is below minus that, and is
*undecided* between; also where the sides have no seed in common, or no two rows two seeds in common. Networks of different
widths are not compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from layerwise.paired import Measure, Scores, Term, curve
from layerwise.paper import ROMAN, Row
from layerwise.records import Record

HOLDS, FAILS, UNDECIDED, UNMEASURED = "holds", "does not hold", "undecided", "not measured"
UNLIKELY = 0.05  # how often chance alone may decide a comparison, or say of a claim that it does not hold
MEASURES: dict[str, Measure] = {
    "layerwise": (Term(1, "layerwise"),),
    "global": (Term(1, "global"),),
    "gap": (Term(1, "global"), Term(-1, "layerwise")),
    "quarter": (Term(1, "layerwise", "quarter"),),
    "curve": (Term(1, "layerwise", "curve"),),
    "first unit": (Term(1, "layerwise", "first unit"),),
    "last unit": (Term(1, "layerwise", "last unit"),),
}
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
        return sum(term.sign * self.row.accuracy(term.column) for term in MEASURES[self.kind])

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
    """A claim's smallest part: one number is above another, perhaps by some amount; the verdict is about the sign alone.

    The two are the same number of two rows, or two numbers of one row.
    """

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
    def measured(self) -> tuple[Measure, tuple[Row, ...]]:
        """A measure, and the two rows that it is compared of; or a measure that is itself the difference, and its row."""
        above, below = MEASURES[self.above.kind], MEASURES[self.below.kind]
        if above == below:
            return above, (self.above.row, self.below.row)
        return above + tuple(replace(term, sign=-term.sign) for term in below), (self.above.row,)

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
        chance: how often so large a difference either way would come of chance alone; None where no error is known.
        seeds: that both sides have; where they have none in common, of the side that has fewest; 0 where nothing is measured.
        remark: what else there is to say, such as the epoch of the smallest lead.
    """

    comparison: Comparison
    verdict: str = UNMEASURED
    difference: float | None = None
    error: float | None = None
    margin: float | None = None
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
        error = f"standard error {self.error:.2f}" if self.error is not None else "no deviation known"
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        remark = f"; {self.remark}" if self.remark else ""
        return f"{comparison.text}: {self.difference:+.2f} points, {error}, {seeds}{remark}{paper}{said}: {self.verdict}"


def compare(comparison: Comparison, scores: Scores) -> Outcome:
    """Hold a comparison against the finished runs of a setting."""
    measure, rows = comparison.measured
    if not any(term.column in scores.columns for term in measure):
        return Outcome(comparison)
    runs = [record for row in rows for record in scores.records(row, measure)]
    epochs = common_epochs(runs) if comparison.above.kind == "curve" else ()
    sides = [scores.values(row, measure, epochs) for row in rows]
    if not all(sides) or unlike(runs):
        return Outcome(comparison, remark=unlike(runs) if all(sides) else "")
    seeds = sorted(set.intersection(*map(set, sides)))
    means = [np.mean([side[seed] for seed in seeds or side], axis=0) for side in sides]
    lead = means[0] - means[1] if len(means) == 2 else means[0]
    scatter = scores.scatter(rows[0].data, measure, epochs)
    if not seeds or scatter is None:
        remark = "" if seeds else "no seed in common"
        return Outcome(comparison, UNDECIDED, float(lead.min()), seeds=len(seeds) or min(map(len, sides)), remark=remark)
    errors = np.sqrt(len(sides) * scatter.variance / len(seeds))
    least = int(np.argmin(lead / errors))
    difference, error = float(lead[least]), float(errors[least])
    chance = two_sided(difference / error, scatter.degrees)
    if difference < 0:  # after one of many epochs, each of which may seem behind by chance
        chance = min(1.0, len(lead) * chance)
    verdict = UNDECIDED if chance >= UNLIKELY else HOLDS if difference > 0 else FAILS
    where = (
        f"at epoch {epochs[least]}, where it leads least; ahead at {(lead > 0).sum()} of {len(lead)} epochs" if epochs else ""
    )
    borrowed = f"deviation of {scatter.rows} other rows" if len(seeds) == 1 else ""
    margin = quantile(scatter.degrees) * error
    return Outcome(comparison, verdict, difference, error, margin, chance, len(seeds), joined(where, borrowed))


def joined(*remarks: str) -> str:
    return "; ".join(filter(None, remarks))


def unlike(runs: Iterable[Record]) -> str:
    """In words, that a scale gives the networks of a comparison different widths, so that it would be of them; mostly empty."""
    widths = sorted({record.run.width for record in runs})
    return f"the widths are {' and '.join(f'{width:g}' for width in widths)}" if len(widths) > 1 else ""


def common_epochs(runs: Iterable[Record]) -> tuple[int, ...]:
    """The epochs after which all of the runs were evaluated on the test images."""
    evaluated = [set(curve(record)) for record in runs]
    return tuple(sorted(set.intersection(*evaluated))) if evaluated else ()


def quantile(degrees: float) -> float:
    """Student's t that is exceeded either way in one of twenty cases."""
    from scipy.special import stdtrit  # slow to import, and a page without runs needs none

    return float(stdtrit(degrees, 1 - UNLIKELY / 2))


def two_sided(t: float, degrees: float) -> float:
    """How often Student's t is as far from 0, or farther, by chance."""
    from scipy.special import stdtr

    return float(2 * stdtr(degrees, -abs(t)))
