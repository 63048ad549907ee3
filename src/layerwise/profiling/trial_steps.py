"""A rule's steps on random images: they are predicted, measured or timed without any data."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.data import ImageFormat
from layerwise.errors import check_range
from layerwise.rules import RULES
from layerwise.rules.base import Tick
from layerwise.rules.feature_cache import Keeping
from layerwise.runs.run import Run
from layerwise.utils.device import device_of

UNSAID = Keeping(say=lambda line: None)  # features kept in memory, with no word about it


MOST_CLASSES = 100_000  # five times those of the largest published set of labelled images
MEAN, DEVIATION = 0.5, 0.25  # of pixels, from 0 to 1; no number depends on them
CIFAR_SIZE = 32  # pixels a side, where a run does not say


def trial_images(run: Run, num_classes: int = 10, channels: int = 3) -> ImageFormat:
    """The format of images of the run's size, that of CIFAR unless the run says.

    Raises:
        InvalidInput: there are fewer than 2 classes, or more than ``MOST_CLASSES``.
    """
    check_range("classes", num_classes, 2, MOST_CLASSES)
    names = tuple(map(str, range(num_classes)))
    known = (MEAN,) * channels, (DEVIATION,) * channels
    return ImageFormat(names, channels, run.image_size or CIFAR_SIZE, normalization=known)


def trial_options(run: Run) -> dict[str, Any]:
    """The run's options of its rule, with a cache that says nothing."""
    return {**run.rule_options, **({"keeping": UNSAID} if run.rule_options.get("cache") else {})}


class RandomBatches:
    """Random images in two batches per epoch, as a rule draws them.

    The first batch warms up, and the second is measured.
    """

    views = 1

    def __init__(self, learner: Learner, batch_size: int) -> None:
        self.device, self.shape, self.type = (
            device_of(learner.model),
            learner.image_shape,
            learner.image_type,
        )
        self.batch_size = batch_size
        self.labels = torch.arange(2 * batch_size, device=self.device) % learner.num_classes

    def __len__(self) -> int:
        return 2

    def order(self, epoch: int) -> list[Tensor]:
        return list(torch.arange(2 * self.batch_size, device=self.device).split(self.batch_size))

    def images(self, indices: Tensor, epoch: int) -> Tensor:
        return torch.rand(len(indices), *self.shape, dtype=self.type, device=self.device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self.order(epoch)[start:]:
            yield self.images(indices, epoch), self.labels[indices]


def rule_ticks(
    rule: str, learner: Learner, batch_size: int, epochs: int, options: dict[str, Any]
) -> Iterator[Tick]:
    """A rule's steps on random images, two per epoch of each group of units that learn together."""
    options = {**options, **RULES[rule].trial}
    return RULES[rule].order(
        learner, RandomBatches(learner, batch_size), epochs, lambda done: 1.0, **options
    )
