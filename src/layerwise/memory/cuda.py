"""The memory that a GPU takes beside what a step asks for, as far as documents tell it.

PyTorch's allocator hands out whole blocks. cuDNN's convolutions on tensor cores read and write
channels last; contiguous maps are converted into copies of its own, and results back. Both are
reckoned here from shapes. Not known: what workspace cuDNN's chosen algorithm takes beyond that, and
the part of a large free block that the allocator leaves at the end of a smaller one, below 1 MiB.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 512  # bytes
ALIGNED = 16  # bytes: a pixel's channels fill whole ones in a copy for tensor cores
HOPPER = 9  # major number of its compute capability
# that PyTorch gives cuBLAS for each thread and stream, on Hopper and later and on earlier GPUs
CUBLAS, EARLIER_CUBLAS = 32 * 2**20, (2 * 4096 + 8 * 16) * 2**10
THREADS = 2  # that multiply matrices: of forward and of backward passes


def libraries_bytes(device: torch.device) -> int:
    """Bytes that cuBLAS holds for the steps of a stream; of Hopper if no GPU is there."""
    earlier = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < HOPPER
    return THREADS * (EARLIER_CUBLAS if earlier else CUBLAS)


def block_bytes(size: int) -> int:
    """Bytes that the allocator counts for a storage: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def workspace_bytes(func: Any, args: Sequence[Any], result: Any) -> int:
    """The most bytes that a convolution has alive at once, or 0 of any other operation.

    Its result counts, its arguments do not.

    Args:
        func: the operation.
        args: its arguments.
        result: its result.
    """
    if func is torch.ops.aten.convolution.default and is_converted(*args[:2]):
        maps, weight = args[:2]
        return result.nbytes + converted(maps, weight, result)
    if func is torch.ops.aten.convolution_backward.default and is_converted(*args[1:3]):
        gradient, maps, weight = args[:3]
        of_maps, of_weight = args[10][:2]
        first = maps.nbytes + converted(gradient, weight, maps) if of_maps else 0
        second = weight.nbytes + converted(gradient, maps, weight) if of_weight else 0
        return max(first, second + (maps.nbytes if of_maps else 0))
    return 0


def is_converted(maps: Tensor, weight: Tensor) -> bool:
    """Whether cuDNN converts the maps of a convolution."""
    grouped = weight.shape[1] != maps.shape[1]
    last = maps.is_contiguous(memory_format=torch.channels_last)
    return maps.dim() == 4 and not grouped and not last


def converted(*tensors: Tensor) -> int:
    """Bytes of copies of these tensors, (·, C, H, W), with channels last."""
    return sum(map(aligned_bytes, tensors))


def aligned_bytes(tensor: Tensor) -> int:
    count, channels, *size = tensor.shape
    aligned = -(-channels * tensor.itemsize // ALIGNED) * ALIGNED
    return count * aligned * torch.Size(size).numel()
