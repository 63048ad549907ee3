"""Readers of the published image data sets, from the data folder to arrays.

A compressed file, a pickle or a MATLAB file is decoded only when its digest is the published one.
The plain forms (CIFAR's binary files, unpacked idx files) are only reshaped.

* CIFAR-10 and CIFAR-100: https://www.cs.toronto.edu/~kriz/cifar.html
* MNIST's idx files: http://yann.lecun.com/exdb/mnist/
* SVHN cropped digits, MATLAB: http://ufldl.stanford.edu/housenumbers/
"""

import gzip
import hashlib
import os
import pickle
import stat
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from layerwise.data.dataset import Arrays, Images, Labels
from layerwise.data.download import RemoteFile
from layerwise.errors import InvalidInput, MissingData, brief

MOST_BYTES = 200 * 10**6  # of files that are read together; the largest published have 184 MB
Part = tuple[Images, Labels]


def refuse(path: object, problem: str) -> NoReturn:
    raise InvalidInput(f"Cannot read {path}: {problem}. Fetch it again.")


def missing(folder: Path, names: Sequence[str]) -> NoReturn:
    raise MissingData(
        f"Cannot find the data set: {' or '.join(names)} is not in {folder}. Give --data-dir, or "
        "--download to fetch it."
    )


def find(folders: Sequence[Path], wanted: Sequence[Sequence[str]]) -> list[Path]:
    """One path per file, each known by several names, in the first folder that has any; else []."""
    for folder in folders:
        paths = [
            next((folder / name for name in names if os.path.lexists(folder / name)), None)
            for names in wanted
        ]
        present = [path for path in paths if path is not None]
        if len(present) == len(wanted):
            return present
        if present:
            missing(
                folder, [names[0] for path, names in zip(paths, wanted, strict=True) if not path]
            )
    return []


def read_file(path: Path, digest: str | None = None) -> bytes:
    """Content of a file.

    Args:
        digest: that it must have, in hexadecimal: SHA-256, or MD5 if it is as short as that.

    Raises:
        InvalidInput: it cannot be read, or has another digest.
    """
    try:
        check_sizes([path])
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInput(
            f"Cannot read {path}: {reason}. Make it readable to this user."
        ) from error
    if digest is not None:
        name = "sha256" if len(digest) == 64 else "md5"
        if hashlib.new(name, content, usedforsecurity=False).hexdigest() != digest:
            refuse(path, f"its {name.upper()} is not that of the published file")
    return content


def check_sizes(paths: Sequence[Path]) -> None:
    """Refuse files that are no regular ones (a pipe would be waited for), or too large together.

    Raises:
        InvalidInput: naming the file, or the first.
        OSError: one cannot be asked.
    """
    facts = [path.stat() for path in paths]
    for path, fact in zip(paths, facts, strict=True):
        if not stat.S_ISREG(fact.st_mode):
            refuse(path, "it is not a regular file")
    if sum(fact.st_size for fact in facts) > MOST_BYTES:
        refuse(paths[0], f"its data set has more than {MOST_BYTES} bytes")


# ---- CIFAR ----


def binary_part(raw: bytes, path: Path, label_bytes: int) -> Part:
    """Images (N, 3, 32, 32) and labels (N,) of CIFAR's binary records.

    A record is its label bytes, of which the last one counts, and then its pixels.
    """
    length = label_bytes + 3 * 32 * 32
    if not raw or len(raw) % length:
        refuse(path, f"it holds {len(raw)} bytes, not a positive multiple of {length}")
    records = np.frombuffer(raw, np.uint8).reshape(-1, length)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1].astype(
        np.int64
    )


def pickled_part(raw: bytes, path: Path, key: str) -> Part:
    """Images (N, 3, 32, 32) and labels (N,) of a pickle by Python 2."""
    try:
        content = ArrayUnpickler(BytesIO(raw), encoding="latin1").load()
        return content["data"].reshape(-1, 3, 32, 32), np.array(content[key], np.int64)
    except Exception as error:  # a damaged pickle chooses what is raised
        refuse(path, brief(error) or type(error).__name__)


class ArrayUnpickler(pickle.Unpickler):
    """Reader of dicts, lists, numbers, text and arrays; any other name is refused."""

    NAMES: Mapping[str, Any] = {
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self.NAMES:
            raise pickle.UnpicklingError(f"it names {full}, which was not executed")
        return self.NAMES[full]


@dataclass(frozen=True)
class Form:
    """Form in which CIFAR is published.

    Attributes:
        folder: that is unpacked from the archive.
        train, test: names of its files, with the MD5 that a file must have where it is not safe to
            read any. MD5 suffices: nobody can make another file with the digest of a given one.
        archive: its name; sha256: its digest.
        decode: from the content of a file and its path to images and labels.
    """

    folder: str
    train: Mapping[str, str | None]
    test: Mapping[str, str | None]
    archive: str
    sha256: str
    decode: Callable[[bytes, Path], Part]

    def decoded(self, content: Mapping[str, bytes], folder: Path) -> Arrays:
        def joined(names: Iterable[str]) -> Part:
            parts = [self.decode(content[name], folder / name) for name in names]
            images, labels = zip(*parts, strict=True)
            # NumPy keeps the order of what it joins, and a pickle may hold columns first
            return np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels)

        return Arrays(*joined(self.train), *joined(self.test))


