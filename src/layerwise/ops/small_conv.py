"""A convolution of small maps by matrix products, where PyTorch's own takes longer."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from layerwise.utils.device import device_kind

convolution_backward = torch.ops.aten.convolution_backward
GEOMETRY = (
    [1, 1],
    [1, 1],
    [1, 1],
    False,
    [0, 0],
    1,
)  # stride, padding, dilation; not transposed, and so no output padding; groups
LEAST_WEIGHTS = 9 << 14  # smaller convolutions take as long either way
MOST_PIXELS = 9  # of the largest map whose output and both gradients are products
WEIGHT_PIXELS = 16  # of the largest map whose weight's gradient is a product


@cache
def has_matrix_unit() -> bool:
    """Whether the processor has Intel's matrix unit (AMX)."""
    return torch.cpu._is_amx_tile_supported()


class Convolution(nn.Conv2d):
    """A 3×3 convolution of stride 1, as PyTorch's, by matrix products where those are faster.

    They are faster for small maps in bfloat16, in training on a CPU with a matrix unit
    (docs/log.md, 2026-11-26 and 2026-11-27). Results are then rounded differently.

    Shapes: (B, inputs, H, W) -> (B, outputs, H, W).
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        if not self.is_by_products(maps):
            return super().forward(maps)
        bias = None if self.bias is None else self.bias.bfloat16()
        whole = pixels(maps) <= MOST_PIXELS
        convolved: Tensor = Product.apply(maps.bfloat16(), self.weight.bfloat16(), bias, whole)
        return convolved

    def is_by_products(self, maps: Tensor) -> bool:
        learns_here = (
            self.training and device_kind(maps) == "cpu" and self.weight.numel() >= LEAST_WEIGHTS
        )
        fast = computed_type(self.weight) is torch.bfloat16 and has_matrix_unit()
        return learns_here and fast and pixels(maps) <= WEIGHT_PIXELS


def pixels(maps: Tensor) -> int:
    return maps.shape[2] * maps.shape[3]


def computed_type(weight: Tensor) -> torch.dtype:
    """The number type that a convolution with this weight is computed in on a CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


class Product(torch.autograd.Function):
    """Y = C(X) W, where C(X) has a row for every pixel: the 3×3 pixels around it.

    With G the gradient of Y, ∂W = C(X)' G and ∂X = C(G) W̃, where W̃ is W mirrored in both
    directions of space and with inputs and outputs exchanged. Where ``whole`` is not set, PyTorch
    computes Y and ∂X, and ∂W alone is a product. C is made for some examples at a time, so that it
    uses less memory than the gradient of W.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None, whole: bool) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.whole = whole
        if not whole:
            return F.conv2d(maps, weight, bias, padding=1)
        return product(maps, rows(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        of_maps = of_weight = of_bias = None
        if ctx.needs_input_grad[0] and ctx.whole:
            of_maps = product(gradient, mirrored_rows(weight), None)
        elif ctx.needs_input_grad[0]:
            of_maps = convolution_backward(
                gradient, maps, weight, None, *GEOMETRY, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(maps, gradient, weight)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 2, 3))
        return of_maps, of_weight, of_bias, None


def product(maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """C(X) W, in the memory format of the maps.

    Shapes: (B, C, H, W) and (outputs, 9 · C) -> (B, outputs, H, W).
    """
    made = maps.new_empty(len(maps), *maps.shape[2:], len(weight))
    size = examples(maps, len(weight))
    for part, out in zip(maps.split(size), made.split(size), strict=True):
        out.copy_(F.linear(surroundings(part), weight, bias).view_as(out))
    convolved = made.permute(0, 3, 1, 2)
    return convolved.contiguous() if maps.is_contiguous() else convolved


def weight_gradient(maps: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """∂W = C(X)' G, summed in float32 at least: (outputs, C, 3, 3)."""
    outputs, inputs = weight.shape[:2]
    total = weight.new_zeros(
        outputs, 9 * inputs, dtype=torch.promote_types(weight.dtype, torch.float32)
    )
    size = examples(maps, outputs)
    for part, of_part in zip(maps.split(size), gradient.split(size), strict=True):
        flat = of_part.permute(0, 2, 3, 1).reshape(-1, outputs).T
        if total.dtype == flat.dtype:
            total.addmm_(flat, surroundings(part))
        else:
            total += flat @ surroundings(part)
    return total.to(weight.dtype).view(outputs, 3, 3, inputs).permute(0, 3, 1, 2)


def examples(maps: Tensor, outputs: int) -> int:
    """Number of examples taken at a time.

    They have half as many pixels as there are outputs, so C(X) is half as large as the weight.
    """
    return max(1, outputs // (2 * maps.shape[2] * maps.shape[3]))


def rows(weight: Tensor) -> Tensor:
    """The weight as a matrix, in the order of ``surroundings``; no copy if it is channels-last.

    Shapes: (outputs, inputs, 3, 3) -> (outputs, 9 · inputs).
    """
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def mirrored_rows(weight: Tensor) -> Tensor:
    """``rows`` of W̃: (outputs, inputs, 3, 3) -> (inputs, 9 · outputs), in one copy."""
    outputs, inputs = weight.shape[:2]
    made = weight.new_empty(inputs, 3, 3, outputs)
    for row in range(3):
        for column in range(3):
            made[:, row, column] = weight[:, :, 2 - row, 2 - column].T
    return made.view(inputs, -1)


def surroundings(maps: Tensor) -> Tensor:
    """C(X): for every pixel the 3×3 pixels around it, zero outside the map, with all channels.

    Shapes: (B, C, H, W) -> (B · H · W, 9 · C).
    """
    count, channels, height, width = maps.shape
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    example, row, pixel, channel = padded.stride()
    windows = padded.as_strided(
        (count, height, width, 3, 3, channels), (example, row, pixel, row, pixel, channel)
    )
    return windows.reshape(count * height * width, 9 * channels)
