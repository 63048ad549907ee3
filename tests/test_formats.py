"""Every format is written here in miniature, from its description, and must come back exactly; all
damage is named.
"""

import gzip
import io
import os
import pickle
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from layerwise.formats import FASHION, KUZUSHIJI, READERS, Arrays, Part

from layerwise.errors import InvalidInput, MissingData

Alter = Callable[[bytes], bytes]

CLASSES = {"cifar10": 10, "cifar100": 100}
FOLDERS = {
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar100", "binary"): "cifar-100-binary",
    ("cifar100", "python"): "cifar-100-python",
}
CIFARS = sorted(FOLDERS)
IDX_FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}


# ---- writers ----


def random_part(count: int, shape: tuple[int, ...], classes: int, seed: int) -> Part:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    # the last class is always there
    labels = np.append(rng.integers(0, classes, count - 1), classes - 1)
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


def names_of(data_set: str) -> list[str]:
    return [f"class_{n}" for n in range(CLASSES[data_set])]


def binary_files(data_set: str) -> dict[str, bytes]:
    files = {}
    for stem, (images, labels) in cifar_parts(data_set).items():
        coarse = b"\x13" if data_set == "cifar100" else b""
        pairs = zip(images, labels, strict=True)
        records = [coarse + bytes([label]) + image.tobytes() for image, label in pairs]
        files[f"{stem}.bin"] = b"".join(records)
    names = "batches.meta.txt" if data_set == "cifar10" else "fine_label_names.txt"
    return files | {names: "\n".join([*names_of(data_set), "", ""]).encode()}


def python_files(data_set: str) -> dict[str, bytes]:
    key, meta, names = {
        "cifar10": (b"labels", "batches.meta", b"label_names"),
        "cifar100": (b"fine_labels", "meta", b"fine_label_names"),
    }[data_set]
    files = {}
    for stem, (images, labels) in cifar_parts(data_set).items():
        files[stem] = pickle.dumps(
            {b"data": images.reshape(-1, 3072), key: labels.tolist()}, protocol=2
        )
    return files | {
        meta: pickle.dumps({names: [name.encode() for name in names_of(data_set)]}, protocol=2)
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
        for kind, array in ((f"images{dot}idx3", images[:, 0]), (f"labels{dot}idx1", labels)):
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
    expected: tuple[np.ndarray, ...] = (images, labels, *test)
    got: tuple[np.ndarray, ...] = (
        arrays.train_images,
        arrays.train_labels,
        arrays.test_images,
        arrays.test_labels,
    )
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs, strict=True)  # strict: shape and dtype too
        assert ours.flags.c_contiguous


def assert_cifar(arrays: Arrays, data_set: str) -> None:
    *train, test = cifar_parts(data_set).values()
    assert_holds(arrays, train, test)
    assert arrays.class_names == tuple(names_of(data_set))


def refusal(
    data_set: str, data_dir: Path, *mentions: object, kind: type[InvalidInput] = InvalidInput
) -> str:
    """The message with which the reader refuses ``data_dir``, its class, its one line and its
    mentions checked.
    """
    with pytest.raises(InvalidInput) as caught:
        READERS[data_set](data_dir)
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
    inner = write(tmp_path / "folder" / FOLDERS[data_set, kind], cifar_files(data_set, kind))
    (tmp_path / "archive").mkdir()
    archive = write_archive(tmp_path / "archive", data_set, kind)
    for data_dir in (inner.parent, inner, archive.parent):
        assert_cifar(READERS[data_set](data_dir), data_set)
    assert list(archive.parent.iterdir()) == [archive]  # read in place


def test_arrays_can_be_written_to(tmp_path: Path) -> None:
    write(tmp_path / "cifar-100-binary", binary_files("cifar100"))
    write(tmp_path / "MNIST" / "raw", idx_files())
    for data_set in ("cifar100", "mnist"):
        arrays = READERS[data_set](tmp_path)
        assert arrays.train_images.flags.writeable
        assert arrays.test_images.flags.writeable


def test_folder_is_preferred_to_archive(tmp_path: Path) -> None:
    write(tmp_path / "cifar-10-batches-py", python_files("cifar10"))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not looked at")
    assert_cifar(READERS["cifar10"](tmp_path), "cifar10")


