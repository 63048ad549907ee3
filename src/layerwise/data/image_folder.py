"""Images of files: in memory if they fit, else read for every batch."""

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from layerwise.data.class_folders import read_folder
from layerwise.data.dataset import Images, Labels
from layerwise.data.image_file import read_image
from layerwise.data.loader import ImageSet, Pixels, PixelsInMemory
from layerwise.errors import InvalidInput

MEMORY_SHARE = 0.25  # of the machine's memory that decoded images may take
BLOCK = 256  # images decoded at a time into memory


class Files(Dataset[Tensor | str]):
    """Image files by number, for torch's workers; words of refusal for one that cannot be read.

    An error would reach the user as a traceback of the worker.
    """

    def __init__(self, paths: Sequence[str], size: int, channels: int) -> None:
        self.paths, self.size, self.channels = paths, size, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return torch.from_numpy(read_image(self.paths[index], self.size, self.channels))
        except InvalidInput as refusal:
            return str(refusal)


def stacked(images: Sequence[Tensor | str]) -> Tensor | str:
    """A batch of images, or the first refusal among them."""
    refusals = [image for image in images if isinstance(image, str)]
    return refusals[0] if refusals else torch.stack([*images])  # type: ignore[list-item]


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
        with warnings.catch_warnings():
            # workers wait for files too, so that there may be more than processors
            warnings.filterwarnings("ignore", "This DataLoader will create")
            # its own generator: a loader draws from the global one when it starts, and training
            # must not depend on that
            batches_read = iter(
                DataLoader(
                    Files(self.paths, self.size, self.channels),
                    batch_sampler=[indices.tolist() for indices in batches],
                    num_workers=self.workers if len(batches) > 1 else 0,
                    generator=torch.Generator(),
                    collate_fn=stacked,
                    worker_init_fn=leave_signals,
                )
            )
        for images in batches_read:
            if isinstance(images, str):
                raise InvalidInput(images)
            yield images

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
    images = torch.empty(len(paths), channels, size, size, dtype=torch.uint8)
    blocks = torch.arange(len(paths)).split(BLOCK)
    for indices, block in zip(blocks, pixels.stream(blocks), strict=True):
        images[indices[0] : indices[-1] + 1] = block
    return PixelsInMemory(images)


class FolderImages(NamedTuple):
    """Images of class folders; ``test`` is None where the folder has no test part."""

    train: ImageSet
    test: ImageSet | None
    class_names: tuple[str, ...]


def load_folder(root: str | Path, image_size: int, workers: int = 0) -> FolderImages:
    """Images of ``root/train/CLASS/*`` and ``root/test/CLASS/*``, or of ``root/CLASS/*``.

    They are (3, image_size, image_size) uint8: in memory, or read when they are needed where they
    would take more than a quarter of it.

    Args:
        workers: processes that decode.

    Raises:
        InvalidInput: the folder holds no class folders, or an image cannot be read.
    """
    arrays = read_folder(Path(root))

    def images_of(paths: Images, labels: Labels) -> ImageSet:
        pixels = pixels_of_files(list(paths), image_size, 3, workers)
        return ImageSet(pixels, torch.from_numpy(labels))

    test = None
    if arrays.test_images is not None and arrays.test_labels is not None:
        test = images_of(arrays.test_images, arrays.test_labels)
    train = images_of(arrays.train_images, arrays.train_labels)
    return FolderImages(train, test, arrays.class_names)
