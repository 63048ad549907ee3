"""Estimates of a sweep's time: a few steps are timed, the rest is multiplication."""

import gc
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from layerwise.core.memory_format import set_memory_format
from layerwise.core.unit import precision
from layerwise.data import DATASETS
from layerwise.profiling.measure import TIMED, TIMED_RECORDED
from layerwise.profiling.trial_steps import rule_ticks, trial_options
from layerwise.runs.run import Execution, Run
from layerwise.training.device import apply_execution
from layerwise.training.networks import build_network
from layerwise.training.prepare import prepare
from layerwise.training.recorded_steps import choose_steps, record_steps
from layerwise.utils.device import synchronise
from layerwise.utils.multiply_adds import MultiplyAdds

UNCOUNTED = (50_000, 10_000)  # training and test images, where the table does not say how many
ENOUGH = 5.0  # seconds: a step that takes longer is not repeated


@dataclass(frozen=True)
class Pace:
    """Seconds per image.

    Attributes:
        step: of learning; forward: of evaluating.
        work: multiply-adds of the network's forward pass on an image, by which both scale to other
            hierarchies.
    """

    step: float
    forward: float
    work: float


def estimate(runs: Iterable[Run], execution: Execution) -> dict[Run, float]:
    """Seconds that each run will take from its start to its end.

    Of runs that differ in hierarchy, data and schedule only, one is timed, and the others by their
    network's multiply-adds.

    Raises:
        InvalidInput: a run cannot be carried out as described.
    """
    paces: dict[tuple[object, ...], Pace] = {}
    works: dict[tuple[object, ...], float] = {}
    seconds = {}
    for run in runs:
        losses = (run.loss, run.loss_from)
        local = (run.rule, run.rule_options, losses, run.loss_options, run.at, run.output_layer)
        kind = (run.model, *local, run.width, run.image_size, run.batch_size, run.amp)
        design = (run.hierarchy, run.downsample_after, run.model_options)
        shape = (run.model, run.data, run.width, run.image_size, *design)
        if shape not in works:
            works[shape] = forward_work(run)
        if kind not in paces:
            paces[kind] = time_steps(run, execution, works[shape])
        seconds[run] = total(run, execution, paces[kind], works[shape])
    return seconds


def total(run: Run, execution: Execution, pace: Pace, work: float) -> float:
    """Seconds of a run's epochs.

    An epoch is a step for every training image, and a forward pass for every held-out and test
    image.
    """
    training, test = DATASETS[run.data].images or UNCOUNTED
    held_out = round(training * run.val_fraction)
    images = min(run.train_images or training, training - held_out)
    per_epoch = images * pace.step + (held_out + test) * pace.forward / execution.eval_every
    return run.epochs * per_epoch * work / pace.work


def forward_work(run: Run) -> float:
    """Multiply-adds of the network's forward pass on one image; nothing is computed for it."""
    images = DATASETS[run.data].expected(run.image_size)
    with torch.device("meta"), MultiplyAdds() as counter, torch.no_grad():
        model = build_network(run, images)
        model.eval()(torch.empty(1, images.channels, images.image_size, images.image_size))
    return counter.total


def time_steps(run: Run, execution: Execution, work: float) -> Pace:
    """Time a few steps and a forward pass, on random images."""
    prepared = prepare(run, execution)
    device = prepared.device
    apply_execution(device, execution)
    learner = prepared.make_learner(DATASETS[run.data].expected(run.image_size))
    set_memory_format(learner, execution.memory_format)
    record_steps(learner, execution)
    epochs = TIMED if learner.captured is None else TIMED_RECORDED
    ticks = rule_ticks(run.rule, learner, run.batch_size, epochs, trial_options(run))
    choose_steps(learner, run, execution)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 2 * epochs and seconds[-1] < ENOUGH):
        started = time.perf_counter()
        next(ticks)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    images = torch.rand(run.batch_size, *learner.image_shape, device=device)
    learner.model.eval()
    started = time.perf_counter()
    with torch.no_grad(), precision((images,), prepared.amp):
        learner.model(images)
    synchronise(device)
    forward = time.perf_counter() - started
    del learner, ticks
    gc.collect()  # heads can take gigabytes
    # the first step also loads libraries and makes kernels
    return Pace(median(seconds[1:]) / run.batch_size, forward / run.batch_size, work)