def test_python2_pickle_with_column_major_data(tmp_path: Path) -> None:
    """The official files come from Python 2: short byte strings for text, numpy.core, and arrays in
    either order.
    """
    images, labels = cifar_parts("cifar100")["train"]
    raw = images.reshape(-1, 3072).T.tobytes()
    flags = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    pickled = b"".join(
        [
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01K\x03M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R" + flags,
            b"\x88T" + struct.pack("<I", len(raw)) + raw + b"tb",
            b"U\x0bfine_labels](" + b"".join(b"K%c" % label for label in labels) + b"eu.",
        ]
    )
    damage(tmp_path, "cifar100", "python", "train", pickled)
    assert_cifar(READERS["cifar100"](tmp_path), "cifar100")


@pytest.mark.parametrize(("data_set", "kind"), CIFARS)
def test_missing_cifar_file_is_named(tmp_path: Path, data_set: str, kind: str) -> None:
    files = cifar_files(data_set, kind)
    for name in list(files):
        partial_set = {other: content for other, content in files.items() if other != name}
        folder = write(tmp_path / name / FOLDERS[data_set, kind], partial_set)
        refusal(data_set, tmp_path / name, folder / name, kind=MissingData)


def test_missing_archive_member_is_named(tmp_path: Path) -> None:
    files = python_files("cifar10")
    del files["data_batch_4"]
    archive = write_archive(tmp_path, "cifar10", "python", files)
    refusal(
        "cifar10",
        tmp_path,
        archive,
        "cifar-10-batches-py/data_batch_4 is missing",
        kind=MissingData,
    )


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 3072, b"\0" * (2 * 3073 - 1), b"\0" * (2 * 3073 + 1)]
)
def test_truncated_binary_file(tmp_path: Path, content: Any) -> None:
    path = damage(tmp_path, "cifar10", "binary", "data_batch_3.bin", content)
    refusal("cifar10", tmp_path, path, f"{len(content)} bytes", "3073", "fetch it again")


@pytest.mark.parametrize(("data_set", "record"), [("cifar10", b"\x0a"), ("cifar100", b"\x00\x64")])
def test_binary_label_out_of_range(tmp_path: Path, data_set: str, record: bytes) -> None:
    name = next(name for name in binary_files(data_set) if name.startswith("test"))
    path = damage(tmp_path, data_set, "binary", name, record + b"\0" * 3072)
    refusal(data_set, tmp_path, path, f"the label {CLASSES[data_set]}", "fetch it again")


@pytest.mark.parametrize(
    "content",
    [b"", b"a\nb\n", b"same\n" * 10, b"0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n9\n", b"\xff\xfe\n" * 10],
)
def test_wrong_class_names(tmp_path: Path, content: Any) -> None:
    path = damage(tmp_path, "cifar10", "binary", "batches.meta.txt", content)
    refusal("cifar10", tmp_path, path, "fetch it again")


ROWS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([1, 2], "dict"),
        ({b"labels": [0, 0]}, "b'data'"),
        ({b"data": ROWS}, "b'labels'"),
        ({b"data": ROWS, b"labels": [0]}, "2 images and 1 labels"),
        ({b"data": ROWS, b"labels": [0, 10]}, "the label 10"),
        ({b"data": ROWS, b"labels": [0, -1]}, "the label -1"),
        ({b"data": ROWS, b"labels": [0, 2**70]}, "OverflowError"),
        ({b"data": ROWS, b"labels": [0, 1.5]}, "integers"),
        ({b"data": ROWS, b"labels": 5}, "list"),
        ({b"data": ROWS[:, 1:], b"labels": [0, 0]}, "(N, 3072)"),
        ({b"data": ROWS.reshape(2, 3, 32, 32), b"labels": [0, 0]}, "(N, 3072)"),
        ({b"data": ROWS.astype(np.float32), b"labels": [0, 0]}, "uint8"),
        ({b"data": ROWS.astype(object), b"labels": [0, 0]}, "uint8"),
        ({b"data": ROWS.view(np.int8), b"labels": [0, 0]}, "uint8"),
        ({b"data": [0] * 3072, b"labels": [0]}, "(N, 3072)"),
    ],
)
def test_pickle_of_wrong_content(tmp_path: Path, content: Any, problem: str) -> None:
    path = damage(tmp_path, "cifar10", "python", "data_batch_2", pickle.dumps(content, protocol=2))
    refusal("cifar10", tmp_path, path, problem, "fetch it again")


