"""The sample of images that features are measured on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from layerwise.data.loader import Loader
from layerwise.errors import InvalidInput
from layerwise.measures.base import check_labels, parts, shuffled_ranks

SAMPLE_SEED = 1


@dataclass(frozen=True)
class Sample:
    """The images that are measured on, with every class among them.

    Attributes:
        labels: labels of the images, (N,), long, on the network's device.
        classes: number of classes.
        batches: function that gives the images in the labels' order, (B, C, H, W), as the network
            reads them; it can be called again.
    """

    labels: Tensor
    classes: int
    batches: Callable[[], Iterator[Tensor]]


def sample_images(loader: Loader, images: int, classes: int) -> Sample:
    """A shuffled sample of at most so many images, drawn evenly over the classes, always alike.

    Raises:
        InvalidInput: too few images to measure on, or a class is absent.
    """
    if images < classes:
        raise InvalidInput(
            f"Cannot measure the features: {images} images are fewer than the {classes} classes. "
            "Give several of each class."
        )
    check_labels(loader.labels, classes)
    order, ranks, _ = shuffled_ranks(loader.labels, SAMPLE_SEED)
    chosen = order[ranks.argsort(stable=True)[:images].sort().values].to(loader.labels.device)
    labels = loader.labels[chosen].long()
    parts(labels)  # refuses too few of a class
    # of nearly equal size, so that none is of a single image
    batches = list(chosen.tensor_split(-(-len(chosen) // loader.batch_size)))
    return Sample(
        labels,
        classes,
        lambda: (loader.normalise(pixels) for pixels in loader.pixels.stream(batches)),
    )
