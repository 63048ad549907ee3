"""Costs of a run's step as they are counted and timed before anything is trained."""

import gc
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from layerwise.core.memory_format import set_memory_format
from layerwise.core.table import count
from layerwise.profiling.measure import TIMED, TIMED_RECORDED
from layerwise.profiling.predict import peak_of, predict_steps
from layerwise.profiling.trial_steps import rule_ticks, trial_options
from layerwise.runs.run import Execution, Run
from layerwise.training.device import apply_execution
from layerwise.training.prepare import prepare
from layerwise.training.recorded_steps import choose_steps, memory_limit, record_steps
from layerwise.utils.device import synchronise


@dataclass(frozen=True)
class StepCosts:
    """Costs of a step of every unit on a batch, of which nothing was computed.

    Attributes:
        units: number of units.
        turns: number of groups of units that learn one after the other, each from every batch: 1,
            or by a sequential rule as many as units.
        multiply_adds: of all forward and backward passes, heads included.
        parameters: of the network.
        head_parameters: of the local losses.
        predicted_peak_bytes: most memory at once, counted whole, on a CPU.
    """

    units: int
    turns: int
    multiply_adds: int
    parameters: int
    head_parameters: int
    predicted_peak_bytes: int


def step_costs(run: Run, execution: Execution) -> StepCosts:
    """Count the costs of a run's step, for images of its data set's format.

    Raises:
        InvalidInput, CannotSplit: the run cannot be carried out: its loss cannot be built for a
            unit, its chain has no such span …
    """
    prepared = prepare(run, replace(execution, device="cpu"))
    learner = prepared.make_learner(prepared.dataset.expected(run.image_size))
    options, memory_format = step_options(run, execution), execution.memory_format
    steps = predict_steps(run.rule, learner, run.batch_size, options, memory_format)
    return StepCosts(
        units=len(learner.units),
        turns=len(steps),
        multiply_adds=sum(sum(step.multiply_adds.values()) for step in steps),
        parameters=count(learner.model),
        head_parameters=sum(count(unit.loss) for unit in learner.units),
        predicted_peak_bytes=peak_of(steps),
    )


def step_options(run: Run, execution: Execution) -> dict[str, Any]:
    """Options of a run's rule for trial steps, with the limit of memory that its training has."""
    return {**trial_options(run), **memory_limit(run, execution)}


def seconds_of_step(run: Run, execution: Execution) -> float:
    """Time a step of every unit on a batch of random images, on the device that the run uses.

    Returns:
        Seconds: the median of a few steps, the first left out; summed over groups of units that
        learn one after the other.
    """
    prepared = prepare(run, execution)
    apply_execution(prepared.device, execution)
    learner = prepared.make_learner(prepared.dataset.expected(run.image_size))
    set_memory_format(learner, execution.memory_format)
    record_steps(learner, execution)
    epochs = TIMED if learner.captured is None else TIMED_RECORDED
    ticks = rule_ticks(run.rule, learner, run.batch_size, epochs, step_options(run, execution))
    choose_steps(learner, run, execution)
    seconds: dict[int, list[float]] = defaultdict(list)
    while True:
        synchronise(prepared.device)
        began = time.perf_counter()
        if (tick := next(ticks, None)) is None:
            break
        synchronise(prepared.device)
        seconds[tick.first].append(time.perf_counter() - began)
    del learner, ticks, tick
    gc.collect()  # heads can take gigabytes
    return sum(median(times[1:]) for times in seconds.values())
