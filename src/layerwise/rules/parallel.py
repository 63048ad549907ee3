"""The parallel rule: units on different ranks, each learning from every batch as it arrives."""

from collections.abc import Iterator
from dataclasses import replace

from layerwise.core.learner import Learner
from layerwise.core.result import StepResult
from layerwise.distributed import gathered, world
from layerwise.errors import check_flags, check_least
from layerwise.rules.base import START, Position, Schedule, Tick, set_rates, tick_after
from layerwise.rules.feature_cache import Batches
from layerwise.rules.simultaneous import every_batch, joined


def parallel(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
    *,
    micro_batches: int = 1,
    bfloat16_features: bool = False,
) -> Iterator[Tick]:
    """Units on different ranks work at the same time; to the bit as ``simultaneous``.

    The ranks are those that torchrun started. In a process of its own all units are on the one
    rank, which is the rule ``simultaneous``.

    Args:
        bfloat16_features: let features of float32 travel between ranks as bfloat16: half the bytes,
            other bits.
        micro_batches: number of parts that a batch is computed in, one after the other, before its
            one update: it takes less memory. Batch normalisation and similarities are of a part.

    Raises:
        InvalidInput: ``micro_batches`` is below 1, or the learner has windows.
    """
    check_flags(bfloat16_features=bfloat16_features)
    learner.refuse_windows("parallel")
    check_least(1, micro_batches=micro_batches)
    return ticks_of_rank(learner, batches, epochs, schedule, start, micro_batches)


def ticks_of_rank(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position,
    micro_batches: int,
) -> Iterator[Tick]:
    """The ticks of one rank; the rule refuses first and then returns this generator."""
    stage, stopping = learner.stage, world().stopping
    if stage is None or stage.before is None:
        ticks = every_batch(learner, batches, epochs, schedule, start, micro_batches)
    else:
        ticks = arriving(learner, len(batches), epochs, schedule, start)
    if stage is None:
        yield from ticks
        return
    for tick in ticks:
        if tick.ends_epoch:  # the clock of the first rank counts until the last is done
            stage.pause()
            stopping.agreed |= any(gathered(stopping.asked))
        stops = tick.ends_epoch or stopping.agreed
        yield replace(tick, resumable=stops, kept_bytes=stage.kept_bytes)


def arriving(
    learner: Learner, count: int, epochs: int, schedule: Schedule, start: Position
) -> Iterator[Tick]:
    """The ticks of a rank behind the first, whose batches come from the rank before."""
    for epoch in range(start.epoch, epochs):
        learner.train()
        set_rates(learner.units, schedule(epoch / epochs))
        learner.set_progress(epoch / epochs)
        first = start.batch if epoch == start.epoch else 0
        for number in range(first + 1, count + 1):
            yield tick_after(epoch, number, count, 0, joined(whole_batch(learner)), epochs)


def whole_batch(learner: Learner) -> list[StepResult]:
    """The results of all parts of a batch."""
    results: list[StepResult] = []
    while not results or not learner.stage.updates:
        results.append(learner.step_arriving())
    return results
