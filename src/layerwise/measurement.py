"""What training rules need, measured: each in a process of its own, whose peak is then the rule's alone.

``python -m layerwise.measurement`` reads what to measure as JSON from stdin and prints what it found as JSON.
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

from layerwise.build import prepare_device
from layerwise.captured import capture
from layerwise.errors import InvalidInput
from layerwise.memory import measured, persistent_bytes, phases, profiler_mark
from layerwise.memory_format import set_memory_format
from layerwise.rehearsal import build, options_of, rule_ticks
from layerwise.rules import RULES
from layerwise.runs import Execution, Run
from layerwise.utils.device import device_of, synchronise

TIMED = 2  # epochs of two steps; the first step of a unit is not counted
TIMED_RECORDED = 6  # of steps that a GPU records, which the first few are not: their median is that of replays


def measure(run: Run, num_classes: int, execution: Execution) -> dict[str, Any]:
    """Measure a rule in a fresh process.

    Returns:
        ``steps``, one of the units that learn together: ``units``, ``seconds`` (median), ``unit_seconds`` (of each unit; of
        units that learn together only on a CPU, where nothing overlaps), ``peak_bytes`` (counted whole), ``unit_peaks``,
        ``points`` and ``marks`` of the timeline (see ``memory.Timeline``); ``process_peak_bytes``, the most that the process
        had resident while training, with Python and PyTorch themselves.

    Raises:
        InvalidInput: there is not enough memory.
    """
    order = {"run": asdict(run), "num_classes": num_classes, "execution": asdict(execution)}
    done = subprocess.run(
        [sys.executable, "-m", "layerwise.measurement"], input=json.dumps(order), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise InvalidInput(
            f"the rule {run.rule!r} could not be measured with a batch of {run.batch_size} "
            f"({lines[-1][:200] if lines else 'it was killed, as happens when memory runs out'}): lower --batch-size, or give "
            "--predict, which computes nothing"
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_here(run: Run, num_classes: int, execution: Execution) -> dict[str, Any]:
    device = prepare_device(execution)
    learner, options = build(run, num_classes, device), options_of(run)
    set_memory_format(learner, execution.memory_format)
    recorded = RULES[run.rule].one_step and bool(capture(learner, execution))
    seconds: dict[int, list[float]] = defaultdict(list)
    unit_seconds: dict[int, list[float]] = defaultdict(list)
    ticks = rule_ticks(run.rule, learner, run.batch_size, TIMED_RECORDED if recorded else TIMED, options)
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
                "unit_seconds": {unit: median(unit_seconds[unit][1:]) for unit in units if unit in unit_seconds},
                "peak_bytes": persistent + peak.transient_bytes,
                "unit_peaks": {unit: persistent + size for unit, size in timeline.unit_peaks().items()},
                "points": [(at, persistent + size) for at, size in timeline.points],
                "marks": timeline.marks,
            }
        )
    return {"steps": steps, "process_peak_bytes": process_peak}


def spans(marks: list[tuple[float, int]], ended: float) -> dict[int, float]:
    """Seconds of each unit's turns, from when phases of it began to when those of another did, or all had ended."""
    found: dict[int, float] = defaultdict(float)
    for (began, unit), (ends, _) in pairwise([*marks, (ended, -1)]):
        found[unit] += ends - began
    return dict(found)


def process_peak_bytes() -> int:
    """The most memory that this process has had resident."""
    try:
        with open("/proc/self/status") as lines:  # not ru_maxrss, which begins with that of the process that started this one
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = json.load(sys.stdin)
    found = measure_here(Run(**given["run"]), given["num_classes"], Execution(**given["execution"]))
    print(json.dumps(found))
