"""The simultaneous rule: every unit learns from every batch.

With one unit it is global backpropagation.
"""

from collections.abc import Iterator

from layerwise.core.learner import Learner
from layerwise.rules.base import START, Position, Schedule, Tick, set_rates, tick_after
from layerwise.rules.feature_cache import Batches


def simultaneous(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
) -> Iterator[Tick]:
    """Every unit learns from every batch."""
    for epoch in range(start.epoch, epochs):
        learner.train()
        set_rates(learner.units, schedule(epoch / epochs))
        first = start.batch if epoch == start.epoch else 0
        for number, (images, labels) in enumerate(batches.batches(epoch, first), start=first + 1):
            result = learner.step(images, labels)
            yield tick_after(epoch, number, len(batches), 0, result, epochs)


def backpropagation(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
) -> Iterator[Tick]:
    """Global backpropagation: the chain with one unit."""
    return simultaneous(learner, batches, epochs, schedule, start)
