"""From an entry of the table to loaders: read, held out, scaled."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.data.dataset import Arrays, DataSet, ImageFormat, Images, Labels, Normalization
from layerwise.data.download import download
from layerwise.data.findings import describe_data
from layerwise.data.image_folder import pixels_of_files
from layerwise.data.loader import Augmentation, ImageSet, Loader, Pixels, PixelsInMemory
from layerwise.errors import InvalidInput
from layerwise.runs.run import Execution, Run
from layerwise.utils.printable import printable
from layerwise.utils.seeds import derived_seed

TEST_SHARE = 0.2  # of the images, where a data set has no test part of its own
SAMPLE = 10_000  # images that mean and deviation are measured on


@dataclass(frozen=True)
class Splits(ImageFormat):
    """A data set ready to train on: the format of its images, and loaders.

    Attributes:
        train, validation, test: loaders; validation is None when nothing is held out.
        mean, std: per channel, of pixel values from 0 to 255.
        digest: of all images and labels as they were read; of files, the names and sizes.
    """

    train: Loader
    validation: Loader | None
    test: Loader
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    def facts(self) -> dict[str, object]:
        """The facts that are needed to show the network an image, and to know the images again."""
        parts = self.train, self.validation, self.test
        return {
            "class_names": list(self.class_names),
            "mean": list(self.mean),
            "std": list(self.std),
            "image_size": self.image_size,
            "channels": self.channels,
            "images": [len(part.labels) if part else 0 for part in parts],
            "digest": self.digest,
        }


def normalization_by(mean: Iterable[float], std: Iterable[float]) -> Normalization:
    """Statistics of pixel values from 0 to 255 as those of values from 0 to 1."""
    return tuple(value / 255 for value in mean), tuple(value / 255 for value in std)


def make_splits(
    dataset: DataSet,
    augmentation: Augmentation,
    run: Run,
    execution: Execution,
    device: torch.device,
    say: Callable[[str], None] = lambda line: None,
) -> Splits:
    """Read a data set, hold out a validation part, and make the loaders.

    Args:
        say: is given lines about what is found.

    Raises:
        InvalidInput: files are missing, altered or too few.
    """
    size = run.image_size or dataset.format.image_size
    train, test, images, digest = read(dataset, size, execution, run.data, say)
    check_parts(run, execution, train, test)
    train, validation = hold_out(
        train, run.val_fraction, run.train_images, images.num_classes, run.seed
    )
    say(
        f"{len(train.labels)} images to train on, {len(validation.labels)} for validation, "
        f"{len(test.labels)} to test"
    )
    if run.val_fraction and not len(validation.labels):
        say(
            f"no image is held out for validation: {run.val_fraction:g} of each class rounds to "
            "none. Give a larger --val-fraction"
        )
    mean, std = statistics(train.pixels)

    def loader(part: ImageSet, augment: Augmentation | None = None) -> Loader:
        pixels, labels = part.pixels.to(device), part.labels.to(device)
        views = run.views if augment else None
        return Loader(pixels, labels, mean, std, size, run.batch_size, run.seed, augment, views)

    return Splits(
        images.class_names,
        images.channels,
        size,
        loader(train, augmentation),
        loader(validation) if len(validation.labels) else None,
        loader(test),
        mean,
        std,
        digest,
        normalization=normalization_by(mean, std),
    )


def check_parts(run: Run, execution: Execution, train: ImageSet, test: ImageSet) -> None:
    """Raise ``InvalidInput`` where no image is left to test."""
    if not len(test.labels):
        raise InvalidInput(
            f"Cannot use data {run.data} in {printable(execution.data_dir)}: no image is left to "
            f"test beside {len(train.labels)} to train on, since a fifth of each class is held out "
            "for it. Give a class three images or more, or a test part."
        )


def read(
    dataset: DataSet, size: int, execution: Execution, name: str, say: Callable[[str], None]
) -> tuple[ImageSet, ImageSet, ImageFormat, str]:
    """Training set and test set, scaled to ``size`` pixels, their format, and a digest of both."""
    folder = Path(execution.data_dir)
    try:
        arrays = dataset.arrays(folder)
    except InvalidInput:  # missing or damaged
        if not execution.download or not dataset.files:
            raise
        download(dataset.files, folder)
        arrays = dataset.arrays(folder)
    for line in describe_data(name, execution.data_dir, arrays, size):
        say(line)
    channels = dataset.format.channels
    images, digest = ImageFormat(arrays.class_names, channels, size), digest_of(arrays)

    def scaled(pixels: Images, labels: Labels) -> ImageSet:
        numbers = torch.from_numpy(np.ascontiguousarray(labels, np.int64))
        if isinstance(pixels, np.ndarray):
            scaled_pixels = resize(torch.from_numpy(np.ascontiguousarray(pixels)), size)
            return ImageSet(PixelsInMemory(scaled_pixels), numbers)
        files = pixels_of_files(pixels, size, channels, execution.workers)
        return ImageSet(files, numbers)

    train = scaled(arrays.train_images, arrays.train_labels)
    if arrays.test_images is None or arrays.test_labels is None:
        return *hold_out(train, TEST_SHARE, None, images.num_classes, seed=0), images, digest
    return train, scaled(arrays.test_images, arrays.test_labels), images, digest


def digest_of(arrays: Arrays) -> str:
    """A digest of images and labels: of every pixel in memory, of each file's name and size.

    It does not depend on where the folder is, or on what the images are scaled to.
    """
    digest = hashlib.blake2b(digest_size=16)
    for images, labels in (
        (arrays.train_images, arrays.train_labels),
        (arrays.test_images, arrays.test_labels),
    ):
        if isinstance(images, np.ndarray):
            digest.update(np.ascontiguousarray(images).data)
        for path in () if images is None or isinstance(images, np.ndarray) else images:
            digest.update(os.fsencode(os.path.basename(path)) + b" %d\n" % size_of(path))
        if labels is not None:
            digest.update(np.ascontiguousarray(labels, np.int64).data)
    return digest.hexdigest()


def size_of(path: str | Path) -> int:
    """A file's size in bytes; -1 where it cannot be told, as reading it will say."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def choose_augmentation(run: Run, padding: int, flip: bool, size: int) -> Augmentation:
    """The data set's augmentation, changed as the run says."""
    for label, value, limit in (
        ("crop_padding", run.crop_padding, size),
        ("cutout", run.cutout, 2 * size),
    ):
        if value is not None and not 0 <= value <= limit:
            raise InvalidInput(
                f"Cannot use {label} {value} with images of {size} pixels: it is out of range. "
                f"Give 0 to {limit}."
            )
    if not run.augment:
        if run.cutout:
            raise InvalidInput(
                f"Cannot use cutout {run.cutout} with --no-augment: it is an augmentation. Leave "
                "one of them out."
            )
        return Augmentation()
    return Augmentation(
        padding if run.crop_padding is None else run.crop_padding,
        flip if run.flip is None else run.flip,
        run.cutout,
    )


