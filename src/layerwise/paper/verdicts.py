"""Verdicts on the paper's claims, and the evidence for them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from statistics import fmean

from layerwise.errors import InvalidInput
from layerwise.paper.claims import CLAIMS, INCONSISTENCIES, Claim, Inconsistency
from layerwise.paper.numbers import Measured, Setting, measured, place_of, settings
from layerwise.paper.rows import COLUMNS, ROWS, TABLES, Row
from layerwise.paper.statistics import (
    FAILS,
    HOLDS,
    UNDECIDED,
    UNLIKELY,
    UNMEASURED,
    Outcome,
    Scores,
    compare,
)
from layerwise.runs.records import Broken, Record
from layerwise.runs.run import Run

__all__ = [
    "CLAIMS",
    "INCONSISTENCIES",
    "VERDICTS",
    "Claim",
    "Inconsistency",
    "RankCorrelation",
    "Verdict",
    "judge",
    "judge_all",
    "rank_correlations",
]
VERDICTS = (HOLDS, FAILS, UNDECIDED, UNMEASURED)
FEWEST = 3  # rows that have an order worth a coefficient


@dataclass(frozen=True)
class Verdict:
    """The verdict of a setting's runs on a claim.

    Attributes:
        verdict: ``holds`` where every comparison that was measured does; ``does not hold`` where
            one of them does not, beyond what chance does to so many (Bonferroni); ``undecided``
            otherwise; ``not measured`` where nothing is.
        effect: percentage points: the smallest difference among the comparisons that keep the claim
            from holding, or among all where it holds; None where none is measured. deviation: its
            standard error; None where no deviation is known. seeds: that both sides of it have.
        measured: how many of the claim's comparisons are.
        note: the claim's, and how many comparisons are missing.
    """

    claim: Claim
    verdict: str
    effect: float | None
    deviation: float | None
    seeds: int
    measured: int
    outcomes: tuple[Outcome, ...]

    @property
    def detail(self) -> tuple[str, ...]:
        """A line per comparison, with its numbers."""
        return tuple(outcome.line for outcome in self.outcomes)

    @property
    def paper_agrees(self) -> bool | None:
        return self.claim.paper_agrees

    @property
    def note(self) -> str:
        total = len(self.outcomes)
        missing = (
            f"{self.measured} of {total} comparisons are measured."
            if 0 < self.measured < total
            else ""
        )
        return " ".join(filter(None, [missing, self.claim.note]))


def judge(claim: Claim, records: Sequence[Record], setting: Setting) -> Verdict:
    """Hold a claim against the finished runs of a setting."""
    return weigh(claim, Scores(records, setting))


def judge_all(records: Sequence[Record], setting: Setting) -> list[Verdict]:
    """All the paper's claims, in the order of ``CLAIMS``."""
    scores = Scores(records, setting)
    return [weigh(claim, scores) for claim in CLAIMS]


def weigh(claim: Claim, scores: Scores) -> Verdict:
    """A claim's verdict from those of its comparisons."""
    outcomes = tuple(compare(comparison, scores) for comparison in claim.comparisons)
    decided = [outcome for outcome in outcomes if outcome.verdict != UNMEASURED]
    if not decided:
        return Verdict(claim, UNMEASURED, None, None, 0, 0, outcomes)
    against = [outcome for outcome in decided if outcome.verdict != HOLDS]
    refuting = [
        outcome
        for outcome in against
        if outcome.verdict == FAILS and (outcome.chance or 0.0) * len(decided) < UNLIKELY
    ]
    verdict = FAILS if refuting else UNDECIDED if against else HOLDS
    weakest = min(refuting or against or decided, key=lambda outcome: outcome.difference or 0.0)
    return Verdict(
        claim, verdict, weakest.difference, weakest.error, weakest.seeds, len(decided), outcomes
    )


