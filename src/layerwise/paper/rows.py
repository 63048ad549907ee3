"""The paper's six tables as runs: arXiv:2010.08038, 61 rows, each trained layer-wise and globally.

Imports no torch.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from typing import Any

from layerwise.errors import InvalidInput, brief, choose
from layerwise.hierarchy import Hierarchy, parse_hierarchy
from layerwise.runs.run import Run, without_idle
from layerwise.utils.options import Options
from layerwise.utils.words import counted

# a column of the paper's tables -> the rule that trains it
COLUMNS = {"layerwise": "simultaneous", "global": "global"}
# a rule that computes the same bits -> the rule of the column
SAME_BITS = {"parallel": "simultaneous", "checkpointed": "global"}
TABLES = (1, 2, 3, 4, 5, 6)
ROMAN = ("I", "II", "III", "IV", "V", "VI")
# of Nøkland & Eidnes' published program on CIFAR-10. Here CIFAR-100 has it too, where that program
# used 4096, as for the other networks of these tables.
DECODER_DIM = {"vgg8b": 2048}
PARTS = ("micro_batches",)  # options of a rule that change what global training computes
READS_DECODER_DIM = ("pred", "predsim", "predsim-lite")


@dataclass(frozen=True)
class Row:
    """A row of one table: a network, its options, and the printed test accuracies in percent.

    Attributes:
        table: 1 to 6.
        name: the paper's, such as ``resnet18_r4``; model: the network it is a variant of, such as
            ``resnet18``.
    """

    table: int
    data: str
    name: str
    lr: float
    dropout: float
    hierarchy: Hierarchy
    layerwise_accuracy: float
    global_accuracy: float

    @property
    def model(self) -> str:
        return self.name.split("_")[0]

    @property
    def label(self) -> str:
        """Table and name, such as ``V resnet18_r4``."""
        return f"{ROMAN[self.table - 1]} {self.name}"

    def accuracy(self, column: str) -> float:
        """The accuracy in percent that the paper prints in ``layerwise`` or ``global``."""
        return self.layerwise_accuracy if column == "layerwise" else self.global_accuracy


@dataclass(frozen=True)
class Scale:
    """A setting in which every row can be trained. Numbers of two scales never share a column.

    Attributes:
        options: fields of a ``Run``; they go before the row's own rate and dropout.
        by_model: fields for single networks, which go before ``options``.
        text: the setting in words.
    """

    name: str
    text: str
    options: Mapping[str, Any] = field(hash=False)
    by_model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def fields(self, model: str) -> dict[str, Any]:
        """The fields of a run that the scale sets for a network."""
        return {**self.options, **self.by_model.get(model, {})}


# its maps have four times the channels: by predsim a step costs 7 of ResNet18's
NARROW = {"resnet50": {"width": 0.125}}
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "paper",
            "the paper's setting: full width, 32 pixels, all 50,000 training images, 400 epochs",
            {"val_fraction": 0.0, "epochs": 400, "batch_size": 128},
        ),
        Scale(
            "middle",
            "for 2 CPU cores over days: half the width (ResNet50: an eighth), 32 pixels, all "
            "50,000 training images, 30 epochs, no dropout, rate 0.001, bfloat16",
            {
                "width": 0.5,
                "val_fraction": 0.0,
                "epochs": 30,
                "batch_size": 128,
                # chosen once on global training, by validation: docs/log.md, 2026-11-29
                "lr": 1e-3,
                "dropout": 0.0,
                "amp": True,
            },
            NARROW,
        ),
        Scale(
            "small",
            "for 2 CPU cores: a quarter of the width (ResNet50: an eighth), 16 pixels, 15,000 "
            "training images and 5,000 others held out, 20 epochs, no dropout, rate 0.001, "
            "bfloat16",
            {
                "width": 0.25,
                "image_size": 16,
                "train_images": 15_000,
                "val_fraction": 0.1,
                "crop_padding": 2,
                "epochs": 20,
                "batch_size": 128,
                "lr": 1e-3,
                "dropout": 0.0,
                "amp": True,
            },
            NARROW,
        ),
    )
}
# what may differ between a row's run and one that still counts for it, said beside its number
DEPARTURES = ("epochs", "loss", "amp")


def read_rows() -> tuple[Row, ...]:
    """The 61 rows in the paper's order."""
    with (files("layerwise.paper") / "tables.csv").open(encoding="utf-8") as lines:
        return tuple(
            Row(
                int(line["table"]),
                line["dataset"],
                line["model"],
                float(line["lr"]),
                float(line["dropout"]),
                parse_hierarchy(line["hierarchy"]),
                float(line["layerwise_accuracy"]),
                float(line["global_accuracy"]),
            )
            for line in csv.DictReader(lines)
        )


ROWS = read_rows()
BY_NAME = {(row.table, row.name): row for row in ROWS}


