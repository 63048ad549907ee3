"""Average pooling of features, the first operation of auxiliary heads."""

from torch import Tensor
from torch.nn import functional as F

from layerwise.ops.windowed_gradient import LARGE_ELEMENTS, Average

Kernel = tuple[int, int] | None  # None: as it is


def averaging(shape: tuple[int, ...], size: int | None) -> tuple[Kernel, tuple[int, ...]]:
    """The kernel that pools maps (C, H, W) to at most ``size`` pixels a side, and the new shape.

    Vectors (C,), and maps that are small enough, stay as they are.
    """
    if len(shape) != 3 or size is None:
        return None, shape
    _, height, width = shape
    kernel = -(-height // size), -(-width // size)
    return (None, shape) if kernel == (1, 1) else (kernel, averaged(shape, kernel))


def averaged(shape: tuple[int, ...], kernel: tuple[int, int]) -> tuple[int, ...]:
    """The shape of maps (C, H, W) after ``average``."""
    channels, height, width = shape
    return channels, -(-height // kernel[0]), -(-width // kernel[1])


def pooling_kernel(shape: tuple[int, ...], decoder_dim: int) -> Kernel:
    """The kernel that pools maps (C, H, W) to at most ``decoder_dim`` numbers.

    Its height and its width double in turn until the pooled map is small enough or one pixel.
    Vectors (C,), and maps that are small enough, stay as they are.
    """
    if len(shape) != 3:
        return None
    channels, height, width = shape
    kernel = [1, 1]
    turn = 0
    while channels * -(-height // kernel[0]) * -(-width // kernel[1]) > decoder_dim:
        if kernel[0] >= height and kernel[1] >= width:
            break
        kernel[turn] *= 2
        turn = 1 - turn
    return None if kernel == [1, 1] else (min(kernel[0], height), min(kernel[1], width))


def average(features: Tensor, kernel: Kernel, windowed: bool = False) -> Tensor:
    """Average pooling; a window at the border averages the pixels that are there.

    Shapes: (B, C, H, W) -> (B, C, ⌈H/k⌉, ⌈W/k⌉).

    Args:
        features: maps, or anything at all if the kernel is None.
        kernel: height and width of the windows; None: features stay as they are.
        windowed: keep the gradient as one number per window, where windows are whole.
    """
    if kernel is None:
        return features
    if features.shape[2] % kernel[0] or features.shape[3] % kernel[1]:
        return F.avg_pool2d(features, kernel, ceil_mode=True)
    averages: Tensor = Average.apply(features, kernel, windowed)
    return averages


def average_alone(features: Tensor, kernel: Kernel) -> Tensor:
    """``average`` of features that nothing else in the loss reads.

    The gradient of large maps is kept as one number per window until the unit's last operation
    takes it in parts, so the whole gradient never exists.
    """
    return average(features, kernel, windowed=features.numel() >= LARGE_ELEMENTS)
