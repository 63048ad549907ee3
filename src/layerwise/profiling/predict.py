"""Predicted cost of a training rule: memory, multiply-adds, saved tensors, unit by unit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerwise.core.learner import Learner
from layerwise.core.memory_format import FORMATS, memory_formats
from layerwise.core.table import count
from layerwise.memory.accounting import Timeline, persistent_bytes, phases
from layerwise.memory.fake_step import Footprint, SavedBytes, pretended
from layerwise.profiling.trial_steps import rule_ticks, trial_options
from layerwise.rules import RULES
from layerwise.runs.run import Execution, Run
from layerwise.training.device import find_device
from layerwise.utils.device import counting_for, device_of
from layerwise.utils.options import keyword_only

DEVICES = ("cpu", "cuda")  # kinds whose steps can be predicted
# images whose features a cache holds unless --train-images says otherwise: CIFAR-10
CACHED_IMAGES = 50_000
MOST = 2**20  # images in a batch; larger ones are not looked for


@dataclass
class PredictedStep:
    """A step of the units that learn together: of all, or of one by a sequential rule.

    Attributes:
        units: their indices.
        persistent_bytes: weights, buffers, heads and optimizer state, which stay between steps.
        timeline: what the step has alive besides.
        multiply_adds: per unit; forward, backward, and the forward pass of frozen units before it.
        saved_bytes: per unit, what is kept of forward passes when its loss is differentiated: its
            own, and in windows those of the units that the loss reaches.
        kept_bytes: per image, what the rule keeps between steps.
    """

    units: list[int]
    persistent_bytes: int
    timeline: Timeline
    multiply_adds: dict[int, int]
    saved_bytes: dict[int, int]
    kept_bytes: int

    def peaks(self) -> dict[int, int]:
        """The memory that each unit's turn needs, in bytes, counted whole."""
        return {
            unit: self.persistent_bytes + peak for unit, peak in self.timeline.unit_peaks().items()
        }


def peak_of(steps: Sequence[PredictedStep]) -> int:
    """The most bytes at once in any of some steps, counted whole."""
    return max(max(step.peaks().values()) for step in steps)


def predict_steps(
    rule: str,
    learner: Learner,
    batch_size: int,
    options: dict[str, Any],
    layout: str | None = None,
    device: str | None = None,
) -> list[PredictedStep]:
    """Predict a rule's steps.

    Of units that learn together the second step is predicted, since the first has no optimizer
    state yet.

    Args:
        options: of the rule.
        layout: the memory format, one of ``MEMORY_FORMATS``; None: as the learner has it. ``trial``
            is predicted as ``auto``.
        device: ``cpu`` or ``cuda``, whose operations and allocator are counted for a learner on a
            CPU; None: the learner's own.
    """
    with counting_for(device or device_of(learner.model).type):
        return predicted_steps(rule, learner, batch_size, options, layout)


def predicted_steps(
    rule: str, learner: Learner, batch_size: int, options: dict[str, Any], layout: str | None
) -> list[PredictedStep]:
    """``predict_steps`` for the device that operations are counted for."""
    steps = []
    formats = formats_of(learner, layout)
    with pretended(learner, formats) as copied:
        copied.steps = 0
        for unit, memory_format in zip(copied.units, formats or (), strict=False):
            unit.memory_format = memory_format
        # before anything is counted: a rule may try steps of its own
        ticks = rule_ticks(rule, copied, batch_size, 1, options)
        with Footprint(copied) as footprint:
            while tick := next(ticks, None):
                persistent = persistent_bytes(copied)
                footprint.restart(copied, tick.kept_bytes)
                with (
                    SavedBytes(copied) as saved,
                    phases(copied, footprint.mark),
                    phases(copied, saved.mark),
                ):
                    tick = next(ticks)
                units = list(range(tick.first, tick.first + len(tick.result.loss_tensor())))
                work = footprint.multiply_adds
                steps.append(
                    PredictedStep(
                        units,
                        persistent,
                        footprint.timeline,
                        {unit: work[unit] for unit in units}
                        if len(units) > 1
                        else {units[0]: sum(work.values())},
                        {unit: saved.reached(unit, copied.reach[unit]) for unit in units},
                        tick.kept_bytes // (2 * batch_size),
                    )
                )
                # what follows is of the next unit's first step
                footprint.restart(copied, tick.kept_bytes)
    return steps


