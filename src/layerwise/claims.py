"""Does the paper hold? Verdicts on its claims and the order of its rows, by the rule in ``comparisons``. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean

from layerwise.claim_list import CLAIMS
from layerwise.claim_parts import INCONSISTENCIES, Claim, Inconsistency
from layerwise.comparisons import FAILS, HOLDS, UNDECIDED, UNMEASURED, Outcome, compare
from layerwise.errors import InvalidInput
from layerwise.measured import Setting, gives, measured
from layerwise.paper import ROWS, TABLES
from layerwise.records import Record

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
    "rank_correlation",
]

VERDICTS = (HOLDS, FAILS, UNDECIDED, UNMEASURED)
FEWEST = 3  # rows that have an order worth a coefficient


@dataclass(frozen=True)
class Verdict:
    """What the runs of a setting say of a claim.

    Attributes:
        verdict: ``holds`` where every comparison that was measured does; ``does not hold`` where one does not; ``undecided``
            otherwise; ``not measured`` where nothing is.
        effect: percentage points: the smallest difference among the comparisons that have the claim's verdict; None where none
            is measured. deviation: its standard error; None where no deviation is known. seeds: of the side with fewest.
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
        missing = f"{self.measured} of {total} comparisons are measured." if 0 < self.measured < total else ""
        return " ".join(filter(None, [missing, self.claim.note]))


def judge(claim: Claim, records: Sequence[Record], setting: Setting) -> Verdict:
    """Hold a claim against the finished runs of a setting."""
    outcomes = tuple(compare(comparison, records, setting) for comparison in claim.comparisons)
    known = [outcome.verdict for outcome in outcomes if outcome.verdict != UNMEASURED]
    verdict = next((word for word in (FAILS, UNDECIDED, HOLDS) if word in known), UNMEASURED)
    deciding = [outcome for outcome in outcomes if outcome.verdict == verdict and outcome.difference is not None]
    weakest = min(deciding, key=lambda outcome: outcome.difference or 0.0, default=None)
    if weakest is None:
        return Verdict(claim, verdict, None, None, 0, 0, outcomes)
    return Verdict(claim, verdict, weakest.difference, weakest.error, weakest.seeds, len(known), outcomes)


def judge_all(records: Sequence[Record], setting: Setting) -> list[Verdict]:
    """All the paper's claims, in the order of ``CLAIMS``."""
    mine = [
        record
        for record in records
        if record.match and gives(record, record.match.rows[0], record.match.column, setting)  # one setting's: fewer to look at
    ]
    return [judge(claim, mine, setting) for claim in CLAIMS]


@dataclass(frozen=True)
class RankCorrelation:
    """How alike the paper and the runs order the rows of a table.

    Attributes:
        spearman: from -1 (reversed) to 1 (the same order); None with fewer than 3 rows, or where either side's are all equal.
        rows: names of the rows measured; n: how many.
    """

    spearman: float | None
    rows: tuple[str, ...]
    n: int


def rank_correlation(records: Sequence[Record], table: int, setting: Setting, column: str = "layerwise") -> RankCorrelation:
    """Spearman's coefficient between the paper's accuracies and the measured means, over a table's rows that are measured.

    Raises:
        InvalidInput: there is no such table or column.
    """
    if table not in TABLES:
        raise InvalidInput(f"the paper has no table {table}: give a number from 1 to 6")
    pairs = [(row, measured(records, row, column, setting)) for row in ROWS if row.table == table]
    found = [(row, number.mean) for row, number in pairs if number]
    coefficient = None
    if len(found) >= FEWEST:
        coefficient = spearman([row.accuracy(column) for row, _ in found], [mean for _, mean in found])
    return RankCorrelation(coefficient, tuple(row.name for row, _ in found), len(found))


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The correlation of the ranks, equal values sharing the mean of theirs; None where all of a side are equal."""
    ranks = [
        [sum(item < value for item in side) + sum(item == value for item in side) / 2 for value in side]
        for side in (one, other)
    ]
    first, second = ([rank - fmean(side) for rank in side] for side in ranks)
    spread = sqrt(sum(rank**2 for rank in first) * sum(rank**2 for rank in second))
    return sum(a * b for a, b in zip(first, second, strict=True)) / spread if spread else None
