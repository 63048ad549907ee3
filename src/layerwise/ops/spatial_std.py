"""The standard deviation of maps over space, for the similarity loss, without copies of them."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from layerwise.utils.device import device_kind, is_counted

# size of a part that stays in a core's cache from one pass over it to the next
CACHED_ELEMENTS = 1 << 17
# few operations for very large maps, of which a part is then less than a hundredth
MOST_PARTS = 128
ROUNDING = (
    1e-4  # deviation relative to the mean, below which rounding of the mean may be part of it
)


def spatial_deviation(maps: Tensor) -> Tensor:
    """Standard deviation of every channel over space, as ``maps.std((2, 3))`` in at least float32.

    The maps are consumed: backward writes their gradient over them. Nothing else may need them, and
    backward runs once.

    Shapes: (B, C, H, W) with H · W > 1 -> (B, C).
    """
    deviations: Tensor = Deviation.apply(maps)
    return deviations


class Deviation(torch.autograd.Function):
    """σ = √(Σ (x − μ)² / (n − 1)) over the n pixels of a channel.

    The gradient of σ is (x − μ) / (σ (n − 1)).
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        kernels = kernels_for(maps)
        compute = (
            kernels.deviation
            if kernels
            else in_pieces
            if device_kind(maps) == "cpu"
            else in_one_pass
        )
        mean, deviation = compute(maps)
        ctx.save_for_backward(maps, mean, deviation)
        ctx.spent = False
        return deviation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if ctx.spent:
            raise RuntimeError(
                "Cannot run backward: the gradient of a similarity loss was asked for twice, and "
                "the first time overwrote its maps. Run backward once."
            )
        ctx.spent = True
        maps, means, deviation = ctx.saved_tensors
        if kernels := kernels_for(maps):
            written: Tensor = kernels.write_gradient(maps, means, deviation, gradient)
            return written
        # a channel that is constant over space has gradient 0, as torch.std gives it
        factors = torch.where(
            deviation > 0, gradient / (deviation * (maps[0, 0].numel() - 1)), 0.0
        )[..., None, None]
        if device_kind(maps) != "cpu":
            return write_at_once(maps, means, factors)
        for part, mean, factor in zip(
            parts(maps), means.split(examples(maps)), factors.split(examples(maps)), strict=True
        ):
            part.copy_(part.sub(mean).mul_(factor))
        return maps


def kernels_for(maps: Tensor) -> ModuleType | None:
    """Triton's kernels for these maps, on a GPU where Triton is installed and can compile."""
    if device_kind(maps) != "cuda" or is_counted():
        return None
    try:
        from layerwise.ops import spatial_std_triton
    except ImportError:
        return None
    return (
        spatial_std_triton
        if maps.dtype in spatial_std_triton.KINDS and spatial_std_triton.usable(maps.device)
        else None
    )


def in_one_pass(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Means (B, C, 1, 1) and standard deviations (B, C), in at least float32.

    It is one operation, for a GPU. Where memory is counted, it stands for Triton's kernels, which
    read half precision as it is.
    """
    wide = torch.promote_types(maps.dtype, torch.float32)
    read = maps if is_counted() else maps.to(wide)
    variance, mean = torch.var_mean(read, (2, 3), keepdim=True)
    return mean.to(wide), variance.sqrt_().flatten(1).to(wide)


def write_at_once(maps: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """Write (x − μ) f over the maps x, for a GPU; means and factors are (B, C, 1, 1)."""
    return torch.addcmul(-means * factors, maps, factors, out=maps)


def in_pieces(maps: Tensor) -> tuple[Tensor, Tensor]:
    """As ``in_one_pass``, for a CPU: one part at a time, which stays in its caches."""
    means, deviations = map(torch.cat, zip(*map(moments, parts(maps)), strict=True))
    if bool((deviations < ROUNDING * means.abs().flatten(1)).any()):
        # some channel is constant, or nearly: from its first pixel on, that is exact
        means, deviations = map(torch.cat, zip(*map(shifted_moments, parts(maps)), strict=True))
    return means, deviations


def moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Means (B, C, 1, 1) and standard deviations (B, C) of maps, in at least float32."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    mean = maps.mean((2, 3), keepdim=True)
    squares = (maps - mean).square_().sum((2, 3))
    return mean, squares.div_(maps[0, 0].numel() - 1).sqrt_()


def shifted_moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """As ``moments``, of each channel less its first pixel."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    first = maps[..., :1, :1]
    mean, deviation = moments(maps - first)
    return first + mean, deviation


def examples(maps: Tensor) -> int:
    """Number of examples taken at a time."""
    return max(1, CACHED_ELEMENTS // maps[0].numel(), -(-len(maps) // MOST_PARTS))


def parts(maps: Tensor) -> Iterator[Tensor]:
    yield from maps.split(examples(maps))
