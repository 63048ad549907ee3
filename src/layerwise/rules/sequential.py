"""The sequential rule, Algorithm 1 of the paper: unit after unit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from layerwise.core.learner import Learner
from layerwise.core.result import StepResult
from layerwise.errors import InvalidInput, check_flags
from layerwise.losses import Targets
from layerwise.rules.base import START, Position, Schedule, Tick, set_rates, tick_after
from layerwise.rules.feature_cache import (
    IN_MEMORY,
    Batches,
    CachedFeatures,
    Keeping,
    RecomputedFeatures,
    cached_features,
)


def sequential(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
    *,
    laps: int = 1,
    cache: bool = False,
    keeping: Keeping = IN_MEMORY,
) -> Iterator[Tick]:
    """Algorithm 1 of the paper: unit after unit is trained to the end, then frozen.

    Args:
        epochs: number of epochs of each unit.
        laps: number of laps through the chain, in each of which a unit trains its share of its
            epochs; 1: the paper's way.
        cache: keep the features that enter the present unit instead of computing them for every
            batch. It needs a fixed number of augmentations of an image, --views N or --no-augment,
            and takes N times the room.
        keeping: place and limit of the cache; features beyond the limit are computed for every
            batch.

    Raises:
        InvalidInput: more laps than epochs, ``cache`` without ``views``, a network whose features
            cannot be kept, or a learner with windows.
    """
    check_flags(cache=cache)
    check_laps(laps, epochs, len(learner.units))
    learner.refuse_windows("sequential")
    learner.step_singly()
    make_features: Callable[[], RecomputedFeatures | CachedFeatures] = partial(
        RecomputedFeatures, batches
    )
    if cache:
        make_features = cached_features(learner, batches, keeping)
    return unit_after_unit(learner, batches, epochs, schedule, start, laps, make_features)


def check_laps(laps: int, epochs: int, units: int) -> None:
    """Refuse laps that leave some lap without an epoch, or that would change nothing.

    Raises:
        InvalidInput: as said.
    """
    if not 1 <= laps <= epochs:
        raise InvalidInput(
            f"Cannot use laps {laps}: a unit has {epochs} epochs, at least one for each lap. Give "
            f"1 to {epochs}."
        )
    if laps > 1 and units == 1:
        raise InvalidInput(
            f"Cannot use laps {laps}: the chain has one unit, so they would change nothing. Leave "
            "it out."
        )


@dataclass(frozen=True)
class Turn:
    """Neighbouring epochs in which one unit trains.

    Attributes:
        index: of the unit.
        own: epochs of the unit's own.
        before: what is to be added to the number of an own epoch to get the rule's.
    """

    index: int
    own: range
    before: int


def turns_of(units: int, epochs: int, laps: int) -> Iterator[Turn]:
    """The turns of a chain, in order."""
    made = 0
    for lap in range(laps):
        own = range(epochs * lap // laps, epochs * (lap + 1) // laps)
        for index in range(units):
            yield Turn(index, own, made - own.start)
            made += len(own)


def unit_after_unit(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position,
    laps: int,
    make_features: Callable[[], RecomputedFeatures | CachedFeatures],
) -> Iterator[Tick]:
    """The ticks of ``sequential``, which refuses first and then returns this generator."""
    features = make_features()
    for turn in turns_of(len(learner.units), epochs, laps):
        if turn.before + turn.own.stop <= start.epoch:
            continue
        unit = learner.units[turn.index]
        for learned in learner.units if turn.own.start else learner.units[: turn.index]:
            if learned is not unit and learned.optimizer is not None:
                # no longer needed, in this lap: this frees the memory of its moments
                learned.optimizer.state.clear()
        learner.train(False)
        features.advance(learner.units[: turn.index])
        for own in turn.own:
            epoch = turn.before + own
            if epoch < start.epoch:
                continue
            learner.train(only=unit)
            set_rates([unit], schedule(own / epochs))
            learner.set_progress(own / epochs)
            first = start.batch if epoch == start.epoch else 0
            number = first
            # a list to pop from, so that the unit alone keeps its activations alive
            for *activations, labels, images in features.batches(epoch, first, unit.reads_images):
                number += 1
                learner.check(activations[0][0], labels, unit)
                labels = labels.long()
                evaluated = unit.step(
                    activations.pop(),
                    Targets(labels, learner.num_classes, images),
                    own * len(batches) + number - 1,
                )[1]
                result = StepResult([evaluated], len(labels))
                learner.steps += 1
                total = len(learner.units) * epochs
                tick = tick_after(epoch, number, len(batches), turn.index, result, total)
                yield replace(tick, kept_bytes=features.kept_bytes)
