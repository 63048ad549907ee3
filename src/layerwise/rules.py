"""Training rules: orders in which units take steps.

A rule is a generator: it draws batches, lets units step, and yields a tick after every batch, so that the training loop can
show, save and stop between any two. Rules know nothing of losses. Everything random depends on the seed and the position alone,
so a rule started at a position goes on exactly as one that came there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from layerwise.checkpointed import checkpointed_piece, with_piece
from layerwise.errors import InvalidInput
from layerwise.features import IN_MEMORY, Batches, CachedFeatures, Keeping, RecomputedFeatures, cached_features
from layerwise.learner import Learner
from layerwise.losses import Targets
from layerwise.pipeline import Pipeline
from layerwise.units import StepResult, Unit


@dataclass(frozen=True)
class Position:
    """A place in training: epochs finished, and batches finished in the present one."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class Tick:
    """One batch has been learned from.

    Attributes:
        after: the position to go on from.
        first: the unit that the first of ``result``'s entries belongs to.
        ends_epoch: whether this was the epoch's last batch.
        batches: batches in an epoch.
        epochs: how many epochs the rule will have made in the end.
        settled: whether all units have learned from the same batches, so that the state can be saved and gone on from.
        kept_bytes: memory that the rule itself keeps between batches.
    """

    after: Position
    first: int
    result: StepResult
    ends_epoch: bool
    batches: int
    epochs: int
    settled: bool = True
    kept_bytes: int = 0

    @property
    def ends_training(self) -> bool:
        return self.after.epoch == self.epochs


Schedule = Callable[[float], float]  # share of the training done, 0 to 1 -> factor of the learning rate


@dataclass(frozen=True)
class Rule:
    """An order of updates, and where the network is cut for it if the rule decides that.

    Attributes:
        order: the generator ``(learner, batches, epochs, schedule, start, **options) -> ticks``.
        at: a fixed cut: global backpropagation is the chain with one unit.
        one_thread: whether all work is done by the calling thread, whose memory can then be measured on a CPU.
        one_step: whether all units step together, by ``Learner.step``, which a GPU can record.
    """

    order: Callable[..., Iterator[Tick]]
    at: int | None = None
    one_thread: bool = True
    one_step: bool = True


def set_rates(units: list[Unit], factor: float) -> None:
    """Scale the learning rates that the optimizers were made with."""
    for unit in units:
        for group in unit.optimizer.param_groups if unit.optimizer else ():
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def simultaneous(
    learner: Learner, batches: Batches, epochs: int, schedule: Schedule, start: Position = Position()
) -> Iterator[Tick]:
    """Every unit learns from every batch."""
    for epoch in range(start.epoch, epochs):
        learner.train()
        set_rates(learner.units, schedule(epoch / epochs))
        first = start.batch if epoch == start.epoch else 0
        for number, (images, labels) in enumerate(batches.batches(epoch, first), start=first + 1):
            result = learner.step(images, labels)
            yield tick_after(epoch, number, len(batches), 0, result, epochs)


def checkpointed(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = Position(),
    *,
    segments: int | None = None,
) -> Iterator[Tick]:
    """Global backpropagation that keeps few features and computes the rest again: gradient checkpointing.

    Args:
        segments: how many stretches the network is cut into, of which only what enters them is kept; None: the number that
            needs the least memory.

    Raises:
        InvalidInput: there are not so many segments to be had, or the learner has more than one unit.
    """
    if len(learner.units) != 1:
        raise InvalidInput(f"the rule 'checkpointed' trains a network as one unit, not as {len(learner.units)}: localize at=1")
    piece = checkpointed_piece(learner, max(len(indices) for indices in batches.order(0)), segments)
    return with_piece(learner.units[0], piece, simultaneous(learner, batches, epochs, schedule, start))


