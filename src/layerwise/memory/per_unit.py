"""Bytes of each unit in a step, predicted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.memory.accounting import bytes_of, phases, unit_bytes
from layerwise.memory.fake_step import Footprint, blank_batch, pretended


@dataclass(frozen=True)
class UnitBytes:
    """Predicted bytes of a unit.

    Attributes:
        persistent: weights, buffers, head, gradients and optimizer state.
        step: the most that its step has alive besides, with what comes from other units.
        passed: what it passes to the next unit; 0 of the last.
    """

    persistent: int
    step: int
    passed: int


def predict_units(learner: Learner, batch_size: int) -> list[UnitBytes]:
    """The bytes of each unit, predicted without computing anything; the learner stays as it is."""
    with pretended(learner) as copied, Footprint(copied) as footprint:
        copied.step_singly()
        copied.train()
        copied.step(*blank_batch(copied, 2))  # the first, which makes the optimizers' state
        footprint.restart(copied)
        batch = blank_batch(copied, batch_size)
        with phases(copied, footprint.mark), passed_bytes(copied) as passed:
            copied.step(*batch)
        peaks = footprint.timeline.unit_peaks()
        return [
            UnitBytes(unit_bytes(unit), peaks[unit.index], passed[unit.index])
            for unit in copied.units
        ]


@contextmanager
def passed_bytes(learner: Learner) -> Iterator[dict[int, int]]:
    """Bytes of what each unit passes to the next, filled in by steps."""
    passed = {unit.index: 0 for unit in learner.units}
    handles = []
    for unit in learner.units[:-1]:

        def note(module: Any, given: Any, result: Any, index: int = unit.index) -> None:
            passed[index] = bytes_of([value for value in result if isinstance(value, Tensor)])

        handles.append(unit.piece.register_forward_hook(note))
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()
