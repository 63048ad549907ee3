"""Data sets on the device as one uint8 tensor, augmented by the batch.

Every random draw is a function of the seed, the epoch and the image's number: an epoch can be entered anywhere, and an image
looks the same in whichever batch it comes.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import InvalidInput, MissingData, choose
from layerwise.formats import READERS, Arrays
from layerwise.runs import Run


class Pixels(Protocol):
    """Images by number: a tensor in memory, or files that are read when needed."""

    def __len__(self) -> int: ...
    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]: ...  # indices -> (B, C, H, W) uint8
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
    """What is done to training images at random, for each on its own.

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
    """Random draws for N images: crop offsets (N, 2), flips (N,), centres of the blanked square (N, 2)."""

    offsets: Tensor
    flips: Tensor
    centres: Tensor

    def pick(self, indices: Tensor) -> "Draws":
        return Draws(self.offsets[indices], self.flips[indices], self.centres[indices])

    def to(self, device: torch.device) -> "Draws":
        return Draws(self.offsets.to(device), self.flips.to(device), self.centres.to(device))


def crop_and_flip(pixels: Tensor, draws: Draws) -> Tensor:
    """Shift every image by its offset, black where nothing was, and mirror those drawn. (B, C, H, W) uint8 -> same."""
    count, _, height, width = pixels.shape
    rows = draws.offsets[:, :1] + torch.arange(height, device=pixels.device)  # (B, H)
    columns = draws.offsets[:, 1:] + torch.arange(width, device=pixels.device)  # (B, W)
    columns = torch.where(draws.flips[:, None], columns.flip(1), columns)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    batch = torch.arange(count, device=pixels.device)[:, None, None]
    picked = pixels[batch, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]  # (B, H, W, C)
    return (picked * inside[..., None]).permute(0, 3, 1, 2)


def cut_out(images: Tensor, draws: Draws, side: int) -> Tensor:
    """Set a square around every image's centre draw to zero, the mean; it may reach over the border. (B, C, H, W) -> same."""
    _, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) - draws.centres[:, :1] + side // 2  # (B, H)
    columns = torch.arange(width, device=images.device) - draws.centres[:, 1:] + side // 2
    blank = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return images.masked_fill(blank[:, None], 0.0)


class Loader:
    """Batches of one set of images, normalised, on a device.

    Args:
        labels: (N,) integers.
        mean, std: per channel, of pixel values from 0 to 255.
        augmentation: None for evaluation.
        views: how many different augmentations of an image there are; None: a new one each epoch.
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

    def __len__(self) -> int:
        return len(self.order(0))

    def order(self, epoch: int) -> list[Tensor]:
        """The indices of every batch of an epoch, shuffled; a last batch of a single image is left out."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
        shuffled = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        return [indices for indices in shuffled.split(self.batch_size) if len(indices) > 1]

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels (B,) of an epoch, from batch ``start`` on."""
        order = self.order(epoch)[start:]
        for indices, pixels in zip(order, self.pixels.stream(order), strict=True):
            yield self.prepare(pixels, indices, epoch), self.labels[indices]

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in the set's order, not augmented."""
        order = list(torch.arange(len(self.labels), device=self.labels.device).split(self.batch_size))
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
        return cut_out(images, draws, self.augmentation.cutout) if self.augmentation.cutout else images

    def draws(self, epoch: int) -> Draws:
        view = epoch % self.views if self.views else epoch
        if self.drawn is None or self.drawn[0] != view:
            assert self.augmentation is not None
            seed = derived_seed(self.seed, "augmentation", view)
            draws = self.augmentation.draw(len(self.labels), self.image_size, seed).to(self.labels.device)
            self.drawn = (view, draws)
        return self.drawn[1]

    def normalise(self, pixels: Tensor) -> Tensor:
        images = pixels.to(self.labels.device, non_blocking=True).to(torch.float32, memory_format=torch.contiguous_format)
        return images.sub_(self.mean).mul_(self.scale)


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose, unrelated to that of any other."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class DataSet:
    """How a known data set is read and augmented by default.

    Attributes:
        read: from the data folder to arrays.
        padding, flip: the crop border and whether mirroring keeps the label.
    """

    read: Callable[[Path], Arrays]
    padding: int
    flip: bool


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(READERS["digits"], padding=1, flip=False),
    "cifar10": DataSet(READERS["cifar10"], padding=4, flip=True),
    "cifar100": DataSet(READERS["cifar100"], padding=4, flip=True),
    "mnist": DataSet(READERS["mnist"], padding=2, flip=False),
    "fashion-mnist": DataSet(READERS["fashion-mnist"], padding=2, flip=True),
    "kmnist": DataSet(READERS["kmnist"], padding=2, flip=False),
    "svhn": DataSet(READERS["svhn"], padding=2, flip=False),
}
FOLDER = "folder"


