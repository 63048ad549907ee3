"""Readers of the standard image-classification files, as numpy arrays.

Every reader takes the data directory and returns ``Arrays``. Files are untrusted: nothing in them is executed, nothing
is written to disk, and a file that is not exactly what its format says is refused by name. Readers raise

* ``MissingData``: no file of the set is there, or not all of them;
* ``InvalidInput``: a file is damaged, altered or unreadable.

Sources of the formats:

* CIFAR-10 and CIFAR-100, binary and Python: https://www.cs.toronto.edu/~kriz/cifar.html
* MNIST and its successors, idx: http://yann.lecun.com/exdb/mnist/, https://github.com/zalandoresearch/fashion-mnist,
  https://github.com/rois-codh/kmnist
* SVHN cropped digits, MATLAB: http://ufldl.stanford.edu/housenumbers/
"""

import gzip
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import MissingData
from layerwise.pickles import Images, read_pickle, reading, refuse, rows_of

Labels = NDArray[np.int64]
Part = tuple[Images, Labels]

# Four times the largest official file; stops a small compressed file from filling the memory.
MOST_BYTES = 1 << 30
DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


@dataclass(frozen=True, eq=False)  # eq: comparing arrays gives an array, not a truth value
class Arrays:
    """A data set: images (N, C, H, W) uint8, labels (N,) int64 in 0..len(class_names)-1."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    class_names: tuple[str, ...]


# ---- finding and reading files ----


def _is_file(path: Path) -> bool:
    with reading(path):
        return path.is_file()


def _read(path: Path) -> bytes:
    """The content of ``path``, decompressed if its name ends in .gz."""
    with reading(path):
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as stream:
            content = stream.read(MOST_BYTES + 1)  # reading to the end is also what checks the checksum
    if len(content) > MOST_BYTES:
        refuse(path, f"holds more than {MOST_BYTES} bytes")
    return content


def _missing(where: object) -> NoReturn:
    problem = "is missing though other files of the set are there"
    raise MissingData(f"{where} {problem}: pass --data-dir, or --download to fetch them")


def _nothing(data_dir: Path, names: Sequence[str]) -> NoReturn:
    raise MissingData(f"none of {', '.join(names)} is in {data_dir}: pass --data-dir, or --download to fetch them")


def _find(folders: Sequence[Path], wanted: Sequence[Sequence[str]]) -> list[Path]:
    """One path per file wanted, each known by several spellings, in the first folder that has any; [] if none has.

    Raises:
        MissingData: that folder lacks one of the files.
    """
    for folder in folders:
        found = [next((folder / name for name in names if _is_file(folder / name)), None) for names in wanted]
        if any(found):
            return [path or _missing(folder / names[0]) for path, names in zip(found, wanted, strict=True)]
    return []


def _checked(images: Images, labels: Any, classes: int, where: object) -> Part:
    """Images (N, C, H, W) and labels (N,), N > 0, every label an integer in 0..classes-1, else InvalidInput."""
    if len(images) == 0 or len(images) != len(labels):
        refuse(where, f"holds {len(images)} images and {len(labels)} labels")
    with reading(where):
        numbers = np.array(labels, dtype=np.int64)
    wrong = numbers[(numbers < 0) | (numbers >= classes)]
    if wrong.size:
        refuse(where, f"holds the label {wrong[0]}, outside 0..{classes - 1}")
    return images, numbers


# ---- CIFAR ----


def _pickled_batch(raw: bytes, where: str, classes: int, key: bytes) -> Part:
    """Images (N, 3, 32, 32) and labels (N,) of a CIFAR Python file."""
    data, labels = read_pickle(raw, where, b"data", key)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        refuse(where, "does not hold its labels as a list of integers")
    return _checked(rows_of(data, where).reshape(-1, 3, 32, 32), labels, classes, where)


def _pickled_names(raw: bytes, where: str, key: bytes) -> list[str]:
    (names,) = read_pickle(raw, where, key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        refuse(where, "does not hold its class names as a list of bytes")
    with reading(where):
        return [name.decode() for name in names]


def _binary_batch(raw: bytes, where: str, classes: int, label_bytes: int) -> Part:
    """Images (N, 3, 32, 32) and labels (N,) of a CIFAR binary file: the last label byte counts, then R, G, B planes."""
    length = label_bytes + 3072
    if len(raw) == 0 or len(raw) % length:
        refuse(where, f"holds {len(raw)} bytes, not a positive multiple of {length}")
    records = np.frombuffer(raw, np.uint8).reshape(-1, length)
    return _checked(records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1], classes, where)


def _text_names(raw: bytes, where: str) -> list[str]:
    with reading(where):
        return raw.decode().split()


@dataclass(frozen=True)
class _Layout:
    """One form in which CIFAR is published: its files, and how their bytes are decoded."""

    classes: int
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    names: str
    batch: Callable[..., Part]
    class_names: Callable[[bytes, str], list[str]]

    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.names)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BINARY10 = _Layout(
    classes=10,
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    train=tuple(f"{name}.bin" for name in _BATCHES),
    test="test_batch.bin",
    names="batches.meta.txt",
    batch=partial(_binary_batch, label_bytes=1),
    class_names=_text_names,
)
_PYTHON10 = _Layout(
    classes=10,
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train=_BATCHES,
    test="test_batch",
    names="batches.meta",
    batch=partial(_pickled_batch, key=b"labels"),
    class_names=partial(_pickled_names, key=b"label_names"),
)
_BINARY100 = _Layout(
    classes=100,
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    train=("train.bin",),
    test="test.bin",
    names="fine_label_names.txt",
    batch=partial(_binary_batch, label_bytes=2),
    class_names=_text_names,
)
_PYTHON100 = _Layout(
    classes=100,
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train=("train",),
    test="test",
    names="meta",
    batch=partial(_pickled_batch, key=b"fine_labels"),
    class_names=partial(_pickled_names, key=b"fine_label_names"),
)


def _archive_members(path: Path, layout: _Layout) -> dict[str, bytes]:
    """The files of ``layout`` in a .tar.gz, in one forward pass, since going back means decompressing again."""
    found = {}
    with reading(path), gzip.open(path) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                folder, name = ("", *PurePosixPath(member.name).parts)[-2:]
                if folder == layout.folder and name in layout.files():
                    found[name] = _member(archive, member, path)
        while stream.read(1 << 20):  # to the end, where the checksum of the whole is compared
            pass
    for name in layout.files():
        if name not in found:
            _missing(f"{path}/{layout.folder}/{name}")
    return found


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    stream = archive.extractfile(member) if member.isfile() and member.size <= MOST_BYTES else None
    if stream is None:
        refuse(path, f"holds {member.name!r} as something else than a file of at most {MOST_BYTES} bytes")
    return stream.read()


def _assembled(layout: _Layout, content: dict[str, bytes], where: str) -> Arrays:
    def joined(files: Sequence[str]) -> Part:
        """The parts of several files, copied into arrays that can be written to."""
        parts = [layout.batch(content.pop(file), f"{where}/{file}", classes=layout.classes) for file in files]
        images, labels = zip(*parts, strict=True)
        return np.concatenate(images), np.concatenate(labels)

    train, test = joined(layout.train), joined([layout.test])
    names = layout.class_names(content[layout.names], f"{where}/{layout.names}")
    if len(set(names)) != layout.classes or len(names) != layout.classes:
        refuse(f"{where}/{layout.names}", f"does not hold {layout.classes} different class names")
    return Arrays(*train, *test, class_names=tuple(names))


def _cifar(data_dir: Path, binary: _Layout, python: _Layout) -> Arrays:
    """CIFAR, images (N, 3, 32, 32), from a folder or, failing that, from an archive as downloaded."""
    for layout in (binary, python):
        found = _find((data_dir / layout.folder, data_dir), [[name] for name in layout.files()])
        if found:
            return _assembled(layout, {path.name: _read(path) for path in found}, str(found[0].parent))
    for layout in (python, binary):  # the Python archive first: it is the one that other tools leave behind
        archive = data_dir / layout.archive
        if _is_file(archive):
            return _assembled(layout, _archive_members(archive, layout), f"{archive}/{layout.folder}")
    folders = [f"{layout.folder}/{layout.train[0]}" for layout in (binary, python)]
    _nothing(data_dir, [*folders, python.archive, binary.archive])


# ---- MNIST and its successors ----


def _idx(path: Path, shape: tuple[int, ...]) -> Images:
    """(N, *shape) from an idx file: 0, 0, 8 for uint8, the number of axes, their big-endian lengths, the bytes."""
    raw, axes = _read(path), 1 + len(shape)
    if raw[:4] != bytes((0, 0, 8, axes)) or len(raw) < 4 + 4 * axes:
        refuse(path, f"does not begin as an idx file of uint8 with {axes} axes does")
    sizes = tuple(int(size) for size in np.frombuffer(raw, ">u4", axes, offset=4))
    if sizes[1:] != shape:
        refuse(path, f"announces items of shape {sizes[1:]}, not {shape}")
    if len(raw) != 4 + 4 * axes + sizes[0] * int(np.prod(shape)):
        refuse(path, f"announces {sizes[0]} items, which its {len(raw)} bytes do not match")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(sizes).copy()  # a copy can be written to


def _spellings(name: str) -> list[str]:
    return [spelling + end for end in ("", ".gz") for spelling in (name, name.replace("-idx", ".idx"))]


def _mnist(data_dir: Path, folder: str, names: tuple[str, ...]) -> Arrays:
    """MNIST or a set of its form, images (N, 1, 28, 28), plain or .gz."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    wanted = [_spellings(f"{part}-{kind}") for part in ("train", "t10k") for kind in kinds]
    found = _find((data_dir / folder / "raw", data_dir / folder, data_dir / "raw", data_dir), wanted)
    if not found:
        _nothing(data_dir, [f"{folder}/raw/{wanted[0][0]}", *wanted[0]])

    def part(images: Path, labels: Path) -> Part:
        return _checked(_idx(images, (28, 28))[:, None], _idx(labels, ()), 10, labels)

    return Arrays(*part(*found[:2]), *part(*found[2:]), class_names=names)


