"""Entry of the table of data sets: its images, how they are read, and where they are published."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layerwise.data.download import RemoteFile
from layerwise.errors import InvalidInput

Images = NDArray[np.uint8] | Sequence[str]  # (N, C, H, W), or paths of image files
Labels = NDArray[np.integer]  # (N,)
Normalization = tuple[tuple[float, ...], tuple[float, ...]]
UNREAD = tuple("0123456789")  # stand in for class names that only the files tell


class Arrays(NamedTuple):
    """Images and labels as they are read.

    Attributes:
        train_images, test_images: (N, C, H, W) uint8, or the paths of N image files. Without a test
            part, a fifth of the training images is held out for it.
        train_labels, test_labels: (N,) integers from 0.
        class_names: where the files tell them; else those of the table's entry.
        notes: what was passed over and why, a line each.
    """

    train_images: Images
    train_labels: Labels
    test_images: Images | None = None
    test_labels: Labels | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageFormat:
    """Classes, channels and size of images: all that a network needs to know of its data.

    Attributes:
        class_names: of the labels 0, 1, and so on.
        channels: 1 for grey, 3 for colour.
        image_size: pixels a side.
        normalization: mean and deviation of each channel that the images are normalised by, of
            values from 0 to 1; None: they are not known before images are read.
    """

    class_names: tuple[str, ...]
    channels: int
    image_size: int
    normalization: Normalization | None = field(default=None, kw_only=True, compare=False)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class DataSet:
    """A data set that can be trained on by name.

    Attributes:
        read: from the data folder to arrays. It raises ``MissingData`` where no files are.
        format: of the images that it reads; no class names where only the files tell them.
        images: numbers of training and test images, which are compared with what is read.
        padding: border in pixels of random crops; None: an eighth of the image's side.
        flip: whether a mirrored image keeps its label.
        files: where it can be downloaded.
        note: words for ``layerwise list datasets``.
        bundled: whether it comes with an installed package, so that the data folder is not read.
    """

    read: Callable[[Path], Arrays]
    format: ImageFormat
    images: tuple[int, int] | None = None
    padding: int | None = None
    flip: bool = False
    files: tuple[RemoteFile, ...] = ()
    note: str = ""
    bundled: bool = False

    def expected(self, image_size: int | None = None) -> ImageFormat:
        """Format before anything is read: ten classes where only the files tell how many."""
        names = self.format.class_names or UNREAD
        return replace(
            self.format, class_names=names, image_size=image_size or self.format.image_size
        )

    def padding_at(self, image_size: int) -> int:
        return image_size // 8 if self.padding is None else self.padding

    def describe(self) -> str:
        """One line of the listing."""
        shape = self.format
        classes = f"{shape.num_classes} classes" if shape.class_names else self.note
        flips = " and flips" * self.flip
        padding = self.padding_at(shape.image_size)
        colour = "grey" if shape.channels == 1 else "colour"
        size = f"{colour} images of {shape.image_size} pixels"
        return f"{classes}, {size}; crops with padding {padding}{flips}"

    def arrays(self, folder: Path) -> Arrays:
        """The arrays that the reader gives, checked against this entry.

        Raises:
            InvalidInput: images or labels are not as the entry says.
        """
        arrays = Arrays(*self.read(folder))
        names = arrays.class_names or self.format.class_names
        parts = [(arrays.train_images, arrays.train_labels)]
        if arrays.test_images is not None and arrays.test_labels is not None:
            parts.append((arrays.test_images, arrays.test_labels))
        for images, labels in parts:
            self._check_images(images, folder)
            check_labels(labels, len(images), len(names), folder, self._remedy)
        self._check_counts([len(labels) for _, labels in parts], folder)
        return arrays._replace(class_names=names)

    @property
    def _remedy(self) -> str:
        """What to do where images or labels are not as they should be."""
        if self.files:
            return "Fetch it again."
        return "Let its read return uint8 images (N, C, H, W) and integer labels (N,)."

    def _check_counts(self, counts: Sequence[int], folder: Path) -> None:
        if self.images is not None and tuple(counts) != self.images:
            wanted = f"{self.images[0]} and {self.images[1]}"
            raise InvalidInput(
                f"Cannot use the data set in {folder}: it has "
                f"{' training and '.join(map(str, counts))} test images instead of {wanted}, so a "
                "file is cut short. Fetch it again, such as with --download into an empty "
                "--data-dir."
            )

    def _check_images(self, images: Images, folder: Path) -> None:
        if not isinstance(images, np.ndarray):
            return
        shape = self.format.channels, self.format.image_size, self.format.image_size
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise InvalidInput(
                f"Cannot use the images in {folder}: they are {images.dtype} of shape "
                f"{images.shape[1:]}, not uint8 of shape {shape}. {self._remedy}"
            )


def check_labels(labels: Labels, images: int, classes: int, folder: Path, remedy: str) -> None:
    """Raise ``InvalidInput`` unless there is a label from 0 to ``classes`` - 1 for every image."""
    if not images or labels.shape != (images,):
        raise InvalidInput(
            f"Cannot use the data set in {folder}: it holds {images} images and labels of shape "
            f"{labels.shape}. {remedy}"
        )
    wrong = labels[(labels < 0) | (labels >= classes) | (labels != np.floor(labels))]
    if wrong.size:
        raise InvalidInput(
            f"Cannot use the data set in {folder}: it holds the label {wrong[0]}, not an integer "
            f"from 0 to {classes - 1}. {remedy}"
        )
