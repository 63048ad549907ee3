"""How a feature is kept: as it is, or in fewer bytes; and where in the table that all images share."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 8  # bytes, of the widest number type


class Cast:
    """Numbers kept in another type, or in their own."""

    constants = 0  # numbers per channel that a part of the images needs beside it

    def __init__(self, kept: torch.dtype | None) -> None:
        self.kept = kept

    def kept_type(self, given: torch.dtype) -> torch.dtype:
        return self.kept or given

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values.to(self.kept_type(values.dtype)), values.new_empty(0, channels(values))

    def decode(self, kept: Tensor, constants: Tensor, given: torch.dtype) -> Tensor:
        return kept.to(given)


class Quantised:
    """Numbers kept as bytes: the nearest of 256 values spread evenly over their channel's range in a part of the images.

    The error is at most half the distance of two of them, which is the range / 255.
    """

    constants = 2  # the least value, and the distance

    def kept_type(self, given: torch.dtype) -> torch.dtype:
        return torch.uint8

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(P, C, ...) -> bytes of the same shape, and the constants (2, C)."""
        cells = values.float()
        others = [dim for dim in range(values.dim()) if dim != 1]
        low, high = cells.amin(others, keepdim=True), cells.amax(others, keepdim=True)
        distance = (high - low) / 255
        levels = (cells - low) / distance.clamp_min(torch.finfo(torch.float32).tiny)
        constants = torch.stack([low, distance]).view(2, channels(values))
        return levels.round_().clamp_(0, 255).to(torch.uint8), constants

    def decode(self, kept: Tensor, constants: Tensor, given: torch.dtype) -> Tensor:
        """Bytes (B, C, ...) and each image's constants (B, 2, C) -> values of the same shape."""
        low, distance = constants.view(len(kept), 2, *kept.shape[1:2], *[1] * (kept.dim() - 2)).unbind(1)
        return torch.addcmul(low, kept.float(), distance).to(given)


def channels(values: Tensor) -> int:
    return values.shape[1] if values.dim() > 1 else 1


Codec = Cast | Quantised

CODECS: dict[str, Codec] = {"float32": Cast(None), "bfloat16": Cast(torch.bfloat16), "uint8": Quantised()}


class Kind(NamedTuple):
    """One of the tensors that enter a unit: for each image, a tensor of this shape and type, kept by this codec.

    Attributes:
        channels_last: whether maps lie in this order, and are kept so.
    """

    shape: torch.Size
    type: torch.dtype
    codec: Codec
    channels_last: bool = False

    @property
    def row_bytes(self) -> int:
        used = math.prod(self.shape) * self.codec.kept_type(self.type).itemsize
        return -(-used // ALIGNMENT) * ALIGNMENT

    @property
    def constant_bytes(self) -> int:
        """Of one part of the images."""
        return 4 * self.codec.constants * (self.shape[0] if self.shape else 1)


def kind_of(values: Tensor, codec: Codec) -> Kind:
    """Of a tensor with an entry per image."""
    channels_last = values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last)
    return Kind(values.shape[1:], values.dtype, codec, channels_last)


class Column:
    """One of the tensors that enter a unit, of all images: a stretch of every row, and constants of every part."""

    def __init__(self, kind: Kind, rows: Tensor, offset: int, parts: int, device: torch.device) -> None:
        self.kind, self.device = kind, device
        kept = kind.codec.kept_type(kind.type)
        self.cells = rows[:, offset : offset + math.prod(kind.shape) * kept.itemsize].view(kept)
        self.constants = torch.empty(parts, kind.codec.constants, kind.shape[0] if kind.shape else 1, device=device)

    def write(self, values: Tensor, first: int, part: int) -> None:
        kept, self.constants[part] = self.kind.codec.encode(values)
        if self.kind.channels_last:
            kept = kept.permute(0, 2, 3, 1)
        self.cells[first : first + len(kept)] = kept.reshape(len(kept), -1).to(self.cells.device)

    def read(self, rows: Tensor, parts: Tensor) -> Tensor:
        kept = self.cells.index_select(0, rows.to(self.cells.device))
        if self.kind.channels_last:
            count, height, width = self.kind.shape
            kept = kept.view(-1, height, width, count).permute(0, 3, 1, 2)
        else:
            kept = kept.view(-1, *self.kind.shape)
        return self.kind.codec.decode(kept.to(self.device), self.constants[parts], self.kind.type)
