"""The table of all runs; the page's script adds the details of a run when it is opened."""

from collections.abc import Sequence
from typing import Any

from layerwise.paper.numbers import place_of
from layerwise.report.page.cells import NOTHING, Column, Number, percent, whole
from layerwise.report.tables import hierarchy, is_local
from layerwise.runs.records import Record
from layerwise.runs.run import Run

RUN_COLUMNS = (
    *map(Column, ("run", "rows", "scale", "rule", "loss", "hierarchy", "data", "seed", "epochs")),
    *map(Column, ("test, %", "time, min", "state")),
)


def run_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Name, cells, summary and path of every run."""
    return [
        {
            "name": f"{record.run.model} {number}",
            "cells": run_cells(record),
            "summary": f"{record.run.model} {number}: {score(record)}, seed {record.run.seed}",
            "path": record.path,
        }
        for number, record in enumerate(records, 1)
    ]


def run_cells(record: Record) -> tuple[object, ...]:
    run, place = record.run, place_of(record)
    seconds = (record.result or {}).get("seconds")
    minutes = seconds / 60 if isinstance(seconds, int | float) else None
    done = len(record.epochs)
    # a sequential rule counts those of every unit
    planned = record.epochs[-1]["epochs"] if record.epochs else run.epochs
    return (
        ", ".join(row.label for row in place.rows) if place else "none of the paper's",
        place.scale if place else "",
        run.rule,
        loss_text(run) if is_local(record) else "",
        hierarchy(record) or NOTHING,
        run.data,
        whole(run.seed),
        Number(done, f"{done} of {planned}"),
        percent(record.test_accuracy),
        percent(minutes, 1),
        "finished" if record.result else "not finished",
    )


def loss_text(run: Run) -> str:
    """The loss with those of its options that are not at their default."""
    options = ", ".join(
        f"{name.replace('_', '-')} {value}" for name, value in run.loss_options.items()
    )
    return f"{run.loss_in_words} ({options})" if options else run.loss_in_words


def score(record: Record) -> str:
    return f"{record.test_accuracy:.2f} %" if record.test_accuracy is not None else "not finished"
