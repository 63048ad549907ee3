"""What a report is made of: runs, what could not be read, and each row's numbers, looked up once. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from layerwise.claims import Verdict, judge_all
from layerwise.measured import Measured, Setting, measured, settings
from layerwise.paper import COLUMNS, ROWS, Row
from layerwise.records import Broken, Record
from layerwise.runs import Run


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
        """A number for each setting, row and column that was run; global ones beside another loss than the paper's only where
        there is a layer-wise one."""
        found = {}
        for setting in self.settings:
            counted = [record for record in self.records if record.match and record.match.scale == setting.scale]
            for row in ROWS:
                of_row = [record for record in counted if record.match and row in record.match.rows]
                for column in COLUMNS if of_row else ():
                    number = measured(of_row, row, column, setting)
                    shared = column == "global" and setting.loss != Run.loss  # global training knows no loss
                    if number and (not shared or (setting, row, "layerwise") in found):
                        found[setting, row, column] = number
        return found

    @cached_property
    def verdicts(self) -> Mapping[Setting, list[Verdict]]:
        """The paper's claims by setting."""
        return {setting: judge_all(self.records, setting) for setting in self.settings}

    def of_table(self, table: int) -> list[Record]:
        """The runs that give a number of a table."""
        return [record for record in self.records if record.match and any(row.table == table for row in record.match.rows)]

    def number(self, setting: Setting, row: Row, column: str) -> Measured | None:
        return self.numbers.get((setting, row, column))

    def has(self, setting: Setting, rows: Iterable[Row]) -> bool:
        """Whether a setting has any number for some rows."""
        return any((setting, row, column) in self.numbers for row in rows for column in COLUMNS)


def gap(layerwise: float | None, globally: float | None) -> float | None:
    """How far layer-wise training is behind, in percentage points."""
    return None if layerwise is None or globally is None else globally - layerwise
