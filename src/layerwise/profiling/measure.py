"""Measured cost of training rules.

Each rule is measured in a process of its own, whose peak of memory is then the rule's alone.

``python -m layerwise.profiling.measure`` reads what to measure as JSON from stdin and prints the
results as JSON.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from itertools import pairwise
from statistics import median
from typing import Any

from layerwise.core.memory_format import set_memory_format
from layerwise.data import ImageFormat
from layerwise.errors import InvalidInput
from layerwise.memory.accounting import measured, persistent_bytes, phases, profiler_mark
from layerwise.profiling.trial_steps import rule_ticks, trial_options
from layerwise.runs.folder import FORMATS
from layerwise.runs.formats import run_from
from layerwise.runs.run import Execution, Run, described
from layerwise.training.device import apply_execution
from layerwise.training.prepare import prepare
from layerwise.training.recorded_steps import choose_steps, record_steps
from layerwise.utils.device import device_of, synchronise
from layerwise.utils.plugins import IMPORTED, import_files

TIMED = 2  # epochs of two steps; the first step of a unit is not counted
# of steps that a GPU records, which the first few are not: their median is that of replays
TIMED_RECORDED = 6


def measure(run: Run, images: ImageFormat, execution: Execution) -> dict[str, Any]:
    """Measure a rule in a fresh process.

    Returns:
        ``steps``, one of the units that learn together: ``units``, ``seconds`` (median),
        ``unit_seconds`` (of each unit; of units that learn together only on a CPU, where nothing
        overlaps), ``peak_bytes`` (counted whole), ``unit_peaks``, ``points`` and ``marks`` of the
        timeline (see ``memory.Timeline``); ``process_peak_bytes``, the most that the process had
        resident while training, with Python and PyTorch themselves.

    Raises:
        InvalidInput: there is not enough memory.
    """
    order = {
        "run": described(run),
        "images": asdict(images),
        "execution": asdict(execution),
        "imports": list(IMPORTED),
    }
    done = subprocess.run(
        [sys.executable, "-m", "layerwise.profiling.measure"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = "it was killed, as when memory runs out"
        if done.returncode > 0 and (lines := done.stderr.strip().splitlines()):
            reason = lines[-1][:200].rstrip(".")
        raise InvalidInput(
            f"Cannot measure the rule {run.rule!r} with a batch of {run.batch_size}: {reason}. "
            "Lower --batch-size, or give --predict, which computes nothing."
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_here(run: Run, images: ImageFormat, execution: Execution) -> dict[str, Any]:
    prepared = prepare(run, execution)
    device = prepared.device
    apply_execution(device, execution)
    learner, options = prepared.make_learner(images), trial_options(run)
    set_memory_format(learner, execution.memory_format)
    record_steps(learner, execution)
    seconds: dict[int, list[float]] = defaultdict(list)
    unit_seconds: dict[int, list[float]] = defaultdict(list)
    epochs = TIMED if learner.captured is None else TIMED_RECORDED
    ticks = rule_ticks(run.rule, learner, run.batch_size, epochs, options)
    choose_steps(learner, run, execution)
    while True:
        marks: list[tuple[float, int]] = []

        def mark(unit: int, phase: str, marks: list[tuple[float, int]] = marks) -> None:
            marks.append((time.perf_counter(), unit))

        with phases(learner, mark):
            started = time.perf_counter()
            if (tick := next(ticks, None)) is None:
                break
            synchronise(device)
            ended = time.perf_counter()
        seconds[tick.first].append(ended - started)
        if len(tick.result.loss_tensor()) == 1:
            turns = {tick.first: ended - started}
        else:
            turns = spans(marks, ended) if device.type == "cpu" else {}
        for unit, spent in turns.items():
            unit_seconds[unit].append(spent)
    process_peak = process_peak_bytes()  # before the profiler, which needs memory itself
    steps = []
    learner.captured = None  # a replay allocates nothing: memory is that of steps made singly
    for optimizer in filter(None, (each.optimizer for each in learner.units)):
        optimizer.state.clear()  # a rule may hold that of one unit at a time
    ticks = rule_ticks(run.rule, learner, run.batch_size, 1, options)
    while next(ticks, None) is not None:
        persistent = persistent_bytes(learner)
        with measured(device_of(learner.model)) as peak, phases(learner, profiler_mark):
            tick = next(ticks)
        timeline = peak.timeline
        units = list(range(tick.first, tick.first + len(tick.result.loss_tensor())))
        steps.append(
            {
                "units": units,
                "seconds": median(seconds[tick.first][1:]),
                "unit_seconds": {
                    unit: median(unit_seconds[unit][1:]) for unit in units if unit in unit_seconds
                },
                "peak_bytes": persistent + peak.transient_bytes,
                "unit_peaks": {
                    unit: persistent + size for unit, size in timeline.unit_peaks().items()
                },
                "points": [(at, persistent + size) for at, size in timeline.points],
                "marks": timeline.marks,
            }
        )
    return {"steps": steps, "process_peak_bytes": process_peak}


def spans(marks: list[tuple[float, int]], ended: float) -> dict[int, float]:
    """Seconds of each unit's turns.

    A turn lasts from when a phase of the unit begins to when one of another unit does, or all end.
    """
    seconds: dict[int, float] = defaultdict(float)
    for (began, unit), (ends, _) in pairwise([*marks, (ended, -1)]):
        seconds[unit] += ends - began
    return dict(seconds)


def process_peak_bytes() -> int:
    """The most memory that this process has had resident."""
    try:
        # not ru_maxrss, which begins with that of the process that started this one
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    order = json.load(sys.stdin)
    import_files(order["imports"])
    described_run = run_from(order["run"], FORMATS[-1], "stdin")
    measured_steps = measure_here(
        described_run, ImageFormat(**order["images"]), Execution(**order["execution"])
    )
    print(json.dumps(measured_steps))
