"""``layerwise reproduce``: a sweep over the paper's rows, which several processes can share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from layerwise.experiments.engines import Engine
from layerwise.experiments.entry import Entry, entries
from layerwise.experiments.states import FINISHED, TO_DO, UNFINISHED
from layerwise.experiments.sweep import sweep
from layerwise.hierarchy import format_hierarchy
from layerwise.paper.rows import ROWS, SCALES, Planned, Row, match
from layerwise.profiling.estimate import estimate
from layerwise.runs.run import Execution, Run, described
from layerwise.training.progress import clock
from layerwise.utils import terminal
from layerwise.utils.words import counted, plus_minus


@dataclass(frozen=True)
class PlannedEntry:
    """A run of a sweep and the rows of the paper that it gives the number of."""

    planned: Planned
    entry: Entry

    def describe(self, state: str) -> dict[str, Any]:
        """As the command's JSON shows it."""
        folder = self.entry.folder
        return {
            "rows": [{"table": row.table, "model": row.name} for row in self.planned.rows],
            "column": self.planned.column,
            "folder": str(folder.path),
            "state": state,
            "run": described(self.planned.run),
            "test_accuracy": folder.result()["test_accuracy"] if folder.has_ended else None,
        }


def check_data(wanted: Sequence[Entry]) -> None:
    """Refuse what the first training would refuse, before models are timed and hours announced.

    Raises:
        InvalidInput: a data set cannot be read.
    """
    first = {entry.run.data: entry for entry in reversed(wanted) if entry.state != FINISHED}
    for entry in first.values():
        entry.prepared.load_data()


def costs(wanted: Sequence[Entry], execution: Execution) -> dict[Run, float]:
    """Seconds that are left of every run that is not finished, estimated from a few steps."""
    left = [entry for entry in wanted if entry.state != FINISHED]
    seconds = estimate([entry.run for entry in left], execution)
    return {entry.run: seconds[entry.run] * (1 - share_done(entry)) for entry in left}


def share_done(entry: Entry) -> float:
    records = entry.folder.log()
    return records[-1]["epoch"] / entry.run.epochs if records else 0.0


def departures(planned: Sequence[Planned]) -> str:
    """Words for how some runs differ from what their scale says; mostly empty."""
    texts = dict.fromkeys(text for item in planned for text in match(item.run).departures)
    return f"; but {'; '.join(texts)}" if texts else ""


def announce(wanted: Sequence[Entry], scale: str, apart: str, cost: str) -> None:
    """Say what the sweep will train, and the cost in words, before it starts.

    Args:
        apart: see ``departures``.
    """
    states = [entry.state for entry in wanted]
    runs = counted(len(wanted), "run")
    print(f"{runs} at scale {scale}: {SCALES[scale].text}{apart}", flush=True)
    print(
        f"{states.count(FINISHED)} finished, {states.count(UNFINISHED)} begun, "
        f"{states.count(TO_DO)} to do{cost}",
        flush=True,
    )


def reproduce(
    planned: Sequence[Planned],
    scale: str,
    output: Path,
    execution: Execution,
    dry_run: bool,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Carry out a plan and show the paper's numbers beside those measured.

    Args:
        engine: whose workers train the runs; None: this process, once their time is estimated.

    Returns:
        ``scale`` and ``runs``: each with its rows, folder, state, description and, when finished,
        test accuracy in percent.

    Raises:
        InvalidInput, KeyboardInterrupt: see ``sweep``.
    """
    runs, labels = [item.run for item in planned], [item.label for item in planned]
    wanted = entries(runs, output, execution, labels)
    apart = departures(planned)
    pairs = [PlannedEntry(*pair) for pair in zip(planned, wanted, strict=True)]
    if dry_run:
        for entry in wanted:
            print(f"{entry.label}: {entry.state}, {entry.folder.path}")
        runs_in_words = f"{counted(len(wanted), 'run')} at scale {scale}{apart}"
        print(f"{runs_in_words}; nothing was trained", flush=True)
        return {"scale": scale, "runs": [pair.describe(pair.entry.state) for pair in pairs]}
    seconds = None
    if engine is None:  # workers have other data folders and another speed
        check_data(wanted)
        seconds = costs(wanted, execution)
    announce(wanted, scale, apart, cost_in_words(seconds))
    without = sweep(wanted, seconds, engine=engine)
    print_table(pairs, scale, apart)
    for state, folders in folders_by_state(without).items():
        print(f"{state}: {', '.join(folders)}", flush=True)
    states = [without.get(str(entry.folder.path), entry.state) for entry in wanted]
    return {
        "scale": scale,
        "runs": [pair.describe(state) for pair, state in zip(pairs, states, strict=True)],
    }


def cost_in_words(seconds: dict[Run, float] | None) -> str:
    if seconds is None:
        return ""
    return f"; about {clock(sum(seconds.values()))} of training on this machine"


def folders_by_state(without: dict[str, str]) -> dict[str, list[str]]:
    states: dict[str, list[str]] = {}
    for folder, state in without.items():
        states.setdefault(state, []).append(folder)
    return states


def print_table(wanted: Sequence[PlannedEntry], scale: str, apart: str) -> None:
    """Print test accuracy after the last epoch, in percent, beside the paper's.

    It is the mean ± deviation over seeds.

    Args:
        apart: see ``departures``.
    """
    columns = list(dict.fromkeys(entry.planned.column for entry in wanted))
    table = Table(
        title=f"test accuracy, %: the paper's at its own scale, measured at scale {scale}{apart}"
    )
    for heading in (
        "row",
        "hierarchy",
        *(f"paper, {name}" for name in columns),
        *(f"{scale}, {name}" for name in columns),
    ):
        table.add_column(heading, justify="left" if heading in ("row", "hierarchy") else "right")
    accuracies: dict[tuple[Row, str], list[float]] = {}
    for entry in wanted:
        for row in entry.planned.rows:
            measured = accuracies.setdefault((row, entry.planned.column), [])
            if entry.entry.folder.has_ended:
                measured.append(entry.entry.folder.result()["test_accuracy"])
    for row in sorted(dict.fromkeys(row for row, _ in accuracies), key=ROWS.index):
        published = [f"{row.accuracy(column):.2f}" for column in columns]
        table.add_row(
            row.label,
            format_hierarchy(row.hierarchy),
            *published,
            *(mean_text(accuracies[row, column]) for column in columns),
        )
    terminal.print_table(table)


def mean_text(accuracies: Sequence[float]) -> str:
    """Mean ± deviation over seeds; a dash for nothing."""
    if not accuracies:
        return "–"
    if len(accuracies) == 1:
        return f"{accuracies[0]:.2f}"
    return f"{mean(accuracies):.2f}{plus_minus(stdev(accuracies))} ({len(accuracies)})"
