"""The results of ``layerwise separability`` as a table and as CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from layerwise.analysis.separability import separability_of_run
from layerwise.measures import MEASURES, Accuracy, heading_of
from layerwise.measures.gains import NEAR_ZERO
from layerwise.runs.folder import RunFolder
from layerwise.runs.headings import HEADINGS, parse_measures
from layerwise.runs.run import Execution
from layerwise.utils import terminal
from layerwise.utils.csv_text import check_csv, write_csv
from layerwise.utils.words import plus_minus

CSV_BEGINS = "index,name,depth,resolution"  # the columns that a table is known by


def show_run(
    folder: RunFolder,
    execution: Execution,
    measures: str | None,
    csv_file: str | None,
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure a run, print its table, and write it as CSV.

    Args:
        measures: names joined by commas; None: all.
        csv_file: path of the CSV file; None: none is written.
        choices: further arguments of ``separability_of_run``.

    Raises:
        InvalidInput, CannotSplit: see ``separability.separability``; or the file cannot be
            written, which is refused before measuring.
    """
    names = list(MEASURES) if measures is None else parse_measures(measures)
    if csv_file is not None:
        check_csv(Path(csv_file), CSV_BEGINS, "separability")
    result = separability_of_run(folder, execution, names, **choices)
    print_table(result)
    if csv_file is not None:
        write_rows(Path(csv_file), result["units"])
        print(f"written: {csv_file}")
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the table; accuracies in percent."""
    rows, first = result["units"], result["measures"][0]
    columns = [
        *result["measures"],
        *(name for name in ("auxiliary_accuracy", "cka") if any(name in row for row in rows)),
    ]
    title = (
        f"{result['run']} after epoch {result['epoch']}: separability on {result['images']} "
        f"{result['split']} images"
    )
    table = Table(title=title, caption=caption(result))
    for text in ("unit", "resolution", "channels", "pooled to"):
        table.add_column(text, justify="left" if text == "unit" else "right")
    for name in columns:
        table.add_column(
            heading_of(MEASURES[name]) if name in MEASURES else HEADINGS[name], justify="right"
        )
    table.add_column(f"gain ({first.replace('_', ' ')})", justify="right")
    table.add_column("mismatched")
    for row in rows:
        table.add_row(
            row["name"],
            resolution_text(row["resolution"]),
            str(row["channels"]),
            resolution_text(row["pooled_resolution"]),
            *(
                number_text(row.get(name), "{:.3f}" if name in ("cka", "fisher") else "{:.2f}")
                for name in columns
            ),
            gain_text(row),
            "yes" if row["mismatched"] else "",
        )
    terminal.print_table(table)
    for row in rows:
        if "refused" in row:
            print(f"{row['name']}: {row['refused']}")


def caption(result: dict[str, Any]) -> str:
    text = (
        f"Features are average-pooled to at most {result['pooled_to']} numbers an image, or one "
        "per channel. "
    )
    if any(isinstance(MEASURES[name], Accuracy) for name in result["measures"]):
        text += (
            f"Accuracies are of {result['scored_images']} images that nothing is fitted to "
            f"(cross_fitted_probe: of all {result['images']}, a quarter at a time). "
        )
    text += "gain: less the row above"
    paired = isinstance(MEASURES[result["measures"][0]], Accuracy)
    text += ", ± the standard error over the same images. " if paired else ". "
    if all(row["mismatched"] is None for row in result["units"]):
        return text + "Units have no loss of their own, so none is marked as mismatched."
    return text + (
        f"mismatched: a gain that is not above {'its error' if paired else '0'}, while the unit's "
        f"loss over the last epoch is above {NEAR_ZERO:.0%} of that over its first."
    )


def resolution_text(resolution: Sequence[int] | None) -> str:
    return "–" if resolution is None else "×".join(map(str, resolution))


def gain_text(row: Mapping[str, Any]) -> str:
    return number_text(row["gain"], "{:+.2f}") + plus_minus(row["gain_error"])


def number_text(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows with a line of headings; what is not known is empty, resolutions are H×W."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    lines = (
        {
            name: "×".join(map(str, value)) if isinstance(value, list) else value
            for name, value in row.items()
        }
        for row in rows
    )
    write_csv(path, headings, lines)
