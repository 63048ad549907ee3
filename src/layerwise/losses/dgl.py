"""The auxiliary heads of decoupled greedy learning (Belilovsky et al. 2020, arXiv:1901.08164).

Convolutional heads read vectors by linear layers, which is what a convolution does with maps of one
pixel.
"""

from torch import nn

from layerwise.errors import check_least
from layerwise.losses.greedy import Greedy
from layerwise.losses.heads import HeadLoss, convolution, linear, perceptron
from layerwise.losses.site import Site, check_shape

POOLED = 2  # pixels a side of the maps that a classifier reads
HIDDEN = 3  # hidden layers of the perceptron


class DglCnn(Greedy):
    """Cross-entropy of a convolutional head, the heaviest of the three.

    Convolutions as wide as the features, average pooling to 2×2, batch normalisation, a linear
    classifier: the head of ``greedy``, counted by its convolutions.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        head_layers: number of 3×3 convolutions.

    Raises:
        InvalidInput: ``head_layers`` is below 0, or the features are of another shape.
    """

    def __init__(self, site: Site, *, head_layers: int = 2) -> None:
        check_least(0, head_layers=head_layers)
        super().__init__(site, head_depth=1 + head_layers)


class DglMlp(HeadLoss):
    """Cross-entropy of a perceptron on features that are average-pooled to 2×2.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        head_layers: number of hidden layers, each as wide as its input.

    Raises:
        InvalidInput: ``head_layers`` is below 0, or the features are of another shape.
    """

    def __init__(self, site: Site, *, head_layers: int = HIDDEN) -> None:
        check_shape(site)
        check_least(0, head_layers=head_layers)
        super().__init__(
            perceptron(site.shape[0], head_layers, site.num_classes)
            if len(site.shape) == 1
            else pooled_perceptron(site.shape[0], head_layers, site.num_classes)
        )


class DglMlpSr(HeadLoss):
    """Cross-entropy of a perceptron behind 1×1 convolutions on maps of a quarter of the side.

    The lightest of the three where maps are large: "spatially resized" mlp.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        head_layers: number of 1×1 convolutions, and of hidden layers.

    Raises:
        InvalidInput: ``head_layers`` is below 0, or the features are of another shape.
    """

    def __init__(self, site: Site, *, head_layers: int = HIDDEN) -> None:
        check_shape(site)
        check_least(0, head_layers=head_layers)
        channels, *size = site.shape
        if not size:
            hidden = [linear(channels, channels) for _ in range(head_layers)]
            super().__init__(
                nn.Sequential(*hidden, *perceptron(channels, head_layers, site.num_classes))
            )
            return
        super().__init__(
            nn.Sequential(
                nn.AdaptiveAvgPool2d((-(-size[0] // 4), -(-size[1] // 4))),
                *(convolution(channels, channels, 1) for _ in range(head_layers)),
                *pooled_perceptron(channels, head_layers, site.num_classes),
            )
        )


def pooled_perceptron(channels: int, layers: int, classes: int) -> nn.Sequential:
    """A perceptron on maps that are average-pooled to 2×2."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(POOLED),
        nn.Flatten(),
        *perceptron(channels * POOLED**2, layers, classes),
    )
