"""Features that leave frozen units, computed once for every view of the images and kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerwise.core.frozen import Entered
from layerwise.core.learner import Learner
from layerwise.core.unit import precision
from layerwise.rules.base import Tick
from layerwise.rules.feature_cache import Batches, Keeping
from layerwise.utils.sizes import format_size


class FrozenFeatures:
    """Training data as the first unit that learns reads it, in place of images; see ``Batches``."""

    def __init__(self, source: Batches, features: list[Tensor]) -> None:
        self.source, self.features = source, features
        self.labels, self.views = source.labels, source.views

    @property
    def kept_bytes(self) -> int:
        return sum(values.nbytes for values in self.features)

    def __len__(self) -> int:
        return len(self.source)

    def order(self, epoch: int) -> list[Tensor]:
        return self.source.order(epoch)

    def images(self, indices: Tensor, epoch: int) -> Tensor:
        return self.features[epoch % len(self.features)].index_select(0, indices)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self.order(epoch)[start:]:
            yield self.images(indices, epoch), self.labels[indices]


def frozen_features(learner: Learner, source: Batches, keeping: Keeping) -> FrozenFeatures | None:
    """The features that leave a learner's frozen units; None: they are computed for every batch.

    They are where images are augmented anew every epoch, where more than one tensor leaves the
    frozen units, where a loss reads images too, or where they exceed the limit, which is said.
    """
    entered = learner.units[0].piece
    reading = any(unit.reads_images or unit.reads_input for unit in learner.units)
    if not isinstance(entered, Entered) or source.views is None or reading:
        return None
    parts = torch.arange(len(source.labels), device=source.labels.device)
    sample = passed(learner, entered, source.images(parts[:2], 0))
    if len(sample) != 1 or len(sample[0]) != 2:
        return None
    size = source.views * len(parts) * (sample[0].nbytes // 2)
    if keeping.limit is not None and size > keeping.limit:
        keeping.say(
            f"cache: {format_size(size)} of features that leave the frozen units exceed "
            f"{keeping.bound}, so they are computed for every batch"
        )
        return None
    step = max(len(indices) for indices in source.order(0))
    features = [
        torch.cat(
            [passed(learner, entered, source.images(part, view))[0] for part in parts.split(step)]
        )
        for view in range(source.views)
    ]
    keeping.say(f"cache: {format_size(size)} of features that leave the frozen units are kept")
    return FrozenFeatures(source, features)


def passed(learner: Learner, entered: Entered, images: Tensor) -> tuple[Any, ...]:
    with precision((images,), learner.units[0].amp):
        return entered.frozen(images)


def ordered(
    order: Callable[..., Iterator[Tick]],
    learner: Learner,
    source: Batches,
    keeping: Keeping,
    /,  # a rule's own option may be called keeping too
    *given: Any,
    **options: Any,
) -> Iterator[Tick]:
    """The ticks of a rule, whose first unit reads the features that leave frozen units, if kept.

    Between ticks it reads images, so that it can be evaluated.

    Args:
        order: the rule's; see ``Rule``.
        keeping: limit of these features.
        given: the rule's other arguments; options: its own.
    """
    features = frozen_features(learner, source, keeping)
    if features is None:
        return order(learner, source, *given, **options)
    with reading(learner, features):
        ticks = order(learner, features, *given, **options)
    return with_features(ticks, learner, features)


def with_features(
    ticks: Iterator[Tick], learner: Learner, features: FrozenFeatures
) -> Iterator[Tick]:
    while True:
        with reading(learner, features):
            tick = next(ticks, None)
        if tick is None:
            return
        yield replace(tick, kept_bytes=tick.kept_bytes + features.kept_bytes)


@contextmanager
def reading(learner: Learner, features: FrozenFeatures) -> Iterator[None]:
    """Let a learner read features in place of images."""
    entered, before = learner.units[0].piece, (learner.image_shape, learner.image_type)
    values = features.features[0]
    learner.image_shape, learner.image_type = values.shape[1:], values.dtype
    entered.skips = True  # type: ignore[assignment]
    try:
        yield
    finally:
        learner.image_shape, learner.image_type = before
        entered.skips = False  # type: ignore[assignment]
