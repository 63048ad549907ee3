"""A sweep over the paper's rows: what is finished is skipped, what was interrupted goes on, several processes can share it."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from layerwise.build import check_run
from layerwise.data import load_data
from layerwise.errors import Busy, Diverged, InvalidInput
from layerwise.estimate import estimate
from layerwise.hierarchy import format_hierarchy
from layerwise.paper import ROWS, SCALES, Planned, Row
from layerwise.progress import clock, shown
from layerwise.runs import Execution, Run, RunFolder, run_name
from layerwise.train import Interrupted, train

FINISHED, UNFINISHED, TO_DO, ELSEWHERE, DIVERGED = "finished", "unfinished", "to do", "in another process", "diverged"


@dataclass(frozen=True)
class Entry:
    """A planned run and its folder."""

    planned: Planned
    folder: RunFolder

    @property
    def state(self) -> str:
        return FINISHED if self.folder.finished else UNFINISHED if self.folder.begun else TO_DO

    def describe(self) -> dict[str, Any]:
        """As the command's JSON shows it."""
        return {
            "rows": [{"table": row.table, "model": row.name} for row in self.planned.rows],
            "column": self.planned.column,
            "folder": str(self.folder.path),
            "state": self.state,
            "run": asdict(self.planned.run),
            "test_accuracy": self.folder.result()["test_accuracy"] if self.folder.finished else None,
        }


def entries(planned: Sequence[Planned], output: Path) -> list[Entry]:
    """The runs of a plan with their folders, each checked as far as it can be without data.

    Raises:
        InvalidInput: a run cannot be carried out.
    """
    for item in planned:
        check_run(item.run)
    return [Entry(item, RunFolder(output / run_name(item.run))) for item in planned]


def check_before_estimating(wanted: Sequence[Entry], output: Path, execution: Execution) -> None:
    """Refuse what the first training would refuse, before models are timed and hours announced.

    Raises:
        InvalidInput: a data set cannot be read, or runs cannot be kept in ``output``.
    """
    if output.exists() and not output.is_dir():
        raise InvalidInput(f"--output {output} is a file: give a folder to keep the runs in")
    first = {entry.planned.run.data: entry.planned.run for entry in reversed(wanted) if entry.state != FINISHED}
    for run in first.values():
        load_data(run, execution, torch.device("cpu"))


def costs(wanted: Sequence[Entry], execution: Execution) -> dict[Run, float]:
    """Seconds that are left of every run that is not finished, estimated from a few steps."""
    left = [entry for entry in wanted if entry.state != FINISHED]
    seconds = estimate([entry.planned.run for entry in left], execution)
    return {entry.planned.run: seconds[entry.planned.run] * (1 - share_done(entry)) for entry in left}


def share_done(entry: Entry) -> float:
    records = entry.folder.log()
    return records[-1]["epoch"] / entry.planned.run.epochs if records else 0.0


def announce(wanted: Sequence[Entry], scale: str, seconds: dict[Run, float]) -> None:
    """Say what the sweep will cost before it starts."""
    states = [entry.state for entry in wanted]
    print(f"{len(wanted)} runs at scale {scale}: {SCALES[scale].text}", flush=True)
    print(f"{states.count(FINISHED)} finished, {states.count(UNFINISHED)} begun, {states.count(TO_DO)} to do; ", end="")
    print(f"about {clock(sum(seconds.values()))} of training on this machine", flush=True)


