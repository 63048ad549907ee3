"""The memory of steps that a GPU records, and the number of streams that keeps to a limit.

On several streams units overlap: every feature stays until the step ends, and memory that one
stream has freed is not used by another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.core.learner import Learner
from layerwise.errors import InvalidInput
from layerwise.memory.cuda import libraries_bytes
from layerwise.memory.per_unit import predict_units
from layerwise.utils.device import device_kind
from layerwise.utils.sizes import format_size

MOST_STREAMS = 4  # more were not faster (docs/log.md)
ALLOWANCE = 1.1  # times the memory of one unit after the other, which overlapping may take


@dataclass(frozen=True)
class StepBytes:
    """The bytes of a step.

    Attributes:
        lasting: of what stays between steps.
        batch: of the images, which a recording has a copy of.
        units: per unit, the most alive in its turn beside what is lasting.
        passed: per unit, of what it hands to the next.
        libraries: of what libraries hold for each stream.
    """

    lasting: int
    batch: int
    units: Sequence[int]
    passed: Sequence[int]
    libraries: int = 0

    def singly(self) -> int:
        """Bytes of a step that is made operation by operation."""
        return self.lasting + max(self.units) + self.libraries

    def recorded(self, streams: int) -> int:
        """The most bytes of a recorded step on so many streams, which units take in turn.

        A unit's own feature counts once. What entered it counts with the features that stay and
        again in its turn, so this is a bound. The steps before a recording are made singly.
        """
        if streams == 1:
            return self.singly() + self.batch + self.libraries
        turns = [size - feature for size, feature in zip(self.units, self.passed, strict=True)]
        of_streams = sum(max(turns[first::streams]) for first in range(min(streams, len(turns))))
        libraries = (1 + streams) * self.libraries
        return self.lasting + self.batch + sum(self.passed) + of_streams + libraries


@dataclass(frozen=True)
class StepChoice:
    """How steps are made: recorded on a number of streams, or singly (0), in so many bytes."""

    streams: int
    predicted_bytes: int


def choose_streams(step: StepBytes, limit: int | None, most: int = MOST_STREAMS) -> StepChoice:
    """The most streams whose recorded step keeps to a limit; steps made singly where none does.

    Args:
        limit: bytes; None: ``ALLOWANCE`` times those of a recorded step on one stream.
        most: most streams.

    Raises:
        InvalidInput: not even a step made singly keeps to the limit.
    """
    allowed = int(ALLOWANCE * step.recorded(1)) if limit is None else limit
    for streams in range(min(most, len(step.units)), 0, -1):
        if step.recorded(streams) <= allowed:
            return StepChoice(streams, step.recorded(streams))
    if step.singly() > allowed:
        raise InvalidInput(
            f"Cannot keep to --memory {format_size(allowed)}: a step is predicted to need "
            f"{format_size(step.singly(), up=True)}. Give as much, or lower --batch-size."
        )
    return StepChoice(0, step.singly())


def step_bytes(learner: Learner, batch_size: int) -> StepBytes:
    """Predict the bytes of a learner's step on a batch, on its own device; it stays as it is."""
    units, weight = predict_units(learner, batch_size), next(learner.model.parameters())
    return StepBytes(
        lasting=sum(unit.persistent for unit in units),
        batch=batch_size * math.prod(learner.image_shape) * learner.image_type.itemsize,
        units=[unit.step for unit in units],
        passed=[unit.passed for unit in units],
        libraries=libraries_bytes(weight.device) if device_kind(weight) == "cuda" else 0,
    )