@dataclass(frozen=True)
class RankCorrelation:
    """The likeness of the paper's and the runs' order of a table's rows.

    Attributes:
        width: of the networks; those of another width are ranked apart.
        spearman: from -1 (reversed) to 1 (the same order); None with fewer than 3 rows, or where
            either side's are all equal.
        rows: names of the rows measured.
    """

    width: float
    spearman: float | None
    rows: tuple[str, ...]


def rank_correlations(
    records: Sequence[Record], table: int, setting: Setting, column: str = "layerwise"
) -> list[RankCorrelation]:
    """Spearman's coefficient between the paper's accuracies and the measured means.

    It is taken over the rows of a table that are measured, a coefficient for each width of their
    networks: where ResNet50 is narrower than ResNet18, their order is one of widths.

    Raises:
        InvalidInput: there is no such table or column.
    """
    if table not in TABLES:
        raise InvalidInput(
            f"Cannot use table {table}: the paper has no table {table}. Give 1 to 6."
        )
    numbers = {row: measured(records, row, column, setting) for row in ROWS if row.table == table}
    by_width: dict[float, list[tuple[Row, float]]] = {}
    for row, number in numbers.items():
        if number:
            by_width.setdefault(number.records[0].run.width, []).append((row, number.mean))
    return [
        RankCorrelation(
            width,
            spearman([row.accuracy(column) for row, _ in pairs], [mean for _, mean in pairs])
            if len(pairs) >= FEWEST
            else None,
            tuple(row.name for row, _ in pairs),
        )
        for width, pairs in by_width.items()
    ]


def spearman(first_side: Sequence[float], second_side: Sequence[float]) -> float | None:
    """The correlation of the ranks; None where all values of a side are equal.

    Equal values share the mean of their ranks.
    """
    ranks = [
        [
            sum(item < value for item in side) + sum(item == value for item in side) / 2
            for value in side
        ]
        for side in (first_side, second_side)
    ]
    first, second = ([rank - fmean(side) for rank in side] for side in ranks)
    spread = sqrt(sum(rank**2 for rank in first) * sum(rank**2 for rank in second))
    return sum(a * b for a, b in zip(first, second, strict=True)) / spread if spread else None


@dataclass(frozen=True)
class Evidence:
    """Runs as they were read, and the rows' numbers by setting."""

    records: Sequence[Record]
    broken: Sequence[Broken]

    @cached_property
    def settings(self) -> list[Setting]:
        return settings(self.records)

    @cached_property
    def numbers(self) -> Mapping[tuple[Setting, Row, str], Measured]:
        """A number for each setting, row and column that was run.

        Global ones beside another loss than the paper's are here only where there is a layer-wise
        one.
        """
        numbers = {}
        for setting in self.settings:
            counted = [record for record in self.records if place_of(record).scale == setting.scale]
            for row in ROWS:
                of_row = [record for record in counted if row in place_of(record).rows]
                for column in COLUMNS if of_row else ():
                    number = measured(of_row, row, column, setting)
                    # global training knows no loss
                    shared = column == "global" and setting.loss != Run.loss
                    if number and (not shared or (setting, row, "layerwise") in numbers):
                        numbers[setting, row, column] = number
        return numbers

    @cached_property
    def verdicts(self) -> Mapping[Setting, list[Verdict]]:
        """The paper's claims by setting."""
        return {setting: judge_all(self.records, setting) for setting in self.settings}

    def of_table(self, table: int) -> list[Record]:
        """The runs that give a number of a table."""
        return [
            record
            for record in self.records
            if any(row.table == table for row in place_of(record).rows)
        ]

    def number(self, setting: Setting, row: Row, column: str) -> Measured | None:
        return self.numbers.get((setting, row, column))

    def has(self, setting: Setting, rows: Iterable[Row]) -> bool:
        """Whether a setting has any number for some rows."""
        return any((setting, row, column) in self.numbers for row in rows for column in COLUMNS)


def gap(layerwise: float | None, globally: float | None) -> float | None:
    """Percentage points by which layer-wise training is behind global training."""
    return None if layerwise is None or globally is None else globally - layerwise
