"""The growing rule: groups of units, whose number grows; global first, and local after.

Inside a group of neighbouring units, the loss of the last reaches all of them, so they learn as one
unit would. The heads of the others learn alone on their features: they are ready when a border
comes to lie behind their unit, and their accuracies are known. One group is global backpropagation
of the network, as many groups as units are local learning.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerwise.core.learner import Learner
from layerwise.core.reach import Reach, check_reach, local_reach
from layerwise.core.unit import Unit
from layerwise.errors import InvalidInput, check_least
from layerwise.rules.base import START, Position, Schedule, Tick, neighbours
from layerwise.rules.feature_cache import Batches
from layerwise.rules.simultaneous import every_batch

ROUNDING = 1e-9  # of shares of training


@dataclass(frozen=True)
class Growth:
    """Number of groups over training.

    Attributes:
        first, last: numbers that it begins and ends with.
        begins: share of training, 0 to 1, after which it grows.
        lasts: share over which it grows.
    """

    first: int
    last: int
    begins: float
    lasts: float

    def groups(self, done: float) -> int:
        """The number of groups when a share of training is done.

        Every number between the first and the last has an equal part of the growth.
        """
        if self.first == self.last or done < self.begins - ROUNDING:
            return self.first
        if done >= self.begins + self.lasts - ROUNDING:
            return self.last
        grown = (done - self.begins) / self.lasts
        steps = self.last - self.first - 1  # between them
        return self.first + 1 + math.floor(steps * grown + ROUNDING)

    def check(self, units: int) -> None:
        """Refuse numbers of groups that the chain does not have, and shares that are none.

        Raises:
            InvalidInput: as said.
        """
        for name, number in (("groups_first", self.first), ("groups_last", self.last)):
            if not 1 <= number <= units:
                raise InvalidInput(
                    f"Cannot use {name} {number}: the chain has {units} units. Give 1 to {units}."
                )
        if self.last < self.first:
            raise InvalidInput(
                f"Cannot use groups_last {self.last}: it is below groups_first, {self.first}, and "
                f"groups only grow in number. Give {self.first} to {units}."
            )
        if not (self.begins >= 0 and self.lasts >= 0 and self.begins + self.lasts <= 1 + ROUNDING):
            raise InvalidInput(
                f"Cannot use global_share {self.begins:g} with growth {self.lasts:g}: they are not "
                "shares of training. Give numbers from 0, with a sum of at most 1."
            )


def growing(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
    *,
    groups_first: int = 1,
    groups_last: int | None = None,
    global_share: float = 0.5,
    growth: float = 0.25,
    micro_batches: int = 1,
) -> Iterator[Tick]:
    """Groups of units learn as one each, and their number grows: global first, local after.

    Groups have equal numbers of units, to one. Their number is the same throughout an epoch.

    Args:
        groups_first: number of groups at the beginning; 1: global training, with heads that read
            along.
        groups_last: number of groups at the end; by default one for each unit.
        global_share: share of the epochs with the first number of groups.
        growth: share of the epochs over which their number then grows; 0: at once.
        micro_batches: number of parts that a batch is computed in, one after the other, before its
            one update: it takes less memory. Batch normalisation and similarities are of a part.

    Raises:
        InvalidInput: the chain has no such number of groups, a share is none, or the learner has
            windows.
    """
    learner.refuse_windows("growing")
    learner.step_singly()
    check_least(1, micro_batches=micro_batches)
    count = len(learner.units)
    last = count if groups_last is None else groups_last
    numbers = Growth(groups_first, last, global_share, growth)
    numbers.check(count)
    check_reach(reach_of_groups(learner.units, groups_first), learner.units)

    def regroup(epoch: int) -> None:
        groups = numbers.groups(epoch / epochs)
        learner.reach = reach_of_groups(learner.units, groups)

    ticks = every_batch(learner, batches, epochs, schedule, start, micro_batches, regroup)
    return ungrouped_after(learner, ticks)


def reach_of_groups(units: Sequence[Unit], count: int) -> Reach:
    """The first unit that each unit's loss reaches, in so many groups."""
    reach = [unit.index + 1 for unit in units]
    for group in neighbours(units, count):
        reach[group[-1].index] = group[0].index
    return tuple(reach)


def ungrouped_after(learner: Learner, ticks: Iterator[Tick]) -> Iterator[Tick]:
    """Let the units of a learner learn alone again when a rule's ticks end."""
    try:
        yield from ticks
    finally:
        learner.reach = local_reach(len(learner.units))