def tick_after(epoch: int, number: int, count: int, first: int, result: StepResult, epochs: int) -> Tick:
    ends = number == count
    return Tick(Position(epoch + 1, 0) if ends else Position(epoch, number), first, result, ends, count, epochs)


def sequential(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = Position(),
    *,
    cache: bool = False,
    keeping: Keeping = IN_MEMORY,
) -> Iterator[Tick]:
    """Algorithm 1 of the paper: unit after unit is trained for ``epochs`` epochs, then frozen in evaluation mode.

    Args:
        cache: keep the features that enter the present unit instead of computing them for every batch. The images must then
            have a fixed number of augmentations (``views``), and what is kept is of each of them.
        keeping: where it is kept and how much of it; what exceeds that is computed for every batch.

    Raises:
        InvalidInput: ``cache`` without ``views``, or a network whose features cannot be kept.
    """
    make_features: Callable[[], RecomputedFeatures | CachedFeatures] = partial(RecomputedFeatures, batches)
    if cache:
        make_features = cached_features(learner, batches, keeping)
    return unit_after_unit(learner, batches, epochs, schedule, start, make_features)


def unit_after_unit(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position,
    make_features: Callable[[], RecomputedFeatures | CachedFeatures],
) -> Iterator[Tick]:
    """The steps of ``sequential``; a generator, so that what is refused is refused before it begins."""
    count = len(learner.units)
    features = make_features()
    for index in range(start.epoch // epochs, count):
        unit, frozen = learner.units[index], learner.units[:index]
        for earlier in frozen:
            if earlier.optimizer is not None:
                earlier.optimizer.state.clear()  # needed no more: the memory of its moments is free for this unit
        learner.train(False)
        features.advance(frozen)
        for epoch in range(max(start.epoch, index * epochs), (index + 1) * epochs):
            learner.train(False)
            unit.train()
            set_rates([unit], schedule((epoch - index * epochs) / epochs))
            first = start.batch if epoch == start.epoch else 0
            number = first
            for *carried, labels in features.batches(epoch, first):  # a list to pop from: the unit alone keeps it alive
                number += 1
                learner.check(carried[0][0], labels)
                step = (epoch - index * epochs) * len(batches) + number - 1
                evaluated = unit.step(carried.pop(), Targets(labels, learner.num_classes), step)[1]
                result = StepResult([evaluated], len(labels))
                learner.steps += 1
                tick = tick_after(epoch, number, len(batches), index, result, count * epochs)
                yield replace(tick, kept_bytes=features.kept_bytes)


def parallel(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = Position(),
    *,
    threads: int = 2,
) -> Iterator[Tick]:
    """Groups of units work at the same time, each on the batch that the group before has finished with.

    Only features travel, forward. The same steps are made as by ``simultaneous``, to the same bits: an epoch's last batch
    passes all groups before the next epoch begins.

    Args:
        threads: how many groups of neighbouring units, one thread each.
    """
    threads = max(1, min(threads, len(learner.units)))
    bounds = [len(learner.units) * number // threads for number in range(threads + 1)]
    groups = [learner.units[low:high] for low, high in pairwise(bounds)]
    for epoch in range(start.epoch, epochs):
        learner.train()
        set_rates(learner.units, schedule(epoch / epochs))
        first = start.batch if epoch == start.epoch else 0
        with Pipeline(groups, learner, batches.batches(epoch, first)) as results:
            for number, result in enumerate(results, start=first + 1):
                tick = tick_after(epoch, number, len(batches), 0, result, epochs)
                yield replace(tick, settled=tick.ends_epoch)  # before that, the groups in front are some batches ahead


RULES: dict[str, Rule] = {
    "simultaneous": Rule(simultaneous),
    "sequential": Rule(sequential, one_step=False),
    "parallel": Rule(parallel, one_thread=False, one_step=False),
    "global": Rule(simultaneous, at=1),
    "checkpointed": Rule(checkpointed, at=1, one_step=False),  # segments set random generators, which a recording cannot
}