def test_pickled_array_with_fewer_bytes_than_its_shape_says(tmp_path: Path) -> None:
    pickled = pickle.dumps({b"data": ROWS, b"labels": [0, 0]}, protocol=2)
    forged = pickled.replace(b"K\x02M\x00\x0c", b"K\x03M\x00\x0c")  # (2, 3072) becomes (3, 3072)
    assert forged != pickled
    path = damage(tmp_path, "cifar10", "python", "data_batch_2", forged)
    refusal("cifar10", tmp_path, path, "(N, 3072)", "fetch it again")


@pytest.mark.parametrize(
    "content", [[b"only", b"two"], "text", {b"label_names": 3}, {b"label_names": ["text"] * 10}]
)
def test_pickled_names_of_wrong_content(tmp_path: Path, content: Any) -> None:
    path = damage(tmp_path, "cifar10", "python", "batches.meta", pickle.dumps(content, protocol=2))
    refusal("cifar10", tmp_path, path, "fetch it again")


@pytest.mark.parametrize(
    "alter",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: b"\x93" + raw,
        lambda raw: raw.hex().encode(),
    ],
    ids=["half", "empty", "shifted", "hexadecimal"],
)
def test_damaged_pickle(tmp_path: Path, alter: Alter) -> None:
    path = damage(tmp_path, "cifar100", "python", "test", alter(python_files("cifar100")["test"]))
    refusal("cifar100", tmp_path, path, "fetch it again")


