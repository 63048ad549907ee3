"""A convolution by matrix products where maps are a few pixels, for which PyTorch's own takes several times as long."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Pixels of a map up to which all three products of a convolution (its output and both gradients) are faster as matrix products,
# and up to which its weight's gradient is in half precision (docs/log.md, 2026-11-26).
FEW_PIXELS, FEW_PIXELS_HALF = 9, 16
LEAST_WEIGHTS = 9 << 14  # of smaller convolutions it makes no difference


class Convolution(nn.Conv2d):
    """A 3×3 convolution of stride 1, as PyTorch's; of small maps on a CPU, while it learns, by matrix products.

    Shapes: (B, inputs, H, W) -> (B, outputs, H, W).
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training or maps.device.type != "cpu" or self.weight.numel() < LEAST_WEIGHTS:
            return super().forward(maps)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            number_type = torch.get_autocast_dtype("cpu")
            maps, weight = maps.to(number_type), weight.to(number_type)
            bias = None if bias is None else bias.to(number_type)
        pixels, half = maps.shape[2] * maps.shape[3], weight.dtype.itemsize < 4
        if pixels > (FEW_PIXELS_HALF if half else FEW_PIXELS):
            return F.conv2d(maps, weight, bias, padding=1)
        convolved: Tensor = Product.apply(maps, weight, bias, pixels <= FEW_PIXELS)
        return convolved


class Product(torch.autograd.Function):
    """Y = C(X) W, where C(X) has a row for every pixel, of the 3×3 pixels around it.

    With G the gradient of Y: ∂W = C(X)' G, and ∂X = C(G) W̃, where W̃ is W mirrored in both directions of space and with inputs
    and outputs exchanged. Where ``whole`` is not set, PyTorch computes Y and ∂X.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None, whole: bool) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.whole = whole
        if not whole:
            return F.conv2d(maps, weight, bias, padding=1)
        return as_maps(F.linear(surroundings(maps), rows(weight), bias), maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        of_maps = of_weight = of_bias = None
        outputs = gradient.permute(0, 2, 3, 1).reshape(-1, len(weight))  # (B·H·W, outputs)
        if ctx.needs_input_grad[1]:
            product = outputs.T @ surroundings(maps)
            of_weight = product.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[2]:
            of_bias = outputs.sum(0)
        if ctx.needs_input_grad[0]:
            mirrored = weight.flip(2, 3).transpose(0, 1)
            if ctx.whole:
                of_maps = as_maps(F.linear(surroundings(gradient), rows(mirrored)), maps)
            else:
                of_maps = F.conv2d(gradient, mirrored, padding=1)
        return of_maps, of_weight, of_bias, None


def rows(weight: Tensor) -> Tensor:
    """(outputs, inputs, 3, 3) -> (outputs, 9 · inputs), in the order of ``surroundings``; of a channels-last weight no copy."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def surroundings(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B · H · W, 9 · C): for every pixel the 3×3 around it, zero outside the map, all channels of each."""
    count, channels, height, width = maps.shape
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    example, row, pixel, channel = padded.stride()
    windows = padded.as_strided((count, height, width, 3, 3, channels), (example, row, pixel, row, pixel, channel))
    return windows.reshape(count * height * width, 9 * channels)


def as_maps(pixels: Tensor, like: Tensor) -> Tensor:
    """(B · H · W, C) -> (B, C, H, W), in the layout of other maps of the same size."""
    maps = pixels.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2)
    return maps.contiguous() if like.is_contiguous() else maps
