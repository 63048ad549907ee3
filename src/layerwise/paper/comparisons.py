"""Comparisons of the paper's numbers, of which its claims are made."""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from layerwise.paper.rows import BY_NAME, ROMAN, Row


@dataclass(frozen=True)
class Term:
    """A part of a measure: a run's number, with its sign.

    ``kind``: a key of ``NUMBERS``, or ``curve``.
    """

    sign: int
    column: str
    kind: str = "last"


Measure = tuple[Term, ...]  # a sum of numbers of one row

MEASURES: dict[str, Measure] = {
    "layerwise": (Term(1, "layerwise"),),
    "global": (Term(1, "global"),),
    "gap": (Term(1, "global"), Term(-1, "layerwise")),
    "quarter": (Term(1, "layerwise", "quarter"),),
    "curve": (Term(1, "layerwise", "curve"),),
    "first probe": (Term(1, "layerwise", "first probe"),),
    "last probe": (Term(1, "layerwise", "last probe"),),
}
WORDS = {
    "layerwise": "layer-wise accuracy",
    "global": "global accuracy",
    "gap": "gap between global and layer-wise accuracy",
    "quarter": "layer-wise accuracy after a quarter of the epochs",
    "curve": "layer-wise accuracy at every epoch",
    "first probe": "linear probe behind the first convolution",
    "last probe": "linear probe behind the last convolution",
}


@dataclass(frozen=True)
class Number:
    """A side of a comparison: a row, and which of its numbers (a key of ``WORDS``)."""

    row: Row
    kind: str

    @property
    def printed(self) -> float | None:
        """The number that the paper prints; None for what it only draws."""
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
    """The size that a sentence gives to a difference, and the range in points that counts."""

    text: str
    low: float
    high: float = inf


@dataclass(frozen=True)
class Comparison:
    """A claim's smallest part: one number is above another, perhaps by some amount.

    The verdict is about the sign alone.

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
        return self.printed > 0 and (
            self.amount is None or self.amount.low <= self.printed <= self.amount.high
        )

    @property
    def measured(self) -> tuple[Measure, tuple[Row, ...]]:
        """A measure, and the two rows that it is compared of.

        Or a measure that is itself the difference, and its row.
        """
        above, below = MEASURES[self.above.kind], MEASURES[self.below.kind]
        if above == below:
            return above, (self.above.row, self.below.row)
        return above + tuple(replace(term, sign=-term.sign) for term in below), (self.above.row,)

    @property
    def text(self) -> str:
        below = (
            self.below.text if self.below.kind != self.above.kind else f"that of {self.below.where}"
        )
        return f"{self.above.text} above {below} on {self.above.row.data}"


def number(table: int, name: str, kind: str = "layerwise") -> Number:
    return Number(BY_NAME[table, name], kind)


def better(
    table: int, name: str, *below: str, kind: str = "layerwise", amount: Amount | None = None
) -> tuple[Comparison, ...]:
    """A row of a table above each of some other rows."""
    return tuple(
        Comparison(number(table, name, kind), number(table, lower, kind), amount) for lower in below
    )


def falling(table: int, *names: str, kind: str = "layerwise") -> tuple[Comparison, ...]:
    """Each row of a table above the next."""
    return tuple(
        Comparison(number(table, above, kind), number(table, below, kind))
        for above, below in pairwise(names)
    )


def apart(table: int, name: str, above: str, below: str) -> tuple[Comparison, ...]:
    """One of a row's numbers above another of the same row."""
    return (Comparison(number(table, name, above), number(table, name, below)),)
