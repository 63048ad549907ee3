"""GPU kernels, compiled by Triton, of the deviation over space and its gradient.

Each reads the maps once. PyTorch's own operations first convert half-precision maps to float32 and
write maps that are read again.
"""

import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from layerwise.errors import reason_of

KINDS = (torch.float32, torch.bfloat16, torch.float16)  # of maps; sums are in float32
# sizes of a tile; LEAST_CHANNELS for contiguous maps, whose channels lie apart
MOST_PIXELS, LEAST_CHANNELS, CHANNELS = 128, 4, 32


@cache
def usable(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device.

    That takes a C compiler, which not every machine has.
    """
    try:
        deviation(torch.zeros(1, 4, 2, 2, device=device))
    except Exception as error:  # of many kinds: no compiler, headers missing, a device too old
        reason = reason_of(error)
        warnings.warn(
            f"Cannot compile the kernels of the similarity loss: {reason}. It takes longer without "
            "them.",
            stacklevel=2,
        )
        return False
    return True


def deviation(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over space, in float32.

    Shapes: (B, C, H, W) -> (B, C, 1, 1), (B, C).
    """
    count, channels, height, width = maps.shape
    maps = dense(maps)
    mean, deviations = (torch.empty(count, channels, device=maps.device) for _ in range(2))
    tile = tile_size(maps)
    grid = (count, triton.cdiv(channels, tile[0]))
    with torch.cuda.device_of(maps):
        deviation_kernel[grid](
            maps, mean, deviations, channels, height * width, *strides(maps), *tile
        )
    return mean[..., None, None], deviations


def write_gradient(maps: Tensor, mean: Tensor, deviations: Tensor, gradient: Tensor) -> Tensor:
    """Write g (x − μ) / (σ (n − 1)) over the maps x and return them; 0 where σ = 0."""
    count, channels, height, width = maps.shape
    written = dense(maps)
    tile = tile_size(written)
    grid = (count, triton.cdiv(channels, tile[0]), triton.cdiv(height * width, tile[1]))
    arguments = (mean.contiguous(), deviations.contiguous(), gradient.contiguous())
    with torch.cuda.device_of(maps):
        gradient_kernel[grid](
            written, *arguments, channels, height * width, *strides(written), *tile
        )
    return written


def dense(maps: Tensor) -> Tensor:
    """Maps whose pixels all lie at the same distance from the next; copied if they do not."""
    last = maps.is_contiguous(memory_format=torch.channels_last)
    return maps if last or maps.is_contiguous() else maps.contiguous()


def strides(maps: Tensor) -> tuple[int, int, int]:
    """Elements from one example, channel and pixel to the next.

    Where a side is one pixel, a tensor's own strides say nothing.
    """
    channels, pixels = maps.shape[1], maps.shape[2] * maps.shape[3]
    return channels * pixels, *((pixels, 1) if maps.is_contiguous() else (1, channels))


def tile_size(maps: Tensor) -> tuple[int, int]:
    """Channels and pixels that a program takes at a time."""
    pixels = min(MOST_PIXELS, triton.next_power_of_2(maps.shape[2] * maps.shape[3]))
    return (LEAST_CHANNELS if maps.is_contiguous() else CHANNELS), pixels


@triton.jit
def deviation_kernel(
    maps,
    mean,
    deviations,
    channels,
    pixels,
    of_example,
    of_channel,
    of_pixel,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    base = maps + example * of_example
    # sums of differences from the first pixel, so that a mean far from zero costs no precision
    first = tl.load(base + channel * of_channel, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        inside = (pixel[:, None] < pixels) & there[None, :]
        values = tl.load(
            base + pixel[:, None] * of_pixel + channel[None, :] * of_channel, mask=inside, other=0.0
        )
        difference = tl.where(inside, values.to(tl.float32) - first[None, :], 0.0)
        total += tl.sum(difference, 0)
        squares += tl.sum(difference * difference, 0)
    variance = (squares - total * total / pixels) / (pixels - 1)
    place = example * channels + channel
    tl.store(mean + place, first + total / pixels, mask=there)
    tl.store(deviations + place, tl.sqrt(tl.where(variance < 0, 0.0, variance)), mask=there)


@triton.jit
def gradient_kernel(
    maps,
    mean,
    deviations,
    gradient,
    channels,
    pixels,
    of_example,
    of_channel,
    of_pixel,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    example = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    there = channel < channels
    place = example * channels + channel
    middle = tl.load(mean + place, mask=there, other=0.0)
    deviation = tl.load(deviations + place, mask=there, other=0.0)
    factor = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
    factor = tl.where(deviation > 0, factor / (deviation * (pixels - 1)), 0.0)
    inside = (pixel[:, None] < pixels) & there[None, :]
    address = (
        maps + example * of_example + pixel[:, None] * of_pixel + channel[None, :] * of_channel
    )
    values = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        address,
        ((values - middle[None, :]) * factor[None, :]).to(maps.dtype.element_ty),
        mask=inside,
    )
