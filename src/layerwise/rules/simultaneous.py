"""The simultaneous rule: every unit learns from every batch.

With one unit it is global backpropagation.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.core.reach import reach_of_span
from layerwise.core.result import StepResult
from layerwise.errors import check_least
from layerwise.losses import Evaluated
from layerwise.rules.base import START, Position, Schedule, Tick, set_rates, tick_after
from layerwise.rules.feature_cache import Batches


def simultaneous(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
    *,
    micro_batches: int = 1,
    span: int | str = 1,
) -> Iterator[Tick]:
    """Every unit learns from every batch.

    Args:
        span: number of units that a loss reaches: with 2, a unit also learns from the next unit's
            loss; one number for each unit, such as 1,1,2; or 1,4=3, from unit 4 on 3. 1: the
            learner's own span.
        micro_batches: number of parts that a batch is computed in, one after the other, before its
            one update, to save memory. Batch normalisation and similarities are then of a part.

    Raises:
        InvalidInput: ``micro_batches`` is below 1, or the chain has no such ``span``.
    """
    reach = reach_of_span(span, len(learner.units))
    if span != 1 and reach != learner.reach:  # setting it ends recorded steps
        learner.reach = reach
    check_least(1, micro_batches=micro_batches)
    return every_batch(learner, batches, epochs, schedule, start, micro_batches)


def every_batch(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position,
    micro_batches: int,
    begin_epoch: Callable[[int], None] = lambda epoch: None,
) -> Iterator[Tick]:
    """The ticks of a rule by which every unit learns from every batch.

    The rule refuses first and then returns this generator.

    Args:
        begin_epoch: is called with the number of every epoch before its first step.
    """
    for epoch in range(start.epoch, epochs):
        learner.train()
        set_rates(learner.units, schedule(epoch / epochs))
        learner.set_progress(epoch / epochs)
        begin_epoch(epoch)
        first = start.batch if epoch == start.epoch else 0
        for number, (images, labels) in enumerate(batches.batches(epoch, first), start=first + 1):
            result = step_in_parts(learner, images, labels, micro_batches)
            yield tick_after(epoch, number, len(batches), 0, result, epochs)


def step_in_parts(learner: Learner, images: Tensor, labels: Tensor, count: int) -> StepResult:
    """One update of a batch that is computed in parts, each of 2 images or more."""
    size = len(labels)
    if count > 1 and learner.replicas is not None:
        size = learner.replicas.smallest(size)
    count = max(1, min(count, size // 2))
    parts = zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
    return joined(
        [learner.step(*part, update=number == count) for number, part in enumerate(parts, start=1)]
    )


def joined(results: Sequence[StepResult]) -> StepResult:
    """The result of a batch of its parts' results: mean losses, sums of correct examples."""
    if len(results) == 1:
        return results[0]
    size = sum(result.size for result in results)
    losses = torch.stack([result.loss_tensor() * (result.size / size) for result in results]).sum(0)
    correct = torch.stack([result.correct_tensor() for result in results]).sum(0)
    return StepResult([Evaluated(*pair) for pair in zip(losses, correct, strict=True)], size)


def backpropagation(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
    *,
    micro_batches: int = 1,
) -> Iterator[Tick]:
    """Global backpropagation: the chain with one unit.

    Args:
        micro_batches: number of parts that a batch is computed in, one after the other, before its
            one update: it takes less memory. Batch normalisation is of a part.
    """
    return simultaneous(learner, batches, epochs, schedule, start, micro_batches=micro_batches)
