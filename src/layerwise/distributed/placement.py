"""Placement: which units live on which rank, and how many bytes each rank needs."""

import copy
import time
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from layerwise.core.cuts import balance
from layerwise.core.learner import Learner
from layerwise.core.unit import Activations, Unit
from layerwise.errors import InvalidInput
from layerwise.losses import Targets
from layerwise.memory.per_unit import UnitBytes
from layerwise.utils.device import device_of, synchronise

REPETITIONS = 2  # of a unit's step that are timed, after a first that is not


def check_room(units: int, size: int) -> None:
    """Refuse more ranks than units.

    Raises:
        InvalidInput: as said.
    """
    if size > units:
        raise InvalidInput(
            f"Cannot place {units} units on {size} ranks: a rank would have none. Start at most "
            f"{units}, or cut the network into more units with --at."
        )


def parsed_ranks(text: str, units: int, size: int) -> list[range]:
    """Units of each rank, of the numbers of units that ``--ranks`` gives, such as ``5,4``.

    Raises:
        InvalidInput: they are no numbers, or do not fit the chain or the ranks.
    """
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if len(counts) != size or sum(counts) != units or 0 in counts:
        raise InvalidInput(
            f"Cannot use ranks {text!r}: there are {units} units and {size} ranks. Give {size} "
            f"numbers of units, each 1 or more, that add up to {units}, joined by commas."
        )
    return ranges([*accumulate(counts)])


def balanced_ranks(seconds: Sequence[float], size: int) -> list[range]:
    """Units of each rank so that the slowest rank is as fast as possible."""
    lasts = balance(seconds, size)
    return ranges([*(last + 1 for last in lasts), len(seconds)])


def ranges(ends: Sequence[int]) -> list[range]:
    return [range(*pair) for pair in pairwise([0, *ends])]


def unit_seconds(learner: Learner, batch_size: int) -> list[float]:
    """Seconds of a step of each unit, measured on a copy of it; the learner stays as it is."""
    device = device_of(learner.model)
    labels = torch.arange(batch_size, device=device) % learner.num_classes
    seconds = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        images = torch.randn(batch_size, *learner.image_shape, device=device)
        targets = Targets(labels, learner.num_classes, images.to(learner.image_type))
        activations: Activations = (targets.images,)
        for unit in learner.units:
            copied = copy.deepcopy(unit)
            copied.train()
            seconds.append(min(timed(copied, activations, targets) for _ in range(REPETITIONS)))
            activations, _ = copied.step(activations, targets, 0)
    return seconds


def timed(unit: Unit, activations: Activations, targets: Targets) -> float:
    """Seconds of a unit's step, made on maps of its own, since a unit may change its input."""
    own = tuple(value.clone() if isinstance(value, Tensor) else value for value in activations)
    synchronise(targets.labels.device)
    begin = time.perf_counter()
    unit.step(own, targets, 0)
    synchronise(targets.labels.device)
    return time.perf_counter() - begin


def rank_bytes(needs: Sequence[UnitBytes], placement: Sequence[range], depth: int) -> list[int]:
    """Predicted peak of each rank: its units, the largest of their steps, features on their way.

    Args:
        depth: batches that a rank may be ahead of the next one.
    """
    peaks = []
    for units in placement:
        # the batch at hand is in its unit's step
        arriving = needs[units.start - 1].passed if units.start else 0
        leaving = depth * needs[units.stop - 1].passed if units.stop < len(needs) else 0
        own = [needs[index] for index in units]
        persistent, step = sum(need.persistent for need in own), max(need.step for need in own)
        peaks.append(persistent + step + arriving + leaving)
    return peaks
