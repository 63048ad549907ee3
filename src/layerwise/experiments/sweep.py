"""A sweep: several runs, in turn here or at once on workers of an engine.

A finished run is skipped, an interrupted one goes on.
"""

import time
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from layerwise.errors import Busy, Diverged, InvalidInput
from layerwise.experiments.engines import Engine
from layerwise.experiments.entry import Entry, train_entry
from layerwise.experiments.states import DIVERGED, ELSEWHERE, FAILED, FINISHED
from layerwise.runs.run import Run
from layerwise.training.progress import clock


def sweep(
    wanted: Sequence[Entry],
    estimates: Mapping[Run, float] | None = None,
    strict: bool = False,
    engine: Engine | None = None,
) -> dict[str, str]:
    """Train what is not finished.

    Args:
        estimates: seconds of each run that is not finished; corrected by what runs really take.
        strict: stop at a run that another process trains, or whose loss diverges; else both are
            left out, and the others trained.
        engine: whose workers train; None: this process, one run after the other.

    Returns:
        Folder -> why it has no result: in another process, or diverged.

    Raises:
        InvalidInput: data or folders cannot be used, or a run failed on a worker.
        Busy, Diverged: with ``strict``.
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    left = [entry for entry in wanted if entry.state != FINISHED]
    for entry in wanted:
        if entry.state == FINISHED:
            print(f"already finished: {entry.folder.path}", flush=True)
    if engine is None:
        return train_in_turn(left, len(wanted), estimates, strict)
    return train_on_workers(left, engine, strict) if left else {}


def train_in_turn(
    left: Sequence[Entry], number: int, estimates: Mapping[Run, float] | None, strict: bool
) -> dict[str, str]:
    """Train runs in this process; see ``sweep``.

    Args:
        number: of all runs of the sweep, finished ones among them.
    """
    without: dict[str, str] = {}
    spent: dict[Run, float] = {}
    for index, entry in enumerate(left):
        if entry.folder.has_ended:  # by another process, since the sweep began
            continue
        remaining = seconds_left([later.run for later in left[index:]], spent, estimates)
        place = f"run {number - len(left) + index + 1} of {number}"
        about = f", about {clock(remaining)} left" if remaining is not None else ""
        print(f"{place}{about}: {entry.label}", flush=True)
        began = time.monotonic()
        try:
            train_entry(entry)
        except (Busy, Diverged) as error:
            if strict:
                raise
            without[str(entry.folder.path)] = ELSEWHERE if isinstance(error, Busy) else DIVERGED
            print(f"  {error}", flush=True)
        else:
            spent[entry.run] = time.monotonic() - began
    return without


def train_on_workers(left: Sequence[Entry], engine: Engine, strict: bool) -> dict[str, str]:
    """Train runs on an engine's workers, all that can be, before any is refused; see ``sweep``."""
    outcomes = engine.train(left)
    for outcome in outcomes:
        if outcome.state == FAILED or (strict and outcome.state != FINISHED):
            kind = {ELSEWHERE: Busy, DIVERGED: Diverged}.get(outcome.state, InvalidInput)
            raise kind(outcome.message)
        if outcome.state != FINISHED:
            print(f"  {outcome.message}", flush=True)
    return {
        str(entry.folder.path): outcome.state
        for entry, outcome in zip(left, outcomes, strict=True)
        if outcome.state != FINISHED
    }


def seconds_left(
    runs: Sequence[Run], spent: Mapping[Run, float], estimates: Mapping[Run, float] | None
) -> float | None:
    """Seconds that runs will take, by estimates and what others took; None: unknown."""
    if estimates is None:
        return mean(spent.values()) * len(runs) if spent else None
    estimated = sum(estimates[run] for run in spent)
    pace = sum(spent.values()) / estimated if estimated else 1.0
    return pace * sum(estimates[run] for run in runs)


def trained(wanted: Sequence[Entry], engine: Engine | None = None) -> list[dict[str, Any]]:
    """Train all runs of a sweep that are not finished, and return the results of all.

    Raises:
        InvalidInput, Busy, Diverged, KeyboardInterrupt: see ``sweep``.
    """
    sweep(wanted, strict=True, engine=engine)
    return [entry.folder.result() for entry in wanted]
