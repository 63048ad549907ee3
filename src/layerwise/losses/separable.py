"""A cheap head of separable convolutions, for wide features (SEDONA, Pyeon et al. 2021)."""

from torch import Tensor, nn

from layerwise.errors import check_least
from layerwise.losses.heads import HeadLoss, linear
from layerwise.losses.site import Site, check_shape

EMBEDDING = 512  # channels before the classifier
EXPANSION = 4  # of an inverted residual


class Separable(HeadLoss):
    """Cross-entropy of a head whose cost grows little with the number of channels.

    A 1×1 convolution to a quarter of the channels, a depthwise 3×3 one with stride 2, inverted
    residuals, a 1×1 convolution to 512 channels, global average pooling, a linear classifier. On
    vectors: a linear layer to 512 numbers and the classifier.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        head_layers: number of inverted residuals. Every second one halves the maps and adds an
            eighth of the features' channels, until a map is one pixel.

    Raises:
        InvalidInput: ``head_layers`` is below 0, or the features are of another shape.
    """

    def __init__(self, site: Site, *, head_layers: int = 1) -> None:
        check_shape(site)
        check_least(0, head_layers=head_layers)
        channels = site.shape[0]
        classifier = nn.Linear(EMBEDDING, site.num_classes)
        if len(site.shape) == 1:
            super().__init__(nn.Sequential(linear(channels, EMBEDDING), classifier))
            return
        width, step = max(channels // 4, 1), max(channels // 4 // 2, 1)
        side = -(-min(site.shape[1:]) // 2)
        layers: list[nn.Module] = [
            pointwise(channels, width),
            nn.ReLU(),
            depthwise(width, stride=2),
            nn.ReLU(),
        ]
        for number in range(head_layers):
            stride = 2 if number % 2 and side > 1 else 1
            wider = width + step * (stride - 1)
            layers.append(InvertedResidual(width, wider, stride))
            width, side = wider, -(-side // stride)
        super().__init__(
            nn.Sequential(
                *layers,
                pointwise(width, EMBEDDING),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                classifier,
            )
        )


class InvertedResidual(nn.Module):
    """1×1 convolution to four times the channels, depthwise 3×3, 1×1 back (MobileNetV2).

    Shapes: (B, inputs, H, W) -> (B, outputs, ⌈H / stride⌉, ⌈W / stride⌉). The input is added where
    it has the output's shape.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        expanded = EXPANSION * inputs
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            pointwise(inputs, expanded),
            nn.ReLU(),
            depthwise(expanded, stride),
            nn.ReLU(),
            pointwise(expanded, outputs),
        )

    def forward(self, maps: Tensor) -> Tensor:
        result: Tensor = self.layers(maps)
        return maps + result if self.residual else result


def depthwise(channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
    )


def pointwise(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
