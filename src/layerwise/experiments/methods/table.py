"""The table of compared methods, on the terminal and as CSV."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from layerwise.experiments.front import on_front
from layerwise.utils import terminal
from layerwise.utils.csv_text import write_csv
from layerwise.utils.words import counted, plus_minus

CSV_BEGINS = "method,rule,loss,span,units"  # the columns that a table is known by
CAPTION = (
    "Multiply-adds of a step, heads included, relative to one of global training. Peaks of memory "
    "are counted whole: weights, heads, gradients, optimizer state, activations; predicted for a "
    "CPU. Accuracies after the last epoch. * on the front of accuracy against multiply-adds of the "
    "training, ° against memory."
)
EQUAL_WORDS = {
    "epochs": "{length} each",
    "multiply-adds": "at the multiply-adds of {length} of {reference}",
    "time": "in the training time of {length} of {reference}",
}


def title_of(table: dict[str, Any]) -> str:
    """What was compared and how, in words."""
    seeds = table["rows"][0]["seeds"]
    spent = EQUAL_WORDS[table["equal"]].format(length=counted(table["epochs"], "epoch"), **table)
    return f"{table['model']} on {table['data']}, {spent}, {counted(seeds, 'seed')}"


def peak_key(rows: Sequence[dict[str, Any]]) -> str:
    """The entry of the peak of memory: measured, or predicted where one was not measured."""
    measured = all(row["peak_memory_bytes"] is not None for row in rows)
    return "peak_memory_bytes" if measured else "predicted_peak_bytes"


def mark_fronts(rows: Sequence[dict[str, Any]]) -> None:
    """Say of each row whether it is on the fronts of accuracy against work and memory."""
    for key, name in (("training_ratio", "front_multiply_adds"), (peak_key(rows), "front_memory")):
        front = on_front([(row["test_accuracy"], row[key]) for row in rows])
        for row, best in zip(rows, front, strict=True):
            row[name] = best


def print_table(table: dict[str, Any]) -> None:
    """Print the table: accuracies in percent, memory in MB (10^6 bytes)."""
    shown = Table(title=f"{title_of(table)}: test accuracy, %", caption=CAPTION)
    headings = ("method", "units", "span", "epochs", "multiply-adds", "head parameters")
    memory = ("predicted peak, MB", "measured peak, MB", "step, ms", "training, s")
    for heading in (*headings, *memory, "test, %", "validation, %"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for row in table["rows"]:
        marks = "*" * row["front_multiply_adds"] + "°" * row["front_memory"]
        shown.add_row(
            row["method"],
            str(row["units"]),
            str(row["span"]),
            str(row["epochs"]),
            f"{row['multiply_adds_ratio']:.2f}",
            f"{row['head_parameters']:,}",
            number(row["predicted_peak_bytes"], 1e6, 1),
            number(row["peak_memory_bytes"], 1e6, 1),
            number(row["step_seconds"], 1e-3, 1),
            number(row["train_seconds"], 1, 1),
            f"{row['test_accuracy']:.2f}{plus_minus(row['deviation'])}{' ' * bool(marks)}{marks}",
            number(row["val_accuracy"], 1, 2),
        )
    terminal.print_table(shown)


def number(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f}"


def write_rows(path: Path, table: dict[str, Any]) -> None:
    """Write a line per method, with what was compared and how in its last columns."""
    about = {name: table[name] for name in ("model", "data", "equal", "reference", "batch_size")}
    lines = [row | about for row in table["rows"]]
    write_csv(path, list(lines[0]), lines)
