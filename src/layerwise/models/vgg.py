"""VGG networks of any hierarchy (Simonyan & Zisserman 2015).

vgg8b and vgg11b are from Nøkland & Eidnes 2019. Every convolution is 3×3 with bias, followed by
batch normalisation, leaky ReLU and channel dropout. As published, a 2×2 maximum pooling ends each
stage. One hidden fully connected layer and the output layer follow.
"""

from itertools import accumulate, pairwise

from torch import Tensor, nn

from layerwise.hierarchy import Hierarchy, check_downsampling
from layerwise.ops.batch_norm import SLOPE, NormalisedActivation
from layerwise.ops.small_conv import Convolution

LARGE_IMAGE = 64  # pixels; from here on networks have ImageNet's stem, VGGs above it
HIDDEN_FEATURES = 1024

# Stage widths as (every convolution but the stage's last, the last one). The paper leaves open
# where the extra convolutions of vgg8b_e1 … e3 go: here they repeat the stage's first width.
PLAIN = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
WIDENING = ((128, 256), (256, 512), (512, 512), (512, 512))

VGGS: dict[str, tuple[Hierarchy, tuple[tuple[int, int], ...]]] = {
    "vgg8": ((1, 1, 1, 1, 1), PLAIN),
    "vgg8b": ((2, 2, 1, 1), WIDENING),
    "vgg11": ((1, 1, 2, 2, 2), PLAIN),
    "vgg11b": ((4, 2, 2, 1), WIDENING),
    "vgg13": ((2, 2, 2, 2, 2), PLAIN),
    "vgg16": ((2, 2, 3, 3, 3), PLAIN),
    "vgg19": ((2, 2, 4, 4, 4), PLAIN),
}


def scaled(channels: int, width: float) -> int:
    """Channels of a layer at a width multiplier, at least one."""
    return max(1, round(channels * width))


class ConvolutionUnit(nn.Sequential):
    """Convolution → batch normalisation → leaky ReLU → channel dropout."""

    def __init__(
        self, inputs: int, outputs: int, dropout: float, kernel: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        plain = kernel == 3 and stride == 1
        self.conv = (
            Convolution(inputs, outputs)
            if plain
            else nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
        )
        self.norm = NormalisedActivation(outputs)
        self.dropout = nn.Dropout2d(dropout)


class HiddenUnit(nn.Sequential):
    """Fully connected layer → batch normalisation → leaky ReLU → dropout."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.BatchNorm1d(outputs)
        self.activation = nn.LeakyReLU(SLOPE, inplace=True)
        self.dropout = nn.Dropout(dropout)


class VGG(nn.Module):
    """A VGG network with ``hierarchy[s]`` convolutions in stage ``s``.

    Maps are halved by a 2×2 maximum pooling after each number of convolutions in
    ``downsample_after``; as published, after the last of every stage. A map of one pixel is not
    pooled, so images may be smaller than 32 pixels.

    Above 64 pixels, vgg8b and vgg11b begin with a 7×7 convolution of stride 2, as in their
    authors' program. The other networks keep 3×3 convolutions throughout, as on ImageNet.

    Shapes: (B, in_chans, image_size, image_size) -> (B, num_classes).
    """

    pools_maps = True  # maps are halved by pooling, not by a stride

    def __init__(
        self,
        name: str,
        hierarchy: Hierarchy,
        width: float,
        num_classes: int,
        in_chans: int,
        image_size: int,
        dropout: float,
        downsample_after: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        ends = tuple(accumulate(hierarchy))
        halvings = ends if downsample_after is None else downsample_after
        check_downsampling(name, halvings, 1, ends[-1])
        stage_widths = VGGS[name][1]
        halving_stem = stage_widths is WIDENING and image_size > LARGE_IMAGE
        channels, size = in_chans, image_size
        self.stages = nn.ModuleList()
        passed = 0
        for count, (inner, last) in zip(hierarchy, stage_widths, strict=True):
            widths = [scaled(inner, width)] * (count - 1) + [scaled(last, width)]
            units: list[nn.Module] = []
            for inputs, outputs in pairwise([channels, *widths]):
                stem = halving_stem and not self.stages and not units
                units.append(
                    ConvolutionUnit(inputs, outputs, dropout, *((7, 2) if stem else (3, 1)))
                )
                size = (size + 1) // 2 if stem else size
                passed += 1
                if passed in halvings and size > 1:
                    units.append(nn.MaxPool2d(2))
                    size //= 2
            self.stages.append(nn.Sequential(*units))
            channels = widths[-1]
        self.flatten = nn.Flatten()
        self.hidden = HiddenUnit(channels * size * size, scaled(HIDDEN_FEATURES, width), dropout)
        self.output = nn.Linear(scaled(HIDDEN_FEATURES, width), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for stage in self.stages:
            features = stage(features)
        return self.output(self.hidden(self.flatten(features)))