@dataclass(frozen=True)
class Splits:
    """A data set ready to train on.

    Attributes:
        train, validation, test: loaders; validation is None when nothing is held out.
        class_names: what the labels mean.
        mean, std: per channel, of pixel values from 0 to 255.
        image_size, channels: of every image.
    """

    train: Loader
    validation: Loader | None
    test: Loader
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    channels: int

    def facts(self) -> dict[str, object]:
        """What is needed to show the network an image."""
        return {
            "class_names": list(self.class_names),
            "mean": list(self.mean),
            "std": list(self.std),
            "image_size": self.image_size,
            "channels": self.channels,
        }


@dataclass(frozen=True)
class ImageSet:
    """Images and labels before they become a loader."""

    pixels: Pixels
    labels: Tensor

    def pick(self, indices: Tensor) -> "ImageSet":
        return ImageSet(self.pixels.pick(indices), self.labels[indices])


def load_data(run: Run, device: torch.device, workers: int = 2, download: bool = False) -> Splits:
    """Read a run's data set, hold out a validation part, and make the loaders.

    Raises:
        InvalidInput: the data set is unknown, or its files are missing, altered or too few.
    """
    name = choose("data set", run.data, [*DATASETS, FOLDER])
    if not 0 <= run.val_fraction < 1:
        raise InvalidInput(f"val_fraction {run.val_fraction} is out of range: give 0 up to but not including 1")
    if run.image_size is not None and run.image_size < 1:
        raise InvalidInput(f"image_size {run.image_size} is too small: give 1 pixel or more")
    if run.batch_size < 2:
        raise InvalidInput(f"batch_size {run.batch_size} is too small: give 2 or more, since local losses compare images")
    if name == FOLDER:
        from layerwise.folder import load_folder

        train, test, class_names, size = load_folder(Path(run.data_dir), run.image_size or 64, workers)
        padding, flip = size // 8, True
    else:
        dataset = DATASETS[name]
        train, test, class_names, size = load_known(name, Path(run.data_dir), run.image_size, download)
        padding, flip = dataset.padding, dataset.flip
    train, validation = hold_out(train, run.val_fraction, run.train_images, len(class_names), run.seed)
    mean, std = statistics(train.pixels)
    augmentation = choose_augmentation(run, padding, flip, size)

    def loader(images: ImageSet, augment: Augmentation | None = None) -> Loader:
        images = ImageSet(images.pixels.to(device), images.labels.to(device))
        return Loader(
            images.pixels,
            images.labels,
            mean,
            std,
            size,
            run.batch_size,
            run.seed,
            augment,
            run.views if augment else None,
        )

    return Splits(
        loader(train, augmentation),
        loader(validation) if len(validation.labels) else None,
        loader(test),
        class_names,
        mean,
        std,
        size,
        len(mean),
    )


