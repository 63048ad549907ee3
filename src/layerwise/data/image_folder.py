"""Image files: class folders as a data set, in memory if they fit, else read for every batch."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from layerwise.data.dataset import Arrays
from layerwise.data.loader import Pixels, PixelsInMemory
from layerwise.errors import InvalidInput, MissingData

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MEMORY_SHARE = 0.25  # of the machine's memory that decoded images may take
TEST_NAMES = ("test", "val", "valid", "validation")


def read_image(path: str | Path, size: int, channels: int = 3) -> np.ndarray:
    """An image file as (channels, size, size) uint8.

    Its shorter side is scaled to ``size`` pixels, and the middle is cut out.

    Raises:
        InvalidInput: the file is not an image, or is cut short.
    """
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (2 * size, 2 * size))  # lets JPEG decode at a fraction of its size
            image = picture.convert("RGB" if channels == 3 else "L")
    except FileNotFoundError:
        raise InvalidInput(
            f"Cannot read {path}: it does not exist. Give the path of an image file."
        ) from None
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        raise InvalidInput(
            f"Cannot read {path} as an image: {error}. Remove or replace it."
        ) from error
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    left, top = (wide - size) // 2, (high - size) // 2
    image = image.resize((wide, high), Image.Resampling.BILINEAR).crop(
        (left, top, left + size, top + size)
    )
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1).copy() if channels == 3 else pixels[None].copy()


class Files(Dataset[Tensor]):
    """Image files by number, for torch's workers."""

    def __init__(self, paths: Sequence[str], size: int, channels: int) -> None:
        self.paths, self.size, self.channels = paths, size, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(read_image(self.paths[index], self.size, self.channels))


def leave_signals(worker: int) -> None:
    """Let the training process alone answer Ctrl-C; its workers end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class PixelsInFiles:
    """Images that are decoded when they are needed, by workers that read ahead."""

    def __init__(self, paths: Sequence[str], size: int, channels: int, workers: int) -> None:
        self.paths, self.size, self.channels, self.workers = paths, size, channels, workers

    def __len__(self) -> int:
        return len(self.paths)

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        # its own generator: a loader draws from the global one when it starts, and training must
        # not depend on that

        yield from DataLoader(
            Files(self.paths, self.size, self.channels),
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=self.workers if len(batches) > 1 else 0,
            generator=torch.Generator(),
            worker_init_fn=leave_signals,
        )

    def pick(self, indices: Tensor) -> "PixelsInFiles":
        paths = [self.paths[index] for index in indices.tolist()]
        return PixelsInFiles(paths, self.size, self.channels, self.workers)

    def to(self, device: torch.device) -> "PixelsInFiles":
        return self


def pixels_of_files(paths: Sequence[str], size: int, channels: int, workers: int) -> Pixels:
    """Images of files, decoded at once where they take a small part of the memory."""
    pixels = PixelsInFiles(paths, size, channels, workers)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if len(paths) * channels * size * size > MEMORY_SHARE * memory:
        return pixels
    return PixelsInMemory(torch.cat(list(pixels.stream(list(torch.arange(len(paths)).split(256))))))


def read_folder(root: Path) -> Arrays:
    """Paths and labels of ``root/train/CLASS/*`` and ``root/test/CLASS/*``.

    The test part may be called test, val, valid or validation. Without such folders,
    ``root/CLASS/*`` is read, for training.

    Raises:
        MissingData: there is no such folder, or it holds no class folders with images.
    """
    parts = [root / name for name in TEST_NAMES if (root / name).is_dir()]
    train = root / "train" if (root / "train").is_dir() else root
    classes = class_folders(train)
    arrays = Arrays(*labelled_paths(train, classes), class_names=tuple(classes))
    if train == root or not parts:
        return arrays
    test_images, test_labels = labelled_paths(parts[0], classes)
    return arrays._replace(test_images=test_images, test_labels=test_labels)


def class_folders(root: Path) -> list[str]:
    """Names of the folders with images, sorted."""
    names = []
    if root.is_dir():
        names = sorted(
            entry.name for entry in root.iterdir() if entry.is_dir() and any(image_files(entry))
        )
    if len(names) < 2:
        raise MissingData(
            f"Cannot use {root.absolute()}: it holds {len(names)} class folders with images. Give "
            "a --data-dir with two or more, such as cats/ and dogs/, or train/ and test/ that hold "
            "them."
        )
    return names


def image_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)


def labelled_paths(root: Path, classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = [str(path) for path in image_files(root / name)]
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise MissingData(
            f"Cannot use {root.absolute()}: it holds no images of the classes "
            f"{', '.join(classes[:5])}. Put them in folders of that name."
        )
    return paths, np.array(labels, np.int64)