def predicted_rule(
    run: Run, learner: Learner, layout: str, cache_limit: int, device: str
) -> dict[str, Any]:
    """A rule's predicted numbers, and None for those to be measured.

    Args:
        layout: the memory format; see ``predict_steps``.
        cache_limit: bytes of features that are kept at most.
        device: ``cpu`` or ``cuda``.
    """
    steps = predict_steps(run.rule, learner, run.batch_size, trial_options(run), layout, device)
    images = run.train_images or CACHED_IMAGES
    units: list[dict[str, Any]] = []
    for step in steps:
        peaks = step.peaks()
        for index in step.units:
            unit = learner.units[index]
            units.append(
                {
                    "index": index,
                    "name": unit.name,
                    "multiply_adds": step.multiply_adds[index],
                    "parameters": count(unit.piece),
                    "head_parameters": count(unit.loss),
                    "saved_bytes": step.saved_bytes[index],
                    "predicted_peak_bytes": peaks[index],
                    "peak_bytes": None,
                    "seconds": None,
                    "cache_bytes": min(step.kept_bytes * images, cache_limit),
                }
            )
    return {
        "multiply_adds": sum(unit["multiply_adds"] for unit in units),
        "parameters": count(learner.model),
        "head_parameters": sum(unit["head_parameters"] for unit in units),
        "saved_bytes": max(unit["saved_bytes"] for unit in units),
        "predicted_peak_bytes": max(unit["predicted_peak_bytes"] for unit in units),
        "peak_bytes": None,
        "process_peak_bytes": None,
        "seconds": None,
        "images_per_second": None,
        "peak_unit": max(units, key=lambda unit: unit["predicted_peak_bytes"])["name"],
        "cache_bytes": max(unit["cache_bytes"] for unit in units),
        "units": units,
    }


def predicted_device(execution: Execution) -> torch.device:
    """The device that steps are predicted for: a GPU that is named need not be there."""
    named = execution.device.partition(":")[0] == "cuda"
    return torch.device("cuda") if named else find_device(execution)


def formats_of(learner: Learner, layout: str | None) -> list[torch.memory_format] | None:
    """The memory format of each unit."""
    if layout is None:
        return None
    return [
        FORMATS[name] for name in memory_formats(learner, "auto" if layout == "trial" else layout)
    ]


def largest_batch(peak: Callable[[int], int], limit: int) -> int | None:
    """The largest batch whose peak is within a limit; None when not even 2 images fit.

    It has at most ``MOST`` images.

    Args:
        peak: bytes needed for a batch; it grows with it, about in proportion, so the next guess is
            on a straight line.
    """
    fitting, failing, need = 2, MOST + 1, peak(2)
    if need > limit:
        return None
    guess, guesses = 64, 1
    while failing - fitting > 1:
        peak_bytes = peak(guess)
        slope = max((peak_bytes - need) / (guess - fitting), 1e-9)
        if peak_bytes <= limit:
            fitting, need = guess, peak_bytes
        else:
            failing = guess
        guess = fitting + int((limit - need) / slope)
        if guesses % 4 == 0 and failing <= MOST:
            guess = (fitting + failing) // 2  # should the line mislead
        guess, guesses = min(max(guess, fitting + 1), failing - 1), guesses + 1
    return fitting


def rule_options(rule: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those options that the rule has."""
    return {
        name: value for name, value in options.items() if name in keyword_only(RULES[rule].order)
    }
