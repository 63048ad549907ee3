"""Every format is written here in miniature, from its description, and must come back exactly.

Where a reader wants a published digest it is given that of the miniature; all damage is named.
"""

import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from layerwise.data import DATASETS, Arrays, RemoteFile
from layerwise.data.published import FILES
from layerwise.data.readers import (
    CIFAR10,
    CIFAR100,
    Form,
    Part,
    read_cifar,
    read_digits,
    read_idx,
    read_svhn,
)
from layerwise.errors import InvalidInput, MissingData

Alter = Callable[[bytes], bytes]

CLASSES = {"cifar10": 10, "cifar100": 100}
FORMS = {
    (name, kind): form
    for name, forms in (("cifar10", CIFAR10), ("cifar100", CIFAR100))
    for kind, form in zip(("binary", "python"), forms, strict=True)
}
FOLDERS = {key: form.folder for key, form in FORMS.items()}
CIFARS = sorted(FOLDERS)
IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}


# ---- writers ----


def random_part(count: int, shape: tuple[int, ...], classes: int, seed: int) -> Part:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = np.append(
        rng.integers(0, classes, count - 1), classes - 1
    )  # the last class is always there
    return images, labels


def cifar_parts(data_set: str) -> dict[str, Part]:
    stems = (
        [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
        if data_set == "cifar10"
        else ["train", "test"]
    )
    return {
        stem: random_part(3 + i, (3, 32, 32), CLASSES[data_set], i) for i, stem in enumerate(stems)
    }


def binary_files(data_set: str) -> dict[str, bytes]:
    files = {}
    for stem, (images, labels) in cifar_parts(data_set).items():
        coarse = b"\x13" if data_set == "cifar100" else b""
        pairs = zip(images, labels, strict=True)
        records = [coarse + bytes([label]) + image.tobytes() for image, label in pairs]
        files[f"{stem}.bin"] = b"".join(records)
    return files


def python2_pickle(
    rows: np.ndarray, key: str, labels: np.ndarray, column_major: bool = False
) -> bytes:
    """Bytes as Python 2 wrote the official files: short strings for text, numpy.core, labels as a
    list.
    """
    raw, name = (rows.T if column_major else rows).tobytes(), key.encode()
    flags = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return b"".join(
        [
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01K%cM\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R" % len(rows) + flags,
            (b"\x88" if column_major else b"\x89")
            + b"T"
            + struct.pack("<I", len(raw))
            + raw
            + b"tb",
            b"U%c" % len(name)
            + name
            + b"]("
            + b"".join(b"K%c" % label for label in labels)
            + b"eu.",
        ]
    )


def python_files(data_set: str) -> dict[str, bytes]:
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[data_set]
    return {
        stem: python2_pickle(images.reshape(-1, 3072), key, labels, column_major=number == 1)
        for number, (stem, (images, labels)) in enumerate(cifar_parts(data_set).items())
    }


def cifar_files(data_set: str, kind: str) -> dict[str, bytes]:
    return binary_files(data_set) if kind == "binary" else python_files(data_set)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def tar(folder: str, files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in {"readme.html": b"unrelated", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def pinned(form: Form, files: dict[str, bytes], archive: bytes = b"") -> Form:
    """The form whose published files are these."""
    parts = [
        {name: md5 and hashlib.md5(files[name]).hexdigest() for name, md5 in part.items()}
        for part in (form.train, form.test)
    ]
    return replace(form, train=parts[0], test=parts[1], sha256=hashlib.sha256(archive).hexdigest())


def write_archive(
    data_dir: Path, data_set: str, kind: str, files: dict[str, bytes] | None = None
) -> Path:
    path = data_dir / f"cifar-{CLASSES[data_set]}-{kind}.tar.gz"
    content = cifar_files(data_set, kind) if files is None else files
    path.write_bytes(gzip.compress(tar(FOLDERS[data_set, kind], content), compresslevel=1))
    return path


def idx(array: np.ndarray) -> bytes:
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def idx_parts() -> dict[str, Part]:
    return {"train": random_part(7, (1, 28, 28), 10, 1), "t10k": random_part(4, (1, 28, 28), 10, 2)}


def idx_files(end: str = "", dot: str = "-") -> dict[str, bytes]:
    files = {}
    for part, (images, labels) in idx_parts().items():
        for kind, array in (
            (f"images{dot}idx3", np.asarray(images)[:, 0]),
            (f"labels{dot}idx1", labels),
        ):
            files[f"{part}-{kind}-ubyte{end}"] = gzip.compress(idx(array)) if end else idx(array)
    return files


def svhn_parts() -> dict[str, Part]:
    return {
        "train_32x32.mat": random_part(6, (3, 32, 32), 10, 1),
        "test_32x32.mat": random_part(3, (3, 32, 32), 10, 2),
    }


def write_mat(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
    savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": stored}, do_compression=True)


# ---- checks ----


def assert_holds(arrays: Arrays, train: list[Part], test: Part) -> None:
    images, labels = (np.concatenate(columns) for columns in zip(*train, strict=True))
    expected: tuple[Any, ...] = (images, labels, *test)
    got: tuple[Any, ...] = (
        arrays.train_images,
        arrays.train_labels,
        arrays.test_images,
        arrays.test_labels,
    )
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.flags.c_contiguous


def assert_cifar(arrays: Arrays, data_set: str) -> None:
    *train, test = cifar_parts(data_set).values()
    assert_holds(arrays, train, test)


def refusal(
    data_set: str, data_dir: Path, *mentions: object, kind: type[InvalidInput] = InvalidInput
) -> str:
    """The message with which the reader refuses ``data_dir``, its class, its one line and its
    mentions checked.
    """
    with pytest.raises(InvalidInput) as caught:
        DATASETS[data_set].read(data_dir)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for mention in mentions:
        assert str(mention) in message
    return message


def damage(data_dir: Path, data_set: str, kind: str, name: str, content: bytes) -> Path:
    """A folder in which only the file ``name`` is not as it should be; returns that file."""
    return (
        write(data_dir / FOLDERS[data_set, kind], cifar_files(data_set, kind) | {name: content})
        / name
    )


# ---- CIFAR ----


@pytest.mark.parametrize(("data_set", "kind"), CIFARS)
def test_cifar_from_folder_inner_folder_and_archive(
    tmp_path: Path, data_set: str, kind: str
) -> None:
    files = cifar_files(data_set, kind)
    inner = write(tmp_path / "folder" / FOLDERS[data_set, kind], files)
    (tmp_path / "archive").mkdir()
    archive = write_archive(tmp_path / "archive", data_set, kind)
    form = pinned(FORMS[data_set, kind], files, archive.read_bytes())
    for data_dir in (inner.parent, inner, archive.parent):
        arrays = read_cifar(data_dir, [form])
        assert_cifar(arrays, data_set)
        assert arrays.train_images.flags.writeable
    assert list(archive.parent.iterdir()) == [archive]  # read in place


def test_folder_is_preferred_to_archive(tmp_path: Path) -> None:
    write(tmp_path / "cifar-10-batches-bin", binary_files("cifar10"))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not looked at")
    assert_cifar(DATASETS["cifar10"].read(tmp_path), "cifar10")


@pytest.mark.parametrize(("data_set", "kind"), CIFARS)
def test_missing_cifar_file_is_named(tmp_path: Path, data_set: str, kind: str) -> None:
    files = cifar_files(data_set, kind)
    for name in list(files):
        partial_set = {other: content for other, content in files.items() if other != name}
        folder = write(tmp_path / name / FOLDERS[data_set, kind], partial_set)
        refusal(data_set, tmp_path / name, folder, name, kind=MissingData)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 3072, b"\0" * (2 * 3073 - 1), b"\0" * (2 * 3073 + 1)]
)
def test_truncated_binary_file(tmp_path: Path, content: Any) -> None:
    path = damage(tmp_path, "cifar10", "binary", "data_batch_3.bin", content)
    refusal("cifar10", tmp_path, path, f"{len(content)} bytes", "3073", "Fetch it again")


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch"])
def test_a_pickle_that_is_not_the_published_one_is_not_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle, "Unpickler", None)
    files = python_files("cifar10")
    form = pinned(CIFAR10[1], files)
    write(tmp_path / form.folder, files | {name: files[name].replace(b"labels", b"Labels")})
    with pytest.raises(
        InvalidInput, match=f"{name}: its MD5 is not that of the published file. Fetch it again"
    ):
        read_cifar(
            tmp_path, [replace(form, decode=lambda raw, path: cifar_parts("cifar10")[path.name])]
        )


class Hostile:
    def __init__(self, function: Callable[..., Any], *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", ["system", "open", "eval"])
@pytest.mark.parametrize("digest", ["of the published file", "its own"])
def test_hostile_pickle_is_refused_unexecuted(
    tmp_path: Path, protocol: int, function: str, digest: str
) -> None:
    """Not even a digest that was pinned by mistake lets a file run anything."""
    marker = tmp_path / "marker"
    call: tuple[Any, ...] = {
        "system": (os.system, f"touch {marker}"),
        "open": (open, str(marker), "w"),
        "eval": (eval, f"open({str(marker)!r}, 'w')"),
    }[function]
    hostile = pickle.dumps({"data": Hostile(*call)}, protocol)
    pickle.loads(hostile)
    assert marker.exists()  # the attack works on an ordinary reader
    marker.unlink()
    path = damage(tmp_path, "cifar10", "python", "data_batch_1", hostile)
    files = python_files("cifar10") | ({"data_batch_1": hostile} if digest == "its own" else {})
    with pytest.raises(InvalidInput) as caught:
        read_cifar(tmp_path, [pinned(CIFAR10[1], files)])
    wanted = rf"names \w+\.{function}, which was not executed" if digest == "its own" else "its MD5"
    assert re.search(wanted, str(caught.value))
    assert str(path) in str(caught.value)
    assert not marker.exists()


def altered_checksum(raw: bytes) -> bytes:
    return raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:]


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize(
    "alter",
    [
        lambda raw: b"",
        lambda raw: b"<html>not found</html>",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        altered_checksum,
        gzip.decompress,
        lambda raw: raw,
    ],
    ids=["empty", "html", "half", "one-byte-short", "checksum", "not-gzip", "not-the-published"],
)
def test_altered_archive_is_not_opened(
    tmp_path: Path, alter: Alter, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_archive(tmp_path, "cifar10", kind)
    archive.write_bytes(alter(archive.read_bytes()))
    monkeypatch.setattr(tarfile, "open", None)
    refusal(
        "cifar10", tmp_path, archive, "SHA256 is not that of the published file", "Fetch it again"
    )


# ---- MNIST and its successors ----


def published(files: dict[str, bytes]) -> list[RemoteFile]:
    """Descriptions of the idx files, in the order of the readers."""
    return [
        RemoteFile(name, hashlib.sha256(content).hexdigest(), len(content), ())
        for name, content in files.items()
    ]


@pytest.mark.parametrize("data_set", IDX_FOLDERS)
@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx(tmp_path: Path, data_set: str, end: str, dot: str) -> None:
    folder, files = IDX_FOLDERS[data_set], idx_files(end, dot)
    raw = write(tmp_path / folder / "raw", files)
    names = [file.name for file in FILES[data_set]]
    described = [
        replace(file, path=name) for name, file in zip(names, published(files), strict=True)
    ]
    for data_dir in (tmp_path, raw.parent, raw):
        arrays = read_idx(data_dir, folder, described)
        assert_holds(arrays, [idx_parts()["train"]], idx_parts()["t10k"])
        assert arrays.train_images.flags.writeable


def test_each_idx_set_is_read_from_its_own_folder(tmp_path: Path) -> None:
    write(tmp_path / "MNIST" / "raw", idx_files())
    refusal("kmnist", tmp_path, tmp_path, "KMNIST/raw/train-images-idx3-ubyte", kind=MissingData)


@pytest.mark.parametrize("name", sorted(idx_files()))
def test_missing_idx_file_is_named(tmp_path: Path, name: str) -> None:
    raw = write(tmp_path / "MNIST" / "raw", idx_files())
    (raw / name).unlink()
    refusal("mnist", tmp_path, raw, name, "--download", kind=MissingData)


IMAGES = idx(np.zeros((7, 28, 28)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        IMAGES[:3],
        IMAGES[:9],
        b"\1" + IMAGES[1:],
        IMAGES[:2] + b"\x0d" + IMAGES[3:],
        IMAGES[:-1],
        IMAGES + b"\0",
        IMAGES[:4] + b"\xff" * 4 + IMAGES[8:],
        IMAGES[:4] + b"\xff" * 12 + IMAGES[16:],
        IMAGES[:3] + b"\xff" + IMAGES[4:],
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes) -> None:
    name = "train-images-idx3-ubyte"
    raw = write(tmp_path / "MNIST" / "raw", idx_files() | {name: content})
    refusal("mnist", tmp_path, raw / name, "Fetch it again")


@pytest.mark.parametrize(
    "alter", [gzip.decompress, altered_checksum, lambda raw: raw[:-1], lambda raw: raw]
)
def test_altered_gzip_is_not_unpacked(
    tmp_path: Path, alter: Alter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "KMNIST" / "raw", idx_files(".gz")) / "train-images-idx3-ubyte.gz"
    path.write_bytes(alter(path.read_bytes()))
    monkeypatch.setattr(gzip, "decompress", None)
    refusal("kmnist", tmp_path, path, "SHA256 is not that of the published file", "Fetch it again")


# ---- SVHN and digits ----


@pytest.mark.parametrize("folder", [".", "SVHN", "svhn"])
def test_svhn(tmp_path: Path, folder: str) -> None:
    files = []
    for name, (images, labels) in svhn_parts().items():
        write_mat(tmp_path / folder / name, images, np.append(labels[:-1], 0))
        digest = hashlib.sha256((tmp_path / folder / name).read_bytes()).hexdigest()
        files.append(RemoteFile(name, digest, 0, ()))
    train, test = ((images, np.append(labels[:-1], 0)) for images, labels in svhn_parts().values())
    assert_holds(read_svhn(tmp_path, files), [train], test)


def test_missing_svhn_file_is_named(tmp_path: Path) -> None:
    write_mat(tmp_path / "train_32x32.mat", *svhn_parts()["train_32x32.mat"])
    refusal("svhn", tmp_path, f"test_32x32.mat is not in {tmp_path}", kind=MissingData)


@pytest.mark.parametrize("length", [0, 3, 100, 5000, -1, None])
def test_a_mat_that_is_not_the_published_one_is_not_opened(
    tmp_path: Path, length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, part in svhn_parts().items():
        write_mat(tmp_path / name, *part)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:length])
    monkeypatch.setattr("scipy.io.loadmat", None)
    refusal("svhn", tmp_path, path, "SHA256 is not that of the published file", "Fetch it again")


def test_digits() -> None:
    from sklearn.datasets import load_digits

    arrays, again = read_digits(Path("nowhere")), read_digits(Path("elsewhere"))
    assert arrays.train_images.shape == (1437, 1, 8, 8)
    assert arrays.test_images.shape == (360, 1, 8, 8)
    np.testing.assert_array_equal(arrays.test_images, again.test_images)
    together = np.concatenate([arrays.train_images, arrays.test_images])
    assert together.dtype == np.uint8
    scaled = np.array([round(value * 255 / 16) for value in range(17)])[
        load_digits().images.astype(int)
    ]
    assert sorted(map(bytes, together)) == sorted(
        map(bytes, scaled.astype(np.uint8))
    )  # each image exactly once
    fifths = np.bincount(load_digits().target) / 5
    assert np.abs(np.bincount(arrays.test_labels) - fifths).max() < 1
    assert arrays.train_labels.dtype == np.int64


# ---- every data set ----


@pytest.mark.parametrize("data_set", sorted(FILES))
def test_nothing_found(tmp_path: Path, data_set: str) -> None:
    for data_dir in (tmp_path, tmp_path / "absent"):
        refusal(
            data_set,
            data_dir,
            data_dir,
            "Give --data-dir, or --download to fetch it",
            kind=MissingData,
        )


def test_what_was_looked_for_is_named(tmp_path: Path) -> None:
    names = [
        "cifar-10-batches-bin",
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        "cifar-10-binary.tar.gz",
    ]
    refusal("cifar10", tmp_path, *names, kind=MissingData)
    refusal("svhn", tmp_path, "train_32x32.mat", "test_32x32.mat", kind=MissingData)


def deny(*arguments: object, **options: object) -> NoReturn:
    raise PermissionError(13, "Permission denied")  # chmod would not stop a test run by root


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write(tmp_path / "MNIST" / "raw", idx_files())
    archive = write_archive(tmp_path, "cifar10", "python")
    monkeypatch.setattr(Path, "read_bytes", deny)
    for data_set, path in (("mnist", raw / "train-images-idx3-ubyte"), ("cifar10", archive)):
        refusal(data_set, tmp_path, path, "Permission denied", "Make it readable")
