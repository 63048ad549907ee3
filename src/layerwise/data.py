"""Data sets by name: read, held out, scaled, and made into loaders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import InvalidInput, choose
from layerwise.folder import TEST_SHARE, load_folder
from layerwise.formats import READERS, Arrays
from layerwise.loader import Augmentation, ImageSet, Loader, Pixels, PixelsInMemory, derived_seed
from layerwise.runs import Execution, Run


@dataclass(frozen=True)
class DataSet:
    """How a known data set is read and augmented by default.

    Attributes:
        read: from the data folder to arrays.
        padding, flip: the crop border and whether mirroring keeps the label.
        images: how many training and test images it has.
    """

    read: Callable[[Path], Arrays]
    padding: int
    flip: bool
    images: tuple[int, int]


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(READERS["digits"], padding=1, flip=False, images=(1437, 360)),
    "cifar10": DataSet(READERS["cifar10"], padding=4, flip=True, images=(50_000, 10_000)),
    "cifar100": DataSet(READERS["cifar100"], padding=4, flip=True, images=(50_000, 10_000)),
    "mnist": DataSet(READERS["mnist"], padding=2, flip=False, images=(60_000, 10_000)),
    "fashion-mnist": DataSet(READERS["fashion-mnist"], padding=2, flip=True, images=(60_000, 10_000)),
    "kmnist": DataSet(READERS["kmnist"], padding=2, flip=False, images=(60_000, 10_000)),
    "svhn": DataSet(READERS["svhn"], padding=2, flip=False, images=(73_257, 26_032)),
}
FOLDER = "folder"
FOLDER_SIZE = 64  # pixels, unless the run says otherwise


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
            "images": [len(part.labels) if part else 0 for part in (self.train, self.validation, self.test)],
        }


def load_data(run: Run, execution: Execution, device: torch.device) -> Splits:
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
        size, padding, flip = run.image_size or FOLDER_SIZE, (run.image_size or FOLDER_SIZE) // 8, True
        train, own_test, class_names = load_folder(Path(execution.data_dir), size, execution.workers)
        if own_test is None:
            train, test = hold_out(train, TEST_SHARE, None, len(class_names), seed=0)
        else:
            test = own_test
    else:
        dataset = DATASETS[name]
        train, test, class_names, size = load_known(name, Path(execution.data_dir), run.image_size, execution.download)
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
        if run.cutout:
            raise InvalidInput(f"cutout {run.cutout} is an augmentation: leave out --no-augment")
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
    except InvalidInput:  # missing or damaged
        if not download:
            raise
        from layerwise.download import download as fetch

        fetch(name, folder)
        arrays = dataset.read(folder)
    counts = len(arrays.train_labels), len(arrays.test_labels)
    if counts != dataset.images:
        raise InvalidInput(
            f"{name} in {folder} has {counts[0]} training and {counts[1]} test images instead of {dataset.images[0]} and "
            f"{dataset.images[1]}: a file is cut short; fetch it again, such as with --download into an empty --data-dir"
        )
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
