"""The sequential rule, Algorithm 1 of the paper: unit after unit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from layerwise.core.learner import Learner
from layerwise.core.result import StepResult
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
    cache: bool = False,
    keeping: Keeping = IN_MEMORY,
) -> Iterator[Tick]:
    """Algorithm 1 of the paper: unit after unit is trained to the end, then frozen.

    Args:
        epochs: number of epochs of each unit.
        cache: keep the features that enter the present unit instead of computing them for every
            batch. It needs a fixed number of augmentations of an image, --views N or --no-augment,
            and takes N times the room.
        keeping: place and limit of the cache; features beyond the limit are computed for every
            batch.

    Raises:
        InvalidInput: ``cache`` without ``views``, a network whose features cannot be kept, or a
            learner with windows.
    """
    learner.refuse_windows("sequential")
    learner.step_singly()
    make_features: Callable[[], RecomputedFeatures | CachedFeatures] = partial(
        RecomputedFeatures, batches
    )
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
    """The ticks of ``sequential``, which refuses first and then returns this generator."""
    count = len(learner.units)
    features = make_features()
    for index in range(start.epoch // epochs, count):
        unit, frozen = learner.units[index], learner.units[:index]
        for earlier in frozen:
            if earlier.optimizer is not None:
                # no longer needed: this frees the memory of its moments
                earlier.optimizer.state.clear()
        learner.train(False)
        features.advance(frozen)
        for epoch in range(max(start.epoch, index * epochs), (index + 1) * epochs):
            learner.train(only=unit)
            set_rates([unit], schedule((epoch - index * epochs) / epochs))
            learner.set_progress((epoch - index * epochs) / epochs)
            first = start.batch if epoch == start.epoch else 0
            number = first
            # a list to pop from, so that the unit alone keeps its activations alive
            for *activations, labels, images in features.batches(epoch, first, unit.reads_images):
                number += 1
                learner.check(activations[0][0], labels)
                step = (epoch - index * epochs) * len(batches) + number - 1
                evaluated = unit.step(
                    activations.pop(), Targets(labels, learner.num_classes, images), step
                )[1]
                result = StepResult([evaluated], len(labels))
                learner.steps += 1
                tick = tick_after(epoch, number, len(batches), index, result, count * epochs)
                yield replace(tick, kept_bytes=features.kept_bytes)