def choose_augmentation(run: Run, padding: int, flip: bool, size: int) -> Augmentation:
    """The data set's augmentation, changed as the run says."""
    for label, value, limit in (("crop_padding", run.crop_padding, size), ("cutout", run.cutout, 2 * size)):
        if value is not None and not 0 <= value <= limit:
            raise InvalidInput(f"{label} {value} does not fit images of {size} pixels: give 0 to {limit}")
    if run.views is not None and run.views < 1:
        raise InvalidInput(f"views {run.views} is too small: give 1 or more, or leave it out for new augmentations each epoch")
    if not run.augment:
        return Augmentation()
    return Augmentation(
        padding if run.crop_padding is None else run.crop_padding, flip if run.flip is None else run.flip, run.cutout
    )


def load_known(
    name: str, folder: Path, image_size: int | None, download: bool
) -> tuple[ImageSet, ImageSet, tuple[str, ...], int]:
    """Training set, test set, class names and image size of a known data set."""
    dataset = DATASETS[name]
    try:
        arrays = dataset.read(folder)
    except MissingData:
        if not download:
            raise
        from layerwise.download import download as fetch

        fetch(name, folder)
        arrays = dataset.read(folder)
    size = image_size or arrays.train_images.shape[-1]
    train, test = (
        ImageSet(PixelsInMemory(resize(torch.from_numpy(images), size)), torch.from_numpy(labels))
        for images, labels in (
            (arrays.train_images, arrays.train_labels),
            (arrays.test_images, arrays.test_labels),
        )
    )
    return train, test, arrays.class_names, size


def resize(images: Tensor, size: int) -> Tensor:
    """Scale square images, (N, C, H, W) uint8 -> (N, C, size, size) uint8: averaged when shrunk, bilinear when enlarged."""
    if images.shape[-1] == size:
        return images.contiguous()
    mode = {"mode": "area"} if images.shape[-1] % size == 0 else {"mode": "bilinear", "antialias": True}
    scaled = [F.interpolate(part.float(), (size, size), **mode).round().clamp(0, 255).byte() for part in images.split(1024)]
    return torch.cat(scaled)


def hold_out(images: ImageSet, fraction: float, limit: int | None, classes: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split a training set, evenly over the classes: what is trained on (at most ``limit`` images) and what is held out."""
    labels = images.labels.numpy()
    order = np.random.default_rng(derived_seed(seed, "split", 0)).permutation(len(labels))
    train, held = [], []
    for label in range(classes):
        members = order[labels[order] == label]
        count = round(fraction * len(members))
        held.append(members[:count])
        train.append(members[count:])
    if limit is not None:
        total = sum(map(len, train))
        if not classes <= limit <= total:
            raise InvalidInput(
                f"train_images {limit} is out of range: give {classes} (one per class) to {total}, or leave it out"
            )
        # whole shares first, then one more for the first classes, so that the sum is the limit for equal classes
        shares = [limit * len(part) // total for part in train]
        for number in range(limit - sum(shares)):
            shares[number % classes] += 1
        train = [part[:share] for part, share in zip(train, shares, strict=True)]
    kept = torch.from_numpy(np.sort(np.concatenate(train)))
    if len(kept) < 2:
        raise InvalidInput(f"{len(kept)} training images are left: give more images, or a smaller val_fraction")
    return images.pick(kept), images.pick(torch.from_numpy(np.sort(np.concatenate(held))))


def statistics(pixels: Pixels, sample: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixel values from 0 to 255, over evenly spaced images."""
    indices = torch.arange(0, len(pixels), max(1, len(pixels) // sample))
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    for part in pixels.stream(list(indices.split(256))):
        values = part.double().transpose(0, 1).flatten(1)
        count, total, squares = count + values.shape[1], total + values.sum(1), squares + (values**2).sum(1)
    mean = total / count
    std = (squares / count - mean**2).clamp(min=1.0).sqrt()  # a constant channel is not blown up
    return tuple(mean.tolist()), tuple(std.tolist())
