"""Predicted cost of a training rule: memory, multiply-adds, saved tensors, unit by unit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from layerwise.core.learner import Learner
from layerwise.core.memory_format import FORMATS, memory_formats
from layerwise.memory.accounting import Timeline, persistent_bytes, phases, unit_bytes
from layerwise.memory.fake_step import Footprint, SavedBytes, pretended
from layerwise.profiling.trial_steps import rule_ticks
from layerwise.rules import RULES
from layerwise.utils.device import counting_for, device_of
from layerwise.utils.options import keyword_only

DEVICES = ("cpu", "cuda")  # kinds whose steps can be predicted
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
        unit_bytes: per unit, its part of ``persistent_bytes``.
    """

    units: list[int]
    persistent_bytes: int
    timeline: Timeline
    multiply_adds: dict[int, int]
    saved_bytes: dict[int, int]
    kept_bytes: int
    unit_bytes: dict[int, int]

    def peaks(self) -> dict[int, int]:
        """The memory that each unit's turn needs, in bytes, counted whole."""
        return {
            unit: self.persistent_bytes + peak for unit, peak in self.timeline.unit_peaks().items()
        }


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
                        {unit: unit_bytes(copied.units[unit]) for unit in units},
                    )
                )
                # what follows is of the next unit's first step
                footprint.restart(copied, tick.kept_bytes)
    return steps


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
