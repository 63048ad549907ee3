"""Tables as values: what the templates show of a number, and the columns of a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from layerwise.utils.words import plus_minus

NOTHING = "–"


@dataclass(frozen=True)
class Number:
    """A cell that is sorted by a value and shows a text."""

    value: float | None
    text: str

    @property
    def key(self) -> str:
        return "" if self.value is None else f"{self.value:.6g}"


@dataclass(frozen=True)
class Column:
    """A column's heading; ``group`` spans the neighbours that have the same."""

    name: str
    group: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of which every row begins with its heading; the other cells are texts or numbers."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]


def is_number_cell(value: Any) -> bool:
    return isinstance(value, Number)


def column_groups(columns: Sequence[Column]) -> Iterator[tuple[str, int]]:
    """Each group of neighbouring columns with how many they are."""
    for name, group in groupby(columns, key=lambda column: column.group):
        yield name, len(list(group))


def whole(value: int) -> Number:
    return Number(value, str(value))


def percent(value: float | None, digits: int = 2) -> Number:
    return Number(value, NOTHING if value is None else f"{value:.{digits}f}")


def points(value: float | None) -> Number:
    """A difference, with its sign."""
    value = None if value is None else round(value, 2) + 0.0  # no minus before 0.00
    return Number(value, NOTHING if value is None else f"{value:+.2f}".replace("-", "−"))


def uncertain(mean: float | None, deviation: float | None, seeds: int) -> Number:
    """A mean with its deviation and the number of seeds."""
    if mean is None:
        return Number(None, NOTHING)
    return Number(mean, f"{mean:.2f}{plus_minus(deviation)} ({seeds})")
