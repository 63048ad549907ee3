"""Training rules: orders in which units take steps.

A rule is a generator: it draws batches, lets units step, and yields a tick after every batch, so that the training loop can
show, save and stop between any two. Rules know nothing of losses. Everything random depends on the seed and the position alone,
so a rule started at a position goes on exactly as one that came there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from layerwise.checkpointed import checkpointed_piece, with_piece
from layerwise.errors import InvalidInput
from layerwise.learner import Learner
from layerwise.losses import Targets
from layerwise.pipeline import Pipeline
from layerwise.units import Carried, StepResult, Unit


class Batches(Protocol):
    """What a rule needs of the training data."""

    labels: Tensor  # (N,), of the whole set, in its order
    views: int | None  # how many different augmentations of an image there are; None: a new one each epoch

    def __len__(self) -> int: ...  # batches per epoch
    def order(self, epoch: int) -> list[Tensor]: ...  # indices of every batch
    def images(self, indices: Tensor, epoch: int) -> Tensor: ...  # (B, C, H, W), augmented as in that epoch
    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...  # images and labels


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
    """

    order: Callable[..., Iterator[Tick]]
    at: int | None = None
    one_thread: bool = True


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
        InvalidInput: there are not so many segments to be had.
    """
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
) -> Iterator[Tick]:
    """Algorithm 1 of the paper: unit after unit is trained for ``epochs`` epochs, then frozen in evaluation mode.

    Args:
        cache: keep the features that enter the present unit in memory instead of computing them anew for every batch. The
            images must then have a fixed number of augmentations (``views``).

    Raises:
        InvalidInput: ``cache`` without ``views``.
    """
    if cache and batches.views is None:
        raise InvalidInput(
            "features can only be cached of a fixed number of augmentations per image: give --views, such as 1, or --no-augment"
        )
    return unit_after_unit(learner, batches, epochs, schedule, start, cache)


def unit_after_unit(
    learner: Learner, batches: Batches, epochs: int, schedule: Schedule, start: Position, cache: bool
) -> Iterator[Tick]:
    count = len(learner.units)
    features = CachedFeatures(batches) if cache else RecomputedFeatures(batches)
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


class RecomputedFeatures:
    """What enters a unit, computed for every batch by the frozen units before it."""

    kept_bytes = 0

    def __init__(self, source: Batches) -> None:
        self.source, self.frozen = source, list[Unit]()

    def advance(self, frozen: list[Unit]) -> None:
        """From now on, give what has passed these units."""
        self.frozen = frozen

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Carried, Tensor]]:
        for images, labels in self.source.batches(epoch, start):
            yield pass_through(self.frozen, (images,)), labels


class CachedFeatures:
    """What enters a unit, kept in memory for every view of the images and passed on once through each unit that is frozen."""

    def __init__(self, source: Batches) -> None:
        self.source, self.frozen = source, list[Unit]()
        self.kept: dict[int, tuple[Tensor, ...]] = {}
        self.every = torch.arange(len(source.labels), device=source.labels.device)
        self.parts = self.every.split(max(len(indices) for indices in source.order(0)))

    @property
    def kept_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for view in self.kept.values() for tensor in view)

    def advance(self, frozen: list[Unit]) -> None:
        """From now on, give what has passed these units: what is kept has passed all but the last already."""
        added, self.frozen = frozen[len(self.frozen) :], frozen
        for view, kept in self.kept.items():
            self.kept[view] = self.collect(added, (tuple(tensor[part] for tensor in kept) for part in self.parts))

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Carried, Tensor]]:
        view = epoch % (self.source.views or 1)
        if view not in self.kept:
            self.kept[view] = self.collect(self.frozen, ((self.source.images(part, epoch),) for part in self.parts))
        for indices in self.source.order(epoch)[start:]:
            yield tuple(kept[indices] for kept in self.kept[view]), self.source.labels[indices]

    def collect(self, units: list[Unit], inputs: Iterator[Carried]) -> tuple[Tensor, ...]:
        """Pass all images through some units, part by part, and keep what comes out, in the images' order.

        Raises:
            InvalidInput: something else than a tensor with an entry per image passes between the units.
        """
        kept: list[Tensor] = []
        for part, carried in zip(self.parts, inputs, strict=True):
            passed = pass_through(units, carried)
            if not all(isinstance(value, Tensor) and value.shape[:1] == part.shape for value in passed):
                raise InvalidInput(
                    "something other than a tensor with an entry per image passes between two units, and may differ from batch "
                    "to batch, so it cannot be cached: leave --cache out"
                )
            kept = kept or [value.new_empty((len(self.every), *value.shape[1:])) for value in passed]
            for store, value in zip(kept, passed, strict=True):
                store[part] = value
        return tuple(kept)


@torch.no_grad()
def pass_through(units: list[Unit], carried: Carried) -> Carried:
    for unit in units:
        carried = unit.forward(carried)
    return carried


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
    "sequential": Rule(sequential),
    "parallel": Rule(parallel, one_thread=False),
    "global": Rule(simultaneous, at=1),
    "checkpointed": Rule(checkpointed, at=1),
}
