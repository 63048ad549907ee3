"""Tables of benchmarks as CSV files, which one call after another fills."""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.utils.csv_text import write_csv


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a table; none of a file that is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fill_table(
    path: Path,
    lines: Iterable[Mapping[str, Any]],
    key: Sequence[str],
    columns: Sequence[str] | None = None,
) -> None:
    """Write lines to a table. Its other lines stay, but for those that the new ones replace.

    Args:
        key: columns; a line of the file is replaced if a new one has the same values there.
        columns: of the table; None: those of the first line.

    Raises:
        SystemExit: the file is another table.
    """
    found = list(lines)
    columns = list(columns or found[0])
    before = read_table(path)
    if before and list(before[0]) != columns:
        sys.exit(
            f"Cannot write to {path}: it is another table, with the columns "
            f"{', '.join(before[0])}. Give another file."
        )

    def group(line: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple("" if line.get(name) is None else str(line[name]) for name in key)

    new: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for line in found:
        new.setdefault(group(line), []).append(line)
    written: list[Mapping[str, Any]] = []
    replaced = {group(line) for line in before} & set(new)
    for line in before:
        if group(line) not in replaced:
            written.append(line)
        else:
            written += new.pop(group(line), [])
    write_csv(path, columns, [*written, *(line for group in new.values() for line in group)])
