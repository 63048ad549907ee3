"""A gradient of maps that is the same within windows, kept as one number per window."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

LARGE_ELEMENTS = 1 << 21  # of smaller maps little memory could be saved, and saving it costs time


class WindowedGradient(Tensor):
    """What average pooling hands back: a number for each window, which holds for every pixel in it.

    It stands for a tensor of the maps' shape. Code that knows it takes it in stretches of examples, and the whole never lives;
    any other operation gets the whole.

    Args:
        coarse: (B, C, H / height, W / width), with the windows' height and width.
        shape: (B, C, H, W).
    """

    coarse: Tensor

    def __new__(cls, coarse: Tensor, shape: Sequence[int]) -> "WindowedGradient":
        made: WindowedGradient = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=coarse.dtype, device=coarse.device)
        made.coarse = coarse
        return made

    def stretches(self, examples: int) -> Sequence["WindowedGradient"]:
        """As ``split`` along the examples."""
        return [WindowedGradient(part, (len(part), *self.shape[1:])) for part in self.coarse.split(examples)]

    def whole(self) -> Tensor:
        """The tensor that it stands for, in the memory format of ``coarse``."""
        if self.coarse.is_contiguous() and self.device.type == "cpu":  # where interpolation takes several times as long
            height, width = (size // windows for size, windows in zip(self.shape[2:], self.coarse.shape[2:], strict=True))
            return self.coarse.repeat_interleave(width, 3).repeat_interleave(height, 2)
        return F.interpolate(self.coarse, self.shape[2:], mode="nearest-exact")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub of Tensor leaves out that it is a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


class Average(torch.autograd.Function):
    """Average pooling without gaps or overlaps, whose gradient is repeated within windows, or windowed.

    PyTorch's own backward pass is up to 18 times slower where maps are channels-last and the gradient, which comes back from a
    flattened map, is not (docs/log.md, 2026-11-26).
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, kernel: tuple[int, int], windowed: bool) -> Tensor:
        ctx.shape, ctx.area, ctx.windowed = maps.shape, kernel[0] * kernel[1], windowed
        last = maps.is_contiguous(memory_format=torch.channels_last)
        ctx.memory_format = torch.channels_last if last else torch.contiguous_format
        return F.avg_pool2d(maps, kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        coarse = (gradient / ctx.area).contiguous(memory_format=ctx.memory_format)
        windowed = WindowedGradient(coarse, ctx.shape)
        return windowed if ctx.windowed else windowed.whole(), None, None
