"""A data set as a training finds it, in a few lines: classes, images, sizes, what was left out."""

from collections.abc import Iterator, Sequence

import numpy as np

from layerwise.data.dataset import Arrays, Labels
from layerwise.data.image_file import opened
from layerwise.utils.printable import printable
from layerwise.utils.words import counted

MOST_CLASSES = 10  # that are listed with their numbers of images
MOST_HEADERS = 1000  # files whose sizes are looked at


def describe_data(name: str, folder: str, arrays: Arrays, size: int) -> Iterator[str]:
    """Lines about what was read, before any image is decoded.

    Args:
        name, folder: of the data set, as the user gave them; the folder counts for image files.
        size: pixels a side that the images are scaled to.
    """
    images = arrays.train_images
    place = "" if isinstance(images, np.ndarray) else f" in {printable(folder)}"
    counts = per_class(arrays.train_labels, arrays.class_names)
    test = ""
    if arrays.test_labels is not None:
        test = f"; to test {len(arrays.test_labels)}"
        if not isinstance(images, np.ndarray):
            test += f" ({per_class(arrays.test_labels, arrays.class_names)})"
    classes = len(arrays.class_names)
    yield f"{name}{place}: {classes} classes; {counted(len(images), 'image')} ({counts}){test}"
    if not isinstance(images, np.ndarray):
        yield from describe_files(images, size)
    for note in arrays.notes:
        yield f"passed over: {note}"


def per_class(labels: Labels, names: Sequence[str]) -> str:
    """The number of images of each class, or of the rarest and the commonest of many."""
    counts = np.bincount(labels, minlength=len(names)).tolist()
    if len(names) > MOST_CLASSES:
        return f"{min(counts)} to {max(counts)} a class"
    if min(counts) == max(counts):
        return f"{', '.join(map(printable, names))}: {counts[0]} each"
    return ", ".join(
        f"{printable(name)} {count}" for name, count in zip(names, counts, strict=True)
    )


def describe_files(paths: Sequence[str], size: int) -> Iterator[str]:
    """Lines about the sizes of image files, and how many hold several frames."""
    looked_at = paths[:: -(-len(paths) // MOST_HEADERS)]
    sizes, several = set(), 0
    for path in looked_at:
        try:
            with opened(path) as picture:
                sizes.add(picture.size)
                several += bool(getattr(picture, "is_animated", False))
        except Exception:  # refused in words when it is decoded
            continue
    of_some = "" if len(looked_at) == len(paths) else f", of {len(looked_at)} looked at"
    if sizes:
        least, most = min(sizes, key=np.prod), max(sizes, key=np.prod)
        span = f"{least[0]} × {least[1]}"
        span += f" to {most[0]} × {most[1]}" if len(sizes) > 1 else ""
        yield f"sizes: {span} pixels{of_some}; the middle square is scaled to {size} × {size}"
    if several:
        yield f"{several} files hold several frames or pages{of_some}: the first of each is read"
