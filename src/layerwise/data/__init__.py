"""The table of data sets, and what is made of an entry: images on the device, split, augmented.

A data set of your own is one more entry::

    from layerwise.data import DATASETS, Arrays, DataSet, ImageFormat

    DATASETS["mine"] = DataSet(read, ImageFormat(("cat", "dog"), channels=3, image_size=64))

where ``read(folder)`` gives ``Arrays``: images (N, 3, 64, 64) uint8, or paths, and labels (N,).
"""

from collections.abc import Sequence
from functools import partial

from layerwise.data.class_folders import read_folder
from layerwise.data.dataset import Arrays, DataSet, ImageFormat
from layerwise.data.download import RemoteFile
from layerwise.data.image_folder import FolderImages, load_folder
from layerwise.data.loader import Augmentation, Loader
from layerwise.data.published import (
    CIFAR10_CLASSES,
    CIFAR100_CLASSES,
    DIGITS,
    FASHION_CLASSES,
    FILES,
    KUZUSHIJI_CLASSES,
)
from layerwise.data.readers import (
    CIFAR10,
    CIFAR100,
    Form,
    read_cifar,
    read_digits,
    read_idx,
    read_svhn,
)
from layerwise.data.splits import Splits, hold_out, make_splits, resize

__all__ = [
    "DATASETS",
    "Arrays",
    "Augmentation",
    "DataSet",
    "FolderImages",
    "ImageFormat",
    "Loader",
    "RemoteFile",
    "Splits",
    "hold_out",
    "load_folder",
    "make_splits",
    "resize",
]

FOLDER_SIZE = 64  # pixels, unless the run says otherwise


def cifar(name: str, forms: Sequence[Form], classes: tuple[str, ...]) -> DataSet:
    read, images = partial(read_cifar, forms=forms), ImageFormat(classes, 3, 32)
    return DataSet(read, images, (50_000, 10_000), padding=4, flip=True, files=FILES[name])


def idx(name: str, folder: str, classes: tuple[str, ...], flip: bool = False) -> DataSet:
    """Data set in files like those of MNIST."""
    read, images = partial(read_idx, folder=folder, files=FILES[name]), ImageFormat(classes, 1, 28)
    return DataSet(read, images, (60_000, 10_000), padding=2, flip=flip, files=FILES[name])


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(read_digits, ImageFormat(DIGITS, 1, 8), (1437, 360), padding=1, bundled=True),
    "cifar10": cifar("cifar10", CIFAR10, CIFAR10_CLASSES),
    "cifar100": cifar("cifar100", CIFAR100, CIFAR100_CLASSES),
    "mnist": idx("mnist", "MNIST", DIGITS),
    "fashion-mnist": idx("fashion-mnist", "FashionMNIST", FASHION_CLASSES, flip=True),
    "kmnist": idx("kmnist", "KMNIST", KUZUSHIJI_CLASSES),
    "svhn": DataSet(
        partial(read_svhn, files=FILES["svhn"]),
        ImageFormat(DIGITS, 3, 32),
        (73_257, 26_032),
        padding=2,
        files=FILES["svhn"],
    ),
    "folder": DataSet(
        read_folder,
        ImageFormat((), 3, FOLDER_SIZE),
        flip=True,
        note="class folders of images under --data-dir, or train/ and test/ that hold them",
    ),
}