CIFAR10 = (
    Form(
        "cifar-10-batches-bin",
        {f"data_batch_{number}.bin": None for number in range(1, 6)},
        {"test_batch.bin": None},
        "cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        partial(binary_part, label_bytes=1),
    ),
    Form(
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
        "cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        partial(pickled_part, key="labels"),
    ),
)
CIFAR100 = (
    Form(
        "cifar-100-binary",
        {"train.bin": None},
        {"test.bin": None},
        "cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        partial(binary_part, label_bytes=2),
    ),
    Form(
        "cifar-100-python",
        {"train": "16019d7e3df5f24257cddd939b257f8d"},
        {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        "cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        partial(pickled_part, key="fine_labels"),
    ),
)


def read_cifar(data_dir: Path, forms: Sequence[Form]) -> Arrays:
    """CIFAR, images (N, 3, 32, 32), from an unpacked folder or else from an archive."""
    for form in forms:
        digests = {**form.train, **form.test}
        paths = find((data_dir / form.folder, data_dir), [[name] for name in digests])
        if paths:
            check_sizes([path for path in paths if path.exists()])
            return form.decoded(
                {path.name: read_file(path, digests[path.name]) for path in paths}, paths[0].parent
            )
    for form in reversed(forms):  # first the archive that --download fetches
        archive = data_dir / form.archive
        if archive.exists():
            return read_archive(form, archive)
    missing(data_dir, [name for form in forms for name in (f"{form.folder}/", form.archive)])


def read_archive(form: Form, path: Path) -> Arrays:
    with tarfile.open(fileobj=BytesIO(read_file(path, form.sha256))) as archive:
        content = {}
        for name in (*form.train, *form.test):
            member = archive.extractfile(f"{form.folder}/{name}")
            assert member is not None  # the digest says that it is a file
            content[name] = member.read()
    return form.decoded(content, path / form.folder)


# ---- MNIST and its successors ----


def read_idx(data_dir: Path, folder: str, files: Sequence[RemoteFile]) -> Arrays:
    """MNIST or a data set of its form, images (N, 1, 28, 28), unpacked or .gz.

    Args:
        folder: where torchvision keeps it.
        files: training images and labels, test images and labels.
    """
    own = data_dir / folder
    paths = find(
        (own / "raw", own, data_dir / "raw", data_dir), [spellings(file) for file in files]
    )
    if not paths:
        missing(data_dir, [f"{folder}/raw/{files[0].name}"])
    parts = [
        idx_array(path, file.sha256, axes)
        for path, file, axes in zip(paths, files, (3, 1, 3, 1), strict=True)
    ]
    train_images, train_labels, test_images, test_labels = parts
    return Arrays(train_images[:, None], train_labels, test_images[:, None], test_labels)


def spellings(file: RemoteFile) -> list[str]:
    plain = file.name.removesuffix(".gz")
    return [name + end for end in ("", ".gz") for name in (plain, plain.replace("-idx", ".idx"))]


def idx_array(path: Path, sha256: str, axes: int) -> NDArray[np.uint8]:
    """uint8 from an idx file: 0, 0, 8, the number of axes, their big-endian lengths, the bytes."""
    packed = path.suffix == ".gz"
    raw = read_file(path, sha256 if packed else None)
    if packed:
        raw = gzip.decompress(raw)
    if raw[:4] != bytes((0, 0, 8, axes)):
        refuse(path, f"it does not begin as an idx file of bytes with {axes} axes does")
    try:
        sizes = np.frombuffer(raw, ">u4", axes, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(sizes).copy()
    except (IndexError, ValueError) as error:
        refuse(path, f"its {len(raw)} bytes are not the array that it announces ({error})")


# ---- SVHN and digits ----


def read_svhn(data_dir: Path, files: Sequence[RemoteFile]) -> Arrays:
    """SVHN cropped digits, images (N, 3, 32, 32)."""
    names = [file.name for file in files]
    paths = find((data_dir, data_dir / "SVHN", data_dir / "svhn"), [[name] for name in names])
    if not paths:
        missing(data_dir, names)
    train, test = (svhn_part(path, file.sha256) for path, file in zip(paths, files, strict=True))
    return Arrays(*train, *test)


def svhn_part(path: Path, sha256: str) -> Part:
    """Images (N, 3, 32, 32) and labels (N,) of X (32, 32, 3, N) and y (N, 1), where 10 means 0."""
    from scipy.io import loadmat  # slow to import

    # its digest is the published one, so nothing forged reaches the parser
    arrays = loadmat(BytesIO(read_file(path, sha256)), variable_names=["X", "y"])
    images = np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1))
    return images, arrays["y"].ravel().astype(np.int64) % 10


@cache  # a quarter of a second, which programs that train many small networks would spend on each
def bundled_digits() -> Arrays:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    images = np.rint(bundle.images * 255 / 16).astype(np.uint8)[:, None]
    labels = bundle.target.astype(np.int64)
    numbers = np.arange(len(labels))
    train, test = train_test_split(numbers, test_size=0.2, stratify=labels, random_state=0)
    return Arrays(images[train], labels[train], images[test], labels[test])


def read_digits(data_dir: Path) -> Arrays:
    """The 1797 grey images (N, 1, 8, 8) of scikit-learn; a fifth of each class is the test."""
    return bundled_digits()
