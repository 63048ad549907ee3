"""The auxiliary head of greedy layer-wise learning (Belilovsky et al. 2019, arXiv:1812.11446)."""

from itertools import pairwise

from torch import nn

from layerwise.errors import InvalidInput, check_least
from layerwise.losses.heads import HeadLoss, convolution, linear
from layerwise.losses.site import Site, check_shape

POOLED = 2  # pixels a side of the maps that the classifier reads


class Greedy(HeadLoss):
    """Cross-entropy of a head of ``k`` layers, the classifier included: the published k = 1, 2, 3.

    k − 1 convolutions of 3×3, average pooling to 2×2, batch normalisation, a linear classifier. On
    vectors, convolutions are linear layers, and nothing is pooled.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        head_depth: depth of the head, 1 or more.
        head_width: channels of the head's convolutions; None: as many as the features have.

    Raises:
        InvalidInput: an option is below 1, a width is given for no convolution, or the features are
            of another shape.
    """

    def __init__(self, site: Site, *, head_depth: int = 2, head_width: int | None = None) -> None:
        check_shape(site)
        check_least(1, head_depth=head_depth, head_width=head_width)
        if head_depth == 1 and head_width is not None:
            raise InvalidInput(
                f"Cannot use head_width {head_width}: it would change nothing, because a head of "
                "depth 1 is a classifier alone. Leave it out, or give head_depth 2 or more."
            )
        inputs = site.shape[0]
        width = inputs if head_width is None else head_width
        widths = [inputs, *[width] * (head_depth - 1)]
        pairs = list(pairwise(widths))
        if len(site.shape) == 1:
            layers = [linear(*pair) for pair in pairs]
            classifier = nn.Linear(width, site.num_classes)
            super().__init__(nn.Sequential(*layers, nn.BatchNorm1d(width), classifier))
            return
        super().__init__(
            nn.Sequential(
                *(convolution(*pair, 3) for pair in pairs),
                nn.AdaptiveAvgPool2d(POOLED),
                nn.BatchNorm2d(width),
                nn.Flatten(),
                nn.Linear(width * POOLED**2, site.num_classes),
            )
        )