# ---- SVHN and digits ----


def _svhn_part(path: Path) -> Part:
    """Images (N, 3, 32, 32) and labels (N,) from X (32, 32, 3, N) and y (N, 1), in which 10 stands for the digit 0."""
    from scipy.io import loadmat

    with reading(path):
        content = loadmat(str(path), appendmat=False, variable_names=["X", "y"])
    pixels, labels = (np.asarray(content.get(name)) for name in ("X", "y"))
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        refuse(path, "does not hold X as a (32, 32, 3, N) array of uint8")
    if labels.dtype.kind not in "iu" or labels.shape != (pixels.shape[3], 1):
        refuse(path, "does not hold y as an (N, 1) array of integers, one for each image")
    images = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
    return _checked(images, np.where(labels == 10, 0, labels)[:, 0], 10, path)


def _svhn(data_dir: Path) -> Arrays:
    """SVHN cropped digits, images (N, 3, 32, 32)."""
    names = ["train_32x32.mat", "test_32x32.mat"]
    found = _find((data_dir, data_dir / "SVHN", data_dir / "svhn"), [[name] for name in names])
    if not found:
        _nothing(data_dir, names)
    return Arrays(*_svhn_part(found[0]), *_svhn_part(found[1]), class_names=DIGITS)


def _digits(data_dir: Path) -> Arrays:
    """The 1797 grey images (N, 1, 8, 8) that come with scikit-learn, a fixed fifth of each class as the test."""
    return _bundled()


@cache  # a quarter of a second to read, which programs that train many small networks would spend on each
def _bundled() -> Arrays:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    images = np.rint(bundle.images * 255 / 16).astype(np.uint8)[:, None]
    labels = bundle.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return Arrays(images[train], labels[train], images[test], labels[test], DIGITS)


READERS: dict[str, Callable[[Path], Arrays]] = {
    "cifar10": partial(_cifar, binary=_BINARY10, python=_PYTHON10),
    "cifar100": partial(_cifar, binary=_BINARY100, python=_PYTHON100),
    "mnist": partial(_mnist, folder="MNIST", names=DIGITS),
    "fashion-mnist": partial(_mnist, folder="FashionMNIST", names=FASHION),
    "kmnist": partial(_mnist, folder="KMNIST", names=KUZUSHIJI),
    "svhn": _svhn,
    "digits": _digits,
}