def select_rows(tables: Sequence[int], patterns: Sequence[str] = ("*",)) -> list[Row]:
    """The rows of some tables whose names match one of the shell patterns.

    Raises:
        InvalidInput: there is no such table, or a pattern matches no row.
    """
    for table in tables:
        if table not in TABLES:
            raise InvalidInput(
                f"Cannot use table {brief(table)}: the paper has no table {brief(table)}. Give 1 "
                "to 6."
            )
    rows = [row for row in ROWS if row.table in tables]
    for pattern in patterns:
        if not any(fnmatch(row.name, pattern) for row in rows):
            names = ", ".join(dict.fromkeys(row.name for row in rows))
            raise InvalidInput(
                f"Cannot find {pattern!r}: no row of these tables matches {pattern!r}. Give some "
                f"of {names}, or patterns such as 'resnet18*'."
            )
    return [row for row in rows if any(fnmatch(row.name, pattern) for pattern in patterns)]


def row_run(row: Row, scale: str, column: str, seed: int = 0, **changes: Any) -> Run:
    """The run that gives a row's number.

    Args:
        scale: a name in ``SCALES``.
        column: ``layerwise`` or ``global``.
        changes: of the run's fields, such as ``epochs``; they go before row and scale.
    """
    own = {
        "model": row.model,
        "hierarchy": ",".join(map(str, row.hierarchy)),
        "data": row.data,
        "lr": row.lr,
        "dropout": row.dropout,
        "rule": COLUMNS[column],
        "output_layer": "separate",
        "seed": seed,
    }
    run = replace(
        Run(), **{**own, **SCALES[choose("scale", scale, SCALES)].fields(row.model), **changes}
    )
    if column != "layerwise":
        return plain(run)
    published = row.model in DECODER_DIM and run.loss in READS_DECODER_DIM
    options = {"decoder_dim": DECODER_DIM[row.model]} if published else {}
    return replace(run, loss_options=Options({**options, **run.loss_options}))


def plain(run: Run) -> Run:
    """A global run without what only local losses and checkpointing read.

    So one that is trained beside ``pred`` is the one beside ``predsim``. Parts of batches stay,
    since batch normalisation sees each alone.
    """
    parts = {name: run.rule_options[name] for name in PARTS if name in run.rule_options}
    return replace(without_idle(run), rule_options=Options(parts), output_layer="separate")


@dataclass(frozen=True)
class Planned:
    """A run, and the rows whose number it gives: several where tables share a row."""

    run: Run
    column: str
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """In words: which rows, which column, which seed."""
        tables = ", ".join(ROMAN[row.table - 1] for row in self.rows)
        names = "/".join(dict.fromkeys(row.name for row in self.rows))
        how = "globally" if self.column == "global" else f"layer-wise by {self.run.loss}"
        return f"{names} on {self.run.data} (Table {tables}), {how}, seed {self.run.seed}"


def plan(
    rows: Iterable[Row], scale: str, columns: Iterable[str], seeds: Iterable[int], **changes: Any
) -> list[Planned]:
    """Every run that the rows need, each once.

    They are ordered by seed, then by row, then by column.
    """
    rows, columns = list(rows), list(columns)
    wanted: dict[Run, Planned] = {}
    for seed in seeds:
        for row in rows:
            for column in columns:
                run = row_run(row, scale, column, seed, **changes)
                planned = wanted.get(run)
                wanted[run] = (
                    replace(planned, rows=(*planned.rows, row))
                    if planned
                    else Planned(run, column, (row,))
                )
    return list(wanted.values())


@dataclass(frozen=True)
class Match:
    """The rows that a run is a number for; false where there are none.

    Attributes:
        departures: in words, how it differs from what the scale says, such as ``100 epochs instead
            of 400``.
    """

    scale: str
    column: str
    rows: tuple[Row, ...]
    departures: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.rows)


NO_MATCH = Match("", "", (), ())


@cache  # a report asks it of every run several times
def match(run: Run) -> Match:
    """The rows that a run gives the number of, by what it is and not by its name."""
    run = replace(run, rule=SAME_BITS.get(run.rule, run.rule))
    column = next((column for column, rule in COLUMNS.items() if rule == run.rule), None)
    if column is None:
        return NO_MATCH
    compared = run if column == "layerwise" else plain(run)
    for scale in SCALES:
        free = {name: getattr(compared, name) for name in DEPARTURES}
        # a report asks this of 1,000 runs
        near = [row for row in ROWS if (row.model, row.data) == (run.model, run.data)]
        if compared.hierarchy is None and near:  # the published one, which the first row has
            compared = replace(compared, hierarchy=row_run(near[0], scale, column, 0).hierarchy)
        rows = tuple(
            row for row in near if row_run(row, scale, column, run.seed, **free) == compared
        )
        if rows:
            expected = row_run(rows[0], scale, column, run.seed)
            return Match(scale, column, rows, tuple(departures(compared, expected)))
    return NO_MATCH


def departures(run: Run, expected: Run) -> Iterable[str]:
    """Differences of a run from the one expected, in words."""
    if run.epochs != expected.epochs:
        yield f"{counted(run.epochs, 'epoch')} instead of {expected.epochs}, decays in proportion"
    if run.loss != expected.loss:
        yield f"{run.loss} instead of {expected.loss}"
    if run.amp != expected.amp:
        yield "bfloat16 instead of float32" if run.amp else "float32 instead of bfloat16"
