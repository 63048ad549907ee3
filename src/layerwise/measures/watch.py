"""A watch: measures of a network's features while it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from layerwise.data import Loader
from layerwise.measures import MEASURES, heading_of
from layerwise.measures.depths import Depths
from layerwise.measures.gains import losses_push
from layerwise.measures.over_depth import check_measure, measure_depths
from layerwise.measures.sample import Sample, sample_images

WATCHED_IMAGES = 5000  # while training, where time counts
WATCHED_POOLED_TO = 256


class Watch:
    """Measures of a network's units while it trains, on images that it does not learn from.

    Args:
        depths: the network's units, and whether they have losses of their own.
        loader: the images.
        split: name of the images: ``validation`` or ``test``.
        classes: number of classes.
        measures: names in ``MEASURES``; gains are of the first.

    Attributes:
        other: a network of as many units, and the same images as it reads them, to compare features
            with; or None.
        against: entries of the lines that name that network.

    Raises:
        InvalidInput, CannotSplit: the network cannot be measured, which is noticed before training.
    """

    other: tuple[Depths, Sample] | None = None
    against: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        depths: Depths,
        loader: Loader,
        split: str,
        classes: int,
        measures: Sequence[str] = ("linear_probe",),
    ) -> None:
        for name in measures:
            check_measure(name)
        self.measures, self.split, self.loader = measures, split, loader
        self.depths = replace(depths, heads=False)  # the heads' accuracies are in the log
        self.local = depths.heads
        self.sample = sample_images(loader, WATCHED_IMAGES, classes)

    def record(self, epoch: int, last: int, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The line for an epoch.

        Args:
            epoch: number of the epoch.
            last: index of the last of the learner's units that has learned; those behind it are
                left out.
            log: log of the run, for the units' losses.
        """
        reached, pushing = (last, losses_push(log)) if self.local else (None, None)
        rows = measure_depths(
            self.depths, self.sample, self.measures, WATCHED_POOLED_TO, reached, self.other, pushing
        )
        images = len(self.sample.labels)
        facts = {
            "epoch": epoch,
            "split": self.split,
            "pooled_to": WATCHED_POOLED_TO,
            "images": images,
            "headings": {name: heading_of(MEASURES[name]) for name in self.measures},
            **self.against,
        }
        return facts | {"units": rows}
