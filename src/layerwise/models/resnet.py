"""Residual networks of any hierarchy (He et al. 2016), as the paper trains them.

Leaky ReLU and dropout follow every unit. As in the paper, a unit ends after the batch normalisation
and non-linearity of a convolution; the shortcut is added between the two in a block's last
convolution. The 3×3 convolution has a bottleneck's stride.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.hierarchy import Hierarchy, check_downsampling
from layerwise.models.vgg import LARGE_IMAGE, scaled
from layerwise.ops.batch_norm import Normalisation, NormalisedActivation
from layerwise.ops.small_conv import Convolution

IMAGENET_WIDTHS = (64, 128, 256, 512)
CIFAR_WIDTHS = (16, 32, 64)  # He et al., section 4.2

RESNETS: dict[str, tuple[Hierarchy, str, tuple[int, ...]]] = {
    "resnet18": ((2, 2, 2, 2), "basic", IMAGENET_WIDTHS),
    "resnet34": ((3, 4, 6, 3), "basic", IMAGENET_WIDTHS),
    "resnet50": ((3, 4, 6, 3), "bottleneck", IMAGENET_WIDTHS),
    "resnet101": ((3, 4, 23, 3), "bottleneck", IMAGENET_WIDTHS),
    "resnet152": ((3, 8, 36, 3), "bottleneck", IMAGENET_WIDTHS),
    "resnet32": ((5, 5, 5), "cifar", CIFAR_WIDTHS),
    "resnet110": ((18, 18, 18), "cifar", CIFAR_WIDTHS),
}


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    if kernel == 3 and stride == 1:
        return Convolution(inputs, outputs, bias=False)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Subsample(nn.Module):
    """The parameter-free shortcut of the CIFAR ResNets (He et al. 2016, option A).

    It takes every second pixel; new channels are zero.

    Shapes: (B, inputs, H, W) -> (B, outputs, ⌈H/stride⌉, ⌈W/stride⌉).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (outputs - inputs) // 2
        self.padding = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, features: Tensor) -> Tensor:
        return F.pad(features[:, :, :: self.stride, :: self.stride], self.padding)


def make_shortcut(inputs: int, outputs: int, stride: int, kind: str) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if kind == "cifar":
        return Subsample(inputs, outputs, stride)
    return nn.Sequential(convolution(inputs, outputs, 1, stride), Normalisation(outputs))


def is_spare(shortcut: nn.Module) -> bool:
    """Whether what a shortcut gives may be written over: it is a projection without hooks."""
    return isinstance(shortcut, nn.Sequential) and not any(
        module._forward_hooks for module in shortcut.modules()
    )


class Stem(nn.Sequential):
    """Convolution → batch normalisation → leaky ReLU → dropout.

    The convolution is 3×3 for small images; for large ones it is 7×7 of stride 2, and a maximum
    pooling follows.
    """

    def __init__(self, inputs: int, outputs: int, large: bool, dropout: float) -> None:
        super().__init__()
        self.conv = convolution(inputs, outputs, 7, 2) if large else convolution(inputs, outputs, 3)
        self.norm = NormalisedActivation(outputs)
        self.dropout = nn.Dropout2d(dropout)
        if large:
            self.pool = nn.MaxPool2d(3, 2, padding=1)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut.

    Shapes: (B, inputs, H, W) -> (B, width, ⌈H/stride⌉, ⌈W/stride⌉).
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dropout: float, kind: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(inputs, width, 3, stride), NormalisedActivation(width)
        self.conv2, self.norm2 = convolution(width, width, 3), NormalisedActivation(width)
        self.shortcut = make_shortcut(inputs, width, stride, kind)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.dropout(self.norm1(self.conv1(features)))
        return self.dropout(
            self.norm2(self.conv2(inner), self.shortcut(features), spare=is_spare(self.shortcut))
        )


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut.

    Shapes: (B, inputs, H, W) -> (B, 4·width, ⌈H/stride⌉, ⌈W/stride⌉).
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dropout: float, kind: str) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1, self.norm1 = convolution(inputs, width, 1), NormalisedActivation(width)
        self.conv2, self.norm2 = convolution(width, width, 3, stride), NormalisedActivation(width)
        self.conv3, self.norm3 = convolution(width, outputs, 1), NormalisedActivation(outputs)
        self.shortcut = make_shortcut(inputs, outputs, stride, kind)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.dropout(self.norm1(self.conv1(features)))
        inner = self.dropout(self.norm2(self.conv2(inner)))
        return self.dropout(
            self.norm3(self.conv3(inner), self.shortcut(features), spare=is_spare(self.shortcut))
        )


class ResNet(nn.Module):
    """A residual network with ``hierarchy[s]`` blocks in stage ``s``.

    Maps are halved by a stride of 2 in the block after each number in ``downsample_after``; as
    published, in the first block of each stage but the first. From 64 pixels on the network begins
    with ImageNet's stem: a 7×7 convolution of stride 2 and a 3×3 maximum pooling of stride 2.

    Shapes: (B, in_chans, image_size, image_size) -> (B, num_classes).
    """

    pools_maps = False  # they are halved by a stride

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
        halvings = ends[:-1] if downsample_after is None else downsample_after
        check_downsampling(name, halvings, 0, ends[-1] - 1)
        _, kind, stage_widths = RESNETS[name]
        block = Bottleneck if kind == "bottleneck" else BasicBlock
        channels = scaled(stage_widths[0], width)
        self.stem = Stem(in_chans, channels, image_size >= LARGE_IMAGE, dropout)
        self.stages = nn.ModuleList()
        for passed, count, stage_width in zip((0, *ends), hierarchy, stage_widths, strict=False):
            blocks: list[nn.Module] = []
            for number in range(count):
                stride = 2 if passed + number in halvings else 1
                blocks.append(block(channels, scaled(stage_width, width), stride, dropout, kind))
                channels = scaled(stage_width, width) * block.expansion
            self.stages.append(nn.Sequential(*blocks))
        self.output = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for stage in self.stages:
            features = stage(features)
        return self.output(torch.mean(features, (2, 3)))  # global average pooling
