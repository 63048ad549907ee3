"""Gradients of maps that are not made whole, such as one that is constant within windows."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from layerwise.utils.device import device_kind

LARGE_ELEMENTS = 1 << 21  # with smaller maps, parts would save little memory and cost time


class GradientInParts(Tensor):
    """A gradient of maps, of their shape, that is made when it is read.

    Code that knows the class takes it in segments of examples, and the whole never exists. Any
    other operation gets the whole.
    """

    @abstractmethod
    def segments(self, examples: int) -> Sequence[Tensor]:
        """The gradient in segments of so many examples, as ``Tensor.split`` gives them."""

    @abstractmethod
    def whole(self) -> Tensor:
        """The tensor that it stands for."""

    @classmethod
    # the stub of Tensor leaves out that it is a class method
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = made_whole((args, kwargs or {}))
        return func(*args, **kwargs)


def made_whole(values: Any) -> Any:
    """The same lists, tuples and dictionaries of values, without gradients in parts."""
    return tree_map_only(GradientInParts, lambda gradient: gradient.whole(), values)


class WindowedGradient(GradientInParts):
    """The gradient of average pooling: a number for each window, valid for every pixel in it.

    Args:
        coarse: the numbers, (B, C, H / height, W / width), with the windows' height and width.
        shape: shape of the maps, (B, C, H, W).
    """

    coarse: Tensor

    def __new__(cls, coarse: Tensor, shape: Sequence[int]) -> "WindowedGradient":
        made: WindowedGradient = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=coarse.dtype, device=coarse.device
        )
        made.coarse = coarse
        return made

    def segments(self, examples: int) -> Sequence["WindowedGradient"]:
        return [
            WindowedGradient(part, (len(part), *self.shape[1:]))
            for part in self.coarse.split(examples)
        ]

    def whole(self) -> Tensor:
        """In the memory format of ``coarse``."""
        contiguous = self.coarse.is_contiguous()
        if device_kind(self) != "cpu":
            made = torch.empty(
                self.shape,
                dtype=self.dtype,
                device=self.device,
                memory_format=memory_format_of(self.coarse),
            )
            windows(made, self.window).copy_(self.coarse[:, :, :, None, :, None])
            return made
        if contiguous:  # where interpolation takes several times as long
            return self.coarse.repeat_interleave(self.window[1], 3).repeat_interleave(
                self.window[0], 2
            )
        return F.interpolate(self.coarse, self.shape[2:], mode="nearest-exact")

    def added_to(self, maps: Tensor) -> Tensor:
        """The sum with maps of the same shape, in their memory format, without the whole."""
        return (
            (windows(maps, self.window) + self.coarse[:, :, :, None, :, None])
            .flatten(4, 5)
            .flatten(2, 3)
        )

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the windows."""
        return self.shape[2] // self.coarse.shape[2], self.shape[3] // self.coarse.shape[3]

    @classmethod
    # the stub of Tensor leaves out that it is a class method
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # the sum that autograd makes of the gradients from two readers
        if func is torch.ops.aten.add.Tensor and len(args) == 2 and not kwargs:
            windowed, addend = args if isinstance(args[0], cls) else reversed(args)
            if (
                not isinstance(addend, GradientInParts)
                and isinstance(addend, Tensor)
                and addend.shape == windowed.shape
            ):
                return windowed.added_to(addend)
        return super().__torch_dispatch__(func, types, args, kwargs)


def windows(maps: Tensor, window: tuple[int, int]) -> Tensor:
    """A view of maps (B, C, H, W) as (B, C, H / height, height, W / width, width)."""
    return maps.unflatten(3, (-1, window[1])).unflatten(2, (-1, window[0]))


class Average(torch.autograd.Function):
    """Average pooling without gaps or overlaps, with a fast backward pass.

    The gradient is repeated within windows, or a ``WindowedGradient``. PyTorch's own backward pass
    is up to 18 times slower where maps are channels-last and the gradient, which comes back from a
    flattened map, is not (docs/log.md, 2026-11-26).
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, kernel: tuple[int, int], windowed: bool) -> Tensor:
        ctx.shape, ctx.area, ctx.memory_format = (
            maps.shape,
            kernel[0] * kernel[1],
            memory_format_of(maps),
        )
        # on a GPU it is added to other gradients faster than the whole
        ctx.windowed = windowed or device_kind(maps) != "cpu"
        return F.avg_pool2d(maps, kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        coarse = (gradient / ctx.area).contiguous(memory_format=ctx.memory_format)
        windowed = WindowedGradient(coarse, ctx.shape)
        # a gradient of the gradient needs a history, which a windowed one has not
        in_parts = ctx.windowed and not torch.is_grad_enabled()
        return windowed if in_parts else windowed.whole(), None, None


def memory_format_of(maps: Tensor) -> torch.memory_format:
    """The memory format of maps."""
    return (
        torch.channels_last
        if maps.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