class Hostile:
    def __init__(self, function: Callable[..., Any], *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", ["system", "open", "eval"])
def test_hostile_pickle_is_refused_unexecuted(tmp_path: Path, protocol: int, function: str) -> None:
    marker = tmp_path / "marker"
    call: tuple[Any, ...] = {
        "system": (os.system, f"touch {marker}"),
        "open": (open, str(marker), "w"),
        "eval": (eval, f"open({str(marker)!r}, 'w')"),
    }[function]
    hostile = pickle.dumps({b"data": Hostile(*call)}, protocol)
    pickle.loads(hostile)
    assert marker.exists()  # the attack works on an ordinary reader
    marker.unlink()
    path = damage(tmp_path, "cifar10", "python", "data_batch_1", hostile)
    message = refusal("cifar10", tmp_path, path, "nothing was executed", "fetch it again")
    assert re.search(rf"names '\w+\.{function}'", message)
    assert not marker.exists()


def test_hostile_pickle_inside_an_archive(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    hostile = pickle.dumps(Hostile(os.system, f"touch {marker}"), protocol=2)
    archive = write_archive(
        tmp_path, "cifar100", "python", python_files("cifar100") | {"meta": hostile}
    )
    refusal(
        "cifar100", tmp_path, archive, "cifar-100-python/meta", f"{os.system.__module__}.system"
    )
    assert not marker.exists()


@pytest.mark.parametrize("name", ["cnumpy\nndarray\n", "c_codecs\nencode\n", "cnumpy\ndtype\n"])
def test_pickle_cannot_change_the_stand_ins(tmp_path: Path, name: str) -> None:
    """BUILD on an allowed name itself, not on an instance, would set attributes that outlive the
    reading.
    """
    forged = b"\x80\x02" + name.encode() + b"N}X\x07\x00\x00\x00__len__K\x01s\x86b."
    path = damage(tmp_path, "cifar10", "python", "data_batch_1", forged)
    refusal("cifar10", tmp_path, path, "is damaged", "fetch it again")
    write(path.parent, python_files("cifar10"))
    assert_cifar(READERS["cifar10"](tmp_path), "cifar10")


@pytest.mark.parametrize(
    "forged",
    [b"})" + b"\x85" * 1000000 + b"K\x01s.", b"}r\xff\xff\xff\xff."],
    ids=["deep-key", "far-reference"],
)
def test_pickle_that_would_crash_python(tmp_path: Path, forged: bytes) -> None:
    path = damage(tmp_path, "cifar10", "python", "data_batch_1", b"\x80\x02" + forged)
    refusal("cifar10", tmp_path, path, "nested or numbered", "fetch it again")


def altered_checksum(raw: bytes) -> bytes:
    return raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:]


@pytest.mark.parametrize(
    "alter",
    [
        lambda raw: b"",
        lambda raw: b"<html>not found</html>",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        altered_checksum,
        gzip.decompress,
        lambda raw: gzip.compress(b"not a tar" * 1000),
        lambda raw: gzip.compress(gzip.decompress(raw)[:40000]),
    ],
    ids=["empty", "html", "half", "one-byte-short", "checksum", "not-gzip", "not-tar", "tar-cut"],
)
def test_damaged_archive(tmp_path: Path, alter: Alter) -> None:
    archive = write_archive(tmp_path, "cifar10", "binary")
    archive.write_bytes(alter(archive.read_bytes()))
    refusal("cifar10", tmp_path, archive, "fetch it again")


def test_archive_member_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "cifar-100-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-100-binary/train.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(member)
    refusal("cifar100", tmp_path, path, "cifar-100-binary/train.bin", "fetch it again")


# ---- MNIST and its successors ----


@pytest.mark.parametrize("data_set", IDX_FOLDERS)
@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx(tmp_path: Path, data_set: str, end: str, dot: str) -> None:
    raw = write(tmp_path / IDX_FOLDERS[data_set] / "raw", idx_files(end, dot))
    for data_dir in (tmp_path, raw.parent, raw):
        arrays = READERS[data_set](data_dir)
        assert_holds(arrays, [idx_parts()["train"]], idx_parts()["t10k"])
        names = {"mnist": tuple("0123456789"), "fashion-mnist": FASHION, "kmnist": KUZUSHIJI}[
            data_set
        ]
        assert arrays.class_names == names
        assert len(names) == 10


def test_each_idx_set_is_read_from_its_own_folder(tmp_path: Path) -> None:
    write(tmp_path / "MNIST" / "raw", idx_files())
    refusal("kmnist", tmp_path, tmp_path, "KMNIST/raw/train-images-idx3-ubyte", kind=MissingData)


@pytest.mark.parametrize("name", sorted(idx_files()))
def test_missing_idx_file_is_named(tmp_path: Path, name: str) -> None:
    raw = write(tmp_path / "MNIST" / "raw", idx_files())
    (raw / name).unlink()
    refusal("mnist", tmp_path, raw / name, "--download", kind=MissingData)


IMAGES = idx(np.zeros((7, 28, 28)))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("train-images-idx3-ubyte", b"", "begin"),
        ("train-images-idx3-ubyte", IMAGES[:9], "begin"),
        ("train-images-idx3-ubyte", b"\1" + IMAGES[1:], "begin"),
        ("train-images-idx3-ubyte", IMAGES[:2] + b"\x0d" + IMAGES[3:], "begin"),
        ("train-images-idx3-ubyte", idx(np.zeros(7)), "begin"),
        ("train-images-idx3-ubyte", IMAGES[:-1], "7 items"),
        ("train-images-idx3-ubyte", IMAGES + b"\0", "7 items"),
        ("train-images-idx3-ubyte", IMAGES[:4] + b"\xff" * 4 + IMAGES[8:], "4294967295 items"),
        ("train-images-idx3-ubyte", idx(np.zeros((7, 32, 32))), "(32, 32)"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(5)), "4 images and 5 labels"),
        ("t10k-labels-idx1-ubyte", idx(np.array([0, 1, 2, 10])), "the label 10"),
    ],
)
def test_damaged_idx(tmp_path: Path, name: str, content: Any, problem: str) -> None:
    raw = write(tmp_path / "MNIST" / "raw", idx_files() | {name: content})
    refusal("mnist", tmp_path, raw / name, problem, "fetch it again")


def test_empty_idx_set(tmp_path: Path) -> None:
    files = {
        "train-images-idx3-ubyte": idx(np.zeros((0, 28, 28))),
        "train-labels-idx1-ubyte": idx(np.zeros(0)),
    }
    raw = write(tmp_path / "MNIST" / "raw", idx_files() | files)
    refusal("mnist", tmp_path, raw, "0 images and 0 labels")


@pytest.mark.parametrize(
    "alter", [gzip.decompress, altered_checksum, lambda raw: raw[:-1], lambda raw: raw[:40]]
)
def test_damaged_gzip(tmp_path: Path, alter: Alter) -> None:
    path = write(tmp_path / "KMNIST" / "raw", idx_files(".gz")) / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(alter(path.read_bytes()))
    refusal("kmnist", tmp_path, path, "fetch it again")


