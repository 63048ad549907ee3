"""Tables as CSV that a spreadsheet shows as it is."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.utils.files import refuse_foreign, refuse_unwritable, replacing
from layerwise.utils.terminal import visible

FORMULA = tuple("=+-@\t\n＝＋－＠")  # first characters of a formula


def csv_text(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    """CSV with a line of headings; a column that a line lacks is empty in it.

    No cell is a formula: names in it may be others', and a spreadsheet would carry out what they
    say.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(plain_cell, columns))
    writer.writerows([plain_cell(line.get(name)) for name in columns] for line in lines)
    return text.getvalue()


def check_csv(path: Path, begins: str, command: str) -> None:
    """Refuse a file that could not be written in the end, or that is not of this command.

    Args:
        begins: the columns that a table of the command is known by.

    Raises:
        InvalidInput: as said.
    """
    refuse_unwritable("--csv", path)
    refuse_foreign("--csv", path, begins, command)


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as draft:
        draft.write_text(csv_text(columns, lines), encoding="utf-8", errors="replace")


def plain_cell(value: Any) -> Any:
    """A cell's value; behind an apostrophe where a spreadsheet would read a formula."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(FORMULA) and not is_number(text) else text


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and text == text.strip()