def sweep(wanted: Sequence[Entry], execution: Execution, seconds: dict[Run, float]) -> dict[str, str]:
    """Train what is not finished, one run after the other.

    A run that another process trains is left to it, and one whose loss diverges does not stop the others.

    Args:
        seconds: of ``costs``; corrected by what runs really take.

    Returns:
        Folder -> why it has no result: in another process, or diverged.

    Raises:
        InvalidInput: data or folders cannot be used.
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    left, without = [entry for entry in wanted if entry.state != FINISHED], {}
    spent = estimated = 0.0
    for number, entry in enumerate(left):
        if entry.folder.finished:  # by another process, since the sweep began
            continue
        remaining = sum(seconds[later.planned.run] for later in left[number:] if later.state != FINISHED)
        place = f"run {len(wanted) - len(left) + number + 1} of {len(wanted)}"
        pace = spent / estimated if estimated else 1.0
        print(f"{place}, about {clock(pace * remaining)} left: {entry.planned.label}", flush=True)
        started = time.monotonic()
        try:
            with shown(units=False) as progress:
                train(entry.planned.run, entry.folder, execution, resume=True, progress=progress)
        except Busy:
            without[str(entry.folder.path)] = ELSEWHERE
            print("  left to the process that trains it", flush=True)
            continue
        except Diverged as error:
            without[str(entry.folder.path)] = DIVERGED
            print(f"  {error}", flush=True)
        except Interrupted as interruption:
            raise KeyboardInterrupt(f"{interruption}. Go on with the same command") from None
        spent, estimated = spent + time.monotonic() - started, estimated + seconds[entry.planned.run]
    return without


def reproduce(planned: Sequence[Planned], scale: str, output: Path, execution: Execution, dry_run: bool) -> dict[str, Any]:
    """Carry out a plan and show the paper's numbers beside those measured.

    Returns:
        ``scale`` and ``runs``: each with its rows, folder, state, description and, when finished, test accuracy in percent.

    Raises:
        InvalidInput, KeyboardInterrupt: see ``sweep``.
    """
    wanted = entries(planned, output)
    if dry_run:
        for entry in wanted:
            print(f"{entry.planned.label}: {entry.state}, {entry.folder.path}")
        print(f"{len(wanted)} runs at scale {scale}; nothing was trained", flush=True)
        return {"scale": scale, "runs": [entry.describe() for entry in wanted]}
    check_before_estimating(wanted, output, execution)
    seconds = costs(wanted, execution)
    announce(wanted, scale, seconds)
    without = sweep(wanted, execution, seconds)
    runs = [entry.describe() for entry in wanted]
    for run in runs:
        run["state"] = without.get(run["folder"], run["state"]) if run["state"] != FINISHED else FINISHED
    show(wanted, scale)
    for state, folders in group(without).items():
        print(f"{state}: {', '.join(folders)}", flush=True)
    return {"scale": scale, "runs": runs}


def group(without: dict[str, str]) -> dict[str, list[str]]:
    states: dict[str, list[str]] = {}
    for folder, state in without.items():
        states.setdefault(state, []).append(folder)
    return states


def show(wanted: Sequence[Entry], scale: str) -> None:
    """Print the rows: test accuracy of the last epoch in percent, mean ± deviation over seeds, beside the paper's."""
    columns = list(dict.fromkeys(entry.planned.column for entry in wanted))
    table = Table(title=f"test accuracy, %: the paper's at its own scale, measured at scale {scale}")
    for heading in ("row", "hierarchy", *(f"paper, {name}" for name in columns), *(f"{scale}, {name}" for name in columns)):
        table.add_column(heading, justify="left" if heading in ("row", "hierarchy") else "right")
    accuracies: dict[tuple[Row, str], list[float]] = {}
    for entry in wanted:
        for row in entry.planned.rows:
            found = accuracies.setdefault((row, entry.planned.column), [])
            if entry.folder.finished:
                found.append(entry.folder.result()["test_accuracy"])
    for row in sorted(dict.fromkeys(row for row, _ in accuracies), key=ROWS.index):
        published = [f"{row.accuracy(column):.2f}" for column in columns]
        table.add_row(
            row.label, format_hierarchy(row.hierarchy), *published, *(in_words(accuracies[row, column]) for column in columns)
        )
    Console(width=None if Console().is_terminal else 240).print(table)


def in_words(accuracies: Sequence[float]) -> str:
    """Mean ± deviation over seeds; a dash for nothing."""
    if not accuracies:
        return "–"
    return f"{mean(accuracies):.2f}" + (f" ± {stdev(accuracies):.2f} ({len(accuracies)})" if len(accuracies) > 1 else "")
