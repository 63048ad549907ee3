"""A rule's steps on random images, without any data: for what is predicted, measured or timed before a run."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from layerwise.build import build_learner, options_for
from layerwise.data import ImageFormat
from layerwise.errors import InvalidInput
from layerwise.features import Keeping
from layerwise.learner import Learner
from layerwise.rules import RULES, Tick
from layerwise.runs import Run
from layerwise.utils.device import device_of

UNSAID = Keeping(say=lambda line: None)  # features kept in memory, with no word about it


def image_size(run: Run) -> int:
    """Pixels a side of the run's images, those of CIFAR unless the run says."""
    return run.image_size or 32


def options_of(run: Run) -> dict[str, Any]:
    """The run's options of its rule."""
    return options_for("rule", run.rule, run) | ({"keeping": UNSAID} if run.cache else {})


def build(run: Run, num_classes: int, device: torch.device) -> Learner:
    """The run's network as it would be trained, for colour images.

    Raises:
        InvalidInput: there are fewer than 2 classes, or an option is out of range.
    """
    if num_classes < 2:
        raise InvalidInput(f"classes {num_classes} is too small: give 2 or more")
    images = ImageFormat(tuple(map(str, range(num_classes))), 3, image_size(run))
    return build_learner(run, images, device)


class RandomBatches:
    """Random images in two batches per epoch, as a rule draws them: the first warms up, the second is looked at."""

    views = 1

    def __init__(self, learner: Learner, batch_size: int) -> None:
        self.device, self.shape, self.type = device_of(learner.model), learner.image_shape, learner.image_type
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


def rule_ticks(rule: str, learner: Learner, batch_size: int, epochs: int, options: dict[str, Any]) -> Iterator[Tick]:
    """A rule's steps on random images; each group of units that learn together makes two per epoch."""
    return RULES[rule].order(learner, RandomBatches(learner, batch_size), epochs, lambda done: 1.0, **options)
