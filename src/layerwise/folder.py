"""Data sets that are folders of class folders of images: in memory when they fit, else read by workers for every batch."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from layerwise.errors import InvalidInput, MissingData
from layerwise.loader import ImageSet, Pixels, PixelsInMemory

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MEMORY_SHARE = 0.25  # of the machine's memory that decoded images may take
TEST_NAMES = ("test", "val", "valid", "validation")
TEST_SHARE = 0.2  # of the images, when the folder has no test part of its own


def read_image(path: str | Path, size: int, channels: int = 3) -> np.ndarray:
    """An image file as (channels, size, size) uint8: its shorter side scaled to ``size``, its middle cut out.

    Raises:
        InvalidInput: the file is not an image, or is cut short.
    """
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (2 * size, 2 * size))  # lets JPEG decode at a fraction of its size
            image = picture.convert("RGB" if channels == 3 else "L")
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist: give the path of an image file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"{path} cannot be read as an image ({error}): remove or replace it") from error
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    left, top = (wide - size) // 2, (high - size) // 2
    image = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1).copy() if channels == 3 else pixels[None].copy()


class Files(Dataset[Tensor]):
    """Image files by number, for torch's workers."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(read_image(self.paths[index], self.size))


def leave_signals(worker: int) -> None:
    """Let the training process alone answer Ctrl-C; its workers end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class PixelsInFiles:
    """Images that are decoded when they are needed, by workers that read ahead."""

    def __init__(self, paths: Sequence[str], size: int, workers: int) -> None:
        self.paths, self.size, self.workers = paths, size, workers

    def __len__(self) -> int:
        return len(self.paths)

    def stream(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        # its own generator: a loader draws from the global one when it starts, and training must not depend on that
        yield from DataLoader(
            Files(self.paths, self.size),
            batch_sampler=[indices.tolist() for indices in batches],
            num_workers=self.workers if len(batches) > 1 else 0,
            generator=torch.Generator(),
            worker_init_fn=leave_signals,
        )

    def pick(self, indices: Tensor) -> "PixelsInFiles":
        return PixelsInFiles([self.paths[index] for index in indices.tolist()], self.size, self.workers)

    def to(self, device: torch.device) -> "PixelsInFiles":
        return self


def load_folder(root: Path, size: int, workers: int) -> tuple[ImageSet, ImageSet | None, tuple[str, ...]]:
    """Training set, test set and names of ``root/train/CLASS/*`` and ``root/test/CLASS/*``.

    The test part may be called test, val, valid or validation. Without such folders, ``root/CLASS/*`` is read, for training.

    Raises:
        MissingData: there is no such folder, or it holds no class folders with images.
    """
    parts = [root / name for name in TEST_NAMES if (root / name).is_dir()]
    if not (root / "train").is_dir() or not parts:
        whole = root / "train" if (root / "train").is_dir() else root
        classes = class_folders(whole)
        return read_part(whole, classes, size, workers), None, tuple(classes)
    classes = class_folders(root / "train")
    train, test = (read_part(part, classes, size, workers) for part in (root / "train", parts[0]))
    return train, test, tuple(classes)


def class_folders(root: Path) -> list[str]:
    """Names of the folders with images, sorted."""
    found = []
    if root.is_dir():
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and any(image_files(entry)))
    if len(found) < 2:
        raise MissingData(
            f"{root.absolute()} holds {len(found)} class folders with images: give a --data-dir with two or more, such as "
            "cats/ and dogs/, or train/ and test/ that hold them"
        )
    return found


def image_files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)


def read_part(root: Path, classes: Sequence[str], size: int, workers: int) -> ImageSet:
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = [str(path) for path in image_files(root / name)]
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise MissingData(
            f"{root.absolute()} holds no images of the classes {', '.join(classes[:5])}: put them in folders of that name"
        )
    pixels: Pixels = PixelsInFiles(paths, size, workers)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if len(paths) * 3 * size * size <= MEMORY_SHARE * memory:
        pixels = PixelsInMemory(torch.cat(list(pixels.stream(list(torch.arange(len(paths)).split(256))))))
    return ImageSet(pixels, torch.tensor(labels))