def resize(images: Tensor, size: int) -> Tensor:
    """Scale square images, (N, C, H, W) uint8 -> (N, C, size, size) uint8.

    They are averaged when they shrink by a whole factor, else interpolated.
    """
    if images.shape[-1] == size:
        return images.contiguous()
    mode = (
        {"mode": "area"}
        if images.shape[-1] % size == 0
        else {"mode": "bilinear", "antialias": True}
    )
    scaled = [
        F.interpolate(part.float(), (size, size), **mode).round().clamp(0, 255).byte()
        for part in images.split(1024)
    ]
    return torch.cat(scaled)


def hold_out(
    images: ImageSet, fraction: float, limit: int | None, classes: int, seed: int
) -> tuple[ImageSet, ImageSet]:
    """Split a training set evenly over the classes, into a training and a held-out part.

    The training part has at most ``limit`` images, and one or more of every class that has any.
    """
    labels = images.labels.numpy()
    order = np.random.default_rng(derived_seed(seed, "split", 0)).permutation(len(labels))
    train, held = [], []
    for label in range(classes):
        members = order[labels[order] == label]
        count = min(round(fraction * len(members)), max(0, len(members) - 1))
        held.append(members[:count])
        train.append(members[count:])
    if limit is not None:
        total = sum(map(len, train))
        if not classes <= limit <= total:
            raise InvalidInput(
                f"Cannot use train_images {limit}: {total} images are left of {classes} classes. "
                f"Give {classes} to {total}, or leave it out."
            )
        # whole shares first, then one more for the first classes, so that the sum is the limit for
        # equal classes

        shares = [limit * len(part) // total for part in train]
        for number in range(limit - sum(shares)):
            shares[number % classes] += 1
        for number, part in enumerate(train):
            if len(part) and not shares[number]:  # a rare class keeps one image
                shares[shares.index(max(shares))] -= 1
                shares[number] = 1
        train = [part[:share] for part, share in zip(train, shares, strict=True)]
    training = torch.from_numpy(np.sort(np.concatenate(train)))
    if len(training) < 2:
        raise InvalidInput(
            f"Cannot train on {len(training)} images: no more are left. Give more, or a smaller "
            "val_fraction."
        )
    return images.pick(training), images.pick(torch.from_numpy(np.sort(np.concatenate(held))))


def statistics(pixels: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixel values from 0 to 255.

    They are measured on evenly spaced images, about ``SAMPLE`` of them.
    """
    indices = torch.arange(0, len(pixels), max(1, len(pixels) // SAMPLE))
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    for part in pixels.stream(list(indices.split(256))):
        values = part.double().transpose(0, 1).flatten(1)
        count, total, squares = (
            count + values.shape[1],
            total + values.sum(1),
            squares + (values**2).sum(1),
        )
    mean = total / count
    std = (squares / count - mean**2).clamp(min=1.0).sqrt()  # a constant channel is not blown up
    return tuple(mean.tolist()), tuple(std.tolist())