def test_gzip_that_unpacks_to_too_much_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.formats.MOST_BYTES", 4000)
    raw = write(tmp_path / "MNIST" / "raw", idx_files(".gz"))
    refusal("mnist", tmp_path, raw / "train-images-idx3-ubyte.gz", "more than 4000 bytes")


def test_archive_member_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.formats.MOST_BYTES", 4000)
    refusal(
        "cifar10",
        write_archive(tmp_path, "cifar10", "binary").parent,
        "data_batch_1.bin",
        "4000 bytes",
    )


# ---- SVHN and digits ----


@pytest.mark.parametrize("folder", [".", "SVHN", "svhn"])
def test_svhn(tmp_path: Path, folder: str) -> None:
    for name, (images, labels) in svhn_parts().items():
        write_mat(tmp_path / folder / name, images, np.append(labels[:-1], 0))
    train, test = ((images, np.append(labels[:-1], 0)) for images, labels in svhn_parts().values())
    arrays = READERS["svhn"](tmp_path)
    assert_holds(arrays, [train], test)
    assert arrays.class_names == tuple("0123456789")


def test_missing_svhn_file_is_named(tmp_path: Path) -> None:
    write_mat(tmp_path / "train_32x32.mat", *svhn_parts()["train_32x32.mat"])
    refusal("svhn", tmp_path, tmp_path / "test_32x32.mat", kind=MissingData)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "y as"),
        ({"y": np.ones((2, 1), np.uint8)}, "X as"),
        ({"X": np.zeros((2, 3, 32, 32), np.uint8), "y": np.ones((2, 1), np.uint8)}, "X as"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1), np.uint8)}, "uint8"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1), np.uint8)}, "y as"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.full((2, 1), 1.5)}, "integers"),
        (
            {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.full((2, 1), 11, np.uint8)},
            "the label 11",
        ),
    ],
)
def test_mat_of_wrong_content(tmp_path: Path, content: Any, problem: str) -> None:
    from scipy.io import savemat

    for name in svhn_parts():
        savemat(tmp_path / name, content)
    refusal("svhn", tmp_path, tmp_path / "train_32x32.mat", problem, "fetch it again")


@pytest.mark.parametrize("length", [0, 3, 100, 5000, -1])
def test_truncated_mat(tmp_path: Path, length: int) -> None:
    for name, part in svhn_parts().items():
        write_mat(tmp_path / name, *part)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:length])
    refusal("svhn", tmp_path, path, "fetch it again")


def test_digits() -> None:
    from sklearn.datasets import load_digits

    arrays, again = READERS["digits"](Path("nowhere")), READERS["digits"](Path("elsewhere"))
    assert arrays.train_images.shape == (1437, 1, 8, 8)
    assert arrays.test_images.shape == (360, 1, 8, 8)
    assert arrays.class_names == tuple("0123456789")
    np.testing.assert_array_equal(arrays.test_images, again.test_images)
    together = np.concatenate([arrays.train_images, arrays.test_images])
    assert together.dtype == np.uint8
    scaled = np.array([round(value * 255 / 16) for value in range(17)])[
        load_digits().images.astype(int)
    ]
    # each image exactly once
    assert sorted(map(bytes, together)) == sorted(map(bytes, scaled.astype(np.uint8)))
    fifths = np.bincount(load_digits().target) / 5
    assert np.abs(np.bincount(arrays.test_labels) - fifths).max() < 1
    assert arrays.train_labels.dtype == np.int64


# ---- every data set ----


@pytest.mark.parametrize("data_set", sorted(set(READERS) - {"digits"}))
def test_nothing_found(tmp_path: Path, data_set: str) -> None:
    for data_dir in (tmp_path, tmp_path / "absent"):
        refusal(
            data_set,
            data_dir,
            data_dir,
            "pass --data-dir, or --download to fetch them",
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


@pytest.mark.parametrize("method", ["is_file", "read_bytes"])
def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    raw = write(tmp_path / "MNIST" / "raw", idx_files())
    monkeypatch.setattr(Path, method, deny)
    refusal(
        "mnist", tmp_path, raw / "train-images-idx3-ubyte", "Permission denied", "make it readable"
    )


def test_permission_denied_on_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path, "cifar10", "python")
    monkeypatch.setattr(gzip, "open", deny)
    refusal("cifar10", tmp_path, archive, "Permission denied", "make it readable")
