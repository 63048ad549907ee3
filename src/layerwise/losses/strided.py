"""A head of strided convolutions, which reaches the resolution of deep layers at once."""

from torch import nn

from layerwise.errors import InvalidInput, check_range
from layerwise.losses.heads import HeadLoss, convolution, linear
from layerwise.losses.site import Site, check_shape

POOLED = 2  # pixels a side of the maps that the classifier reads
MOST_LAYERS = 16
NARROWEST, WIDEST = 0.01, 100  # factors
FACTOR = 2.0  # channels of the first convolution, in those of the features


class Strided(HeadLoss):
    """Cross-entropy of a head that halves maps and doubles channels, as the stages behind it do.

    3×3 convolutions with stride 2, of which each has twice the channels of the one before, while
    maps are larger than 2×2; average pooling to at most 2×2, batch normalisation, a linear
    classifier. So the deeper a unit is, the fewer layers its head has, and none where maps are of
    2×2. On vectors, convolutions are linear layers.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        head_depth: number of convolutions, at most; 0 to 16.
        head_width_factor: channels of the first convolution, in those of the features; 0.01 to 100.

    Raises:
        InvalidInput: an option is out of range, a width is given for no convolution, or the
            features are of another shape.
    """

    def __init__(
        self, site: Site, *, head_depth: int = 2, head_width_factor: float = FACTOR
    ) -> None:
        check_shape(site)
        check_range("head_depth", head_depth, 0, MOST_LAYERS)
        check_range("head_width_factor", head_width_factor, NARROWEST, WIDEST)
        if head_depth == 0 and head_width_factor != FACTOR:
            raise InvalidInput(
                f"Cannot use head_width_factor {head_width_factor}: it would change nothing, "
                "because a head of depth 0 is a classifier alone. Leave it out, or give head_depth "
                "1 or more."
            )
        channels, *size = site.shape
        width = max(round(channels * head_width_factor), 1)
        layers: list[nn.Module] = []
        for _ in range(head_depth):
            if size and max(size) <= POOLED:
                break
            layers.append(
                convolution(channels, width, 3, stride=2) if size else linear(channels, width)
            )
            channels, width, size = width, 2 * width, [-(-side // 2) for side in size]
        if size:
            pooled = (min(size[0], POOLED), min(size[1], POOLED))
            layers += [nn.AdaptiveAvgPool2d(pooled), nn.BatchNorm2d(channels), nn.Flatten()]
            classifier = nn.Linear(channels * pooled[0] * pooled[1], site.num_classes)
        else:
            layers.append(nn.BatchNorm1d(channels))
            classifier = nn.Linear(channels, site.num_classes)
        super().__init__(nn.Sequential(*layers, classifier))
