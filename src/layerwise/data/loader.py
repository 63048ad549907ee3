"""Images on the device as one uint8 tensor, augmented by the batch.

Every random draw is a function of the seed, the epoch and the image's number: an epoch can be
entered anywhere, and an image looks the same in whichever batch it comes.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layerwise.errors import InvalidInput
from layerwise.utils.seeds import derived_seed


class Pixels(Protocol):
    """Images by number: a tensor in memory, or files that are read when needed."""

    def __len__(self) -> int: ...
    def stream(
        self, batches: Sequence[Tensor]
    ) -> Iterator[Tensor]: ...  # indices -> (B, C, H, W) uint8
    def pick(self, indices: Tensor) -> "Pixels": ...
    def to(self, device: torch.device) -> "Pixels": ...


class PixelsInMemory:
    """All images of a set as one tensor, (N, C, H, W) uint8, on the device that trains."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        for indices in batches:
            yield self.images[indices]

    def pick(self, indices: Tensor) -> "PixelsInMemory":
        return PixelsInMemory(self.images[indices])

    def to(self, device: torch.device) -> "PixelsInMemory":
        return PixelsInMemory(self.images.to(device))


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images, drawn for each image on its own.

    Attributes:
        padding: pixels of black border from which a crop of the original size is taken.
        flip: mirror left and right with probability one half.
        cutout: side in pixels of a square set to the mean (DeVries & Taylor 2017); 0: none.
    """

    padding: int = 0
    flip: bool = False
    cutout: int = 0

    def draw(self, count: int, size: int, seed: int) -> "Draws":
        generator = torch.Generator().manual_seed(seed)
        return Draws(
            torch.randint(-self.padding, self.padding + 1, (count, 2), generator=generator),
            (torch.rand(count, generator=generator) < 0.5) & self.flip,
            torch.randint(0, size, (count, 2), generator=generator),
        )


@dataclass(frozen=True)
class Draws:
    """Random draws for N images.

    Attributes:
        offsets: of the crops, (N, 2) pixels.
        flips: whether the image is mirrored, (N,).
        centres: of the blanked squares, (N, 2) pixels.
    """

    offsets: Tensor
    flips: Tensor
    centres: Tensor

    def pick(self, indices: Tensor) -> "Draws":
        return Draws(self.offsets[indices], self.flips[indices], self.centres[indices])

    def to(self, device: torch.device) -> "Draws":
        return Draws(self.offsets.to(device), self.flips.to(device), self.centres.to(device))


def crop_and_flip(pixels: Tensor, draws: Draws) -> Tensor:
    """Shift every image by its offset and mirror those drawn, (B, C, H, W) uint8 -> same.

    Pixels that come from outside the image are black.
    """
    count, _, height, width = pixels.shape
    rows = draws.offsets[:, :1] + torch.arange(height, device=pixels.device)  # (B, H)
    columns = draws.offsets[:, 1:] + torch.arange(width, device=pixels.device)  # (B, W)
    columns = torch.where(draws.flips[:, None], columns.flip(1), columns)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    batch = torch.arange(count, device=pixels.device)[:, None, None]
    picked = pixels[
        batch, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]  # (B, H, W, C)
    return (picked * inside[..., None]).permute(0, 3, 1, 2)


def cut_out(images: Tensor, draws: Draws, side: int) -> Tensor:
    """Set a square around every image's drawn centre to 0, the mean, (B, C, H, W) -> same.

    The square may reach over the border.
    """
    _, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) - draws.centres[:, :1] + side // 2  # (B, H)
    columns = torch.arange(width, device=images.device) - draws.centres[:, 1:] + side // 2
    blank = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[
        :, None, :
    ]
    return images.masked_fill(blank[:, None], 0.0)


@dataclass(frozen=True)
class Share:
    """A replica's part of every batch.

    Attributes:
        replica: number of the replica, from 0.
        count: number of replicas.
        parts: parts that a batch is computed in one after the other, each of which is shared.
    """

    replica: int = 0
    count: int = 1
    parts: int = 1

    @property
    def smallest_batch(self) -> int:
        """Images of a batch that all replicas can learn from."""
        return 2 * self.count

    def of(self, indices: Tensor) -> Tensor:
        """The replica's images among those of a batch."""
        if self.count == 1:
            return indices
        parts = max(1, min(self.parts, len(indices) // self.smallest_batch))
        shares = [part.tensor_split(self.count) for part in indices.tensor_split(parts)]
        return torch.cat([share[self.replica] for share in shares])


WHOLE = Share()


class Loader:
    """Batches of one set of images, normalised, on a device.

    Args:
        labels: (N,) integers.
        mean, std: per channel, of pixel values from 0 to 255.
        augmentation: None for evaluation.
        views: how many different augmentations of an image there are; None: a new one each epoch.

    Attributes:
        share: part of every batch of an epoch that is read here.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        batch_size: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        views: int | None = None,
    ) -> None:
        self.pixels, self.labels = pixels, labels
        self.mean = torch.tensor(mean, device=labels.device).view(1, -1, 1, 1)
        self.scale = 1 / torch.tensor(std, device=labels.device).view(1, -1, 1, 1)
        self.image_size, self.batch_size, self.seed = image_size, batch_size, seed
        self.augmentation = augmentation
        self.views = views if augmentation is not None and augmentation != Augmentation() else 1
        self.drawn: tuple[int, Draws] | None = None
        self.share = WHOLE

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest >= self.share.smallest_batch or len(self.labels) == 1)

    def shared(self, share: Share) -> "Loader":
        """The same batches, of which a replica reads its share.

        Raises:
            InvalidInput: a batch is too small for so many replicas.
        """
        size = min(self.batch_size, len(self.labels))
        if size < share.smallest_batch:
            raise InvalidInput(
                f"Cannot share batches of {size} images among {share.count} replicas: each needs 2 "
                f"images. Give --batch-size {share.smallest_batch} or more, or fewer --replicas."
            )
        loader = copy(self)
        loader.share = share
        return loader

    def order(self, epoch: int) -> list[Tensor]:
        """Shuffled indices of every batch of an epoch, or of the replica's share of it.

        A last batch of a single image is left out, unless there is no other; one of fewer than two
        for each replica, too.
        """
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        shuffled = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        batches = shuffled.split(self.batch_size)
        least = self.share.smallest_batch
        return [
            self.share.of(indices)
            for indices in batches
            if len(indices) >= least or len(shuffled) == 1
        ]

    def batches(self, epoch: int, start: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels (B,) of an epoch's batches.

        Args:
            start: number of the first batch.
            step: distance to the next one.
        """
        order = self.order(epoch)[start::step]
        for indices, pixels in zip(order, self.pixels.stream(order), strict=True):
            yield self.prepare(pixels, indices, epoch), self.labels[indices]

    def in_order(self, start: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Images in the set's order, not augmented; for the arguments see ``batches``."""
        numbers = torch.arange(len(self.labels), device=self.labels.device)
        order = list(numbers.split(self.batch_size))[start::step]
        for indices, pixels in zip(order, self.pixels.stream(order), strict=True):
            yield self.normalise(pixels), self.labels[indices]

    def images(self, indices: Tensor, epoch: int) -> Tensor:
        """Some images as an epoch shows them, (B, C, H, W)."""
        return self.prepare(next(self.pixels.stream([indices])), indices, epoch)

    def prepare(self, pixels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        if self.augmentation is None:
            return self.normalise(pixels)
        draws = self.draws(epoch).pick(indices)
        images = self.normalise(crop_and_flip(pixels.to(self.labels.device), draws))
        return (
            cut_out(images, draws, self.augmentation.cutout) if self.augmentation.cutout else images
        )

    def draws(self, epoch: int) -> Draws:
        view = epoch % self.views if self.views else epoch
        if self.drawn is None or self.drawn[0] != view:
            assert self.augmentation is not None
            seed = derived_seed(self.seed, "augmentation", view)
            draws = self.augmentation.draw(len(self.labels), self.image_size, seed).to(
                self.labels.device
            )
            self.drawn = (view, draws)
        return self.drawn[1]

    def normalise(self, pixels: Tensor) -> Tensor:
        images = pixels.to(self.labels.device, non_blocking=True).to(
            torch.float32, memory_format=torch.contiguous_format
        )
        return images.sub_(self.mean).mul_(self.scale)


@dataclass(frozen=True)
class ImageSet:
    """Images and labels before they become a loader."""

    pixels: Pixels
    labels: Tensor

    def pick(self, indices: Tensor) -> "ImageSet":
        return ImageSet(self.pixels.pick(indices), self.labels[indices])
