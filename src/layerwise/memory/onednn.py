"""Memory that a CPU's convolutions use inside themselves: the copies that oneDNN makes.

It computes on channels in blocks. Contiguous maps are copied into blocks and back. Maps in
channels-last are read as they are, and only weights are copied; where maps or weights alone are in
channels-last, the others are copied into it first. This was measured with torch 2.13 on processors
with AVX-512 (docs/log.md, 2026-12-01). With AVX2 alone, the weight's gradient behind maps of 2×2
pixels and fewer takes more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.utils.device import device_kind

BLOCK = 16  # channels
FEW_CHANNELS = 3  # maps of so few channels, such as images, are read as they are
TYPES = (torch.float32, torch.bfloat16)


def workspace_bytes(func: Any, args: Sequence[Any], result: Any) -> int:
    """The most bytes that a convolution has alive at once, or 0 of any other operation.

    Its result counts, its arguments do not.

    Args:
        func: the operation.
        args: its arguments.
        result: its result.
    """
    if func is torch.ops.aten.convolution.default:
        maps, weight = args[:2]
        return forward_bytes(maps, weight, result) if is_known(maps, transposed=args[6]) else 0
    if func is torch.ops.aten.convolution_backward.default:
        gradient, maps, weight = args[:3]
        return (
            backward_bytes(gradient, maps, weight, args)
            if is_known(maps, transposed=args[7])
            else 0
        )
    return 0


def is_known(maps: Tensor, transposed: bool) -> bool:
    """Whether the copies of such a convolution were measured."""
    return device_kind(maps) == "cpu" and maps.dim() == 4 and maps.dtype in TYPES and not transposed


def forward_bytes(maps: Tensor, weight: Tensor, result: Tensor) -> int:
    if in_channels_last(maps, weight):
        return rewritten(maps, weight) + result.nbytes + weight.nbytes
    return max(read(maps) + weight.nbytes, result.nbytes) + blocked(result.shape, maps)


def backward_bytes(gradient: Tensor, maps: Tensor, weight: Tensor, args: Sequence[Any]) -> int:
    """The most bytes of a backward pass: first the maps' gradient, then the weight's."""
    of_maps, of_weight = args[10][:2]
    result = plain(maps.shape, maps) if of_maps else 0
    if in_channels_last(maps, weight):
        if not (of_maps or of_weight):  # the bias alone
            return 0
        of_weights = (3 if of_weight else 1) * weight.nbytes
        return rewritten(gradient, maps, weight) + result + of_weights
    copied, needs = blocked(gradient.shape, maps), [0]
    if of_maps:
        returned = 2 * result if max(args[4]) > 1 else result
        needs.append(max(copied + weight.nbytes, returned) + blocked(maps.shape, maps))
    if of_weight:
        # in bfloat16 the weight's gradient is summed in float32
        sums = 3 if maps.dtype is torch.bfloat16 else 1
        needs.append(result + max(copied + read(maps) + sums * weight.nbytes, 2 * weight.nbytes))
    return max(needs)


def in_channels_last(maps: Tensor, weight: Tensor) -> bool:
    """Whether a convolution computes in channels-last: either its maps or its weight is."""
    return is_channels_last(maps) or is_channels_last(weight)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is in channels-last, and not in both formats, as of one pixel."""
    return is_readable(tensor) and not tensor.is_contiguous()


def is_readable(tensor: Tensor) -> bool:
    """Whether a computation in channels-last reads a tensor as it is."""
    return tensor.is_contiguous(memory_format=torch.channels_last)


def rewritten(*tensors: Tensor) -> int:
    """Bytes of the copies in channels-last of those tensors that are in another format."""
    return sum(plain(each.shape, each) for each in tensors if not is_readable(each))


def plain(shape: Sequence[int], like: Tensor) -> int:
    """Bytes of a tensor of this shape and the type of another."""
    return torch.Size(shape).numel() * like.itemsize


def read(maps: Tensor) -> int:
    """Bytes of the copy of contiguous maps that is read."""
    return 0 if maps.shape[1] <= FEW_CHANNELS else blocked(maps.shape, maps)


def blocked(shape: Sequence[int], like: Tensor) -> int:
    """Bytes of a copy whose channels fill whole blocks."""
    count, channels, *size = shape
    return plain((count, -(-channels // BLOCK) * BLOCK, *size), like)
