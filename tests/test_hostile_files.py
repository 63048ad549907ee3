"""Every reader of files of others, with files that are damaged, forged or made to grow.

Where a reader wants a published digest it is given that of the hostile file, so that its own bounds
are seen. More examples: ``pytest --hypothesis-profile faults tests/test_hostile_files.py``.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from layerwise.data import RemoteFile
from layerwise.data.image_file import read_image
from layerwise.data.published import FILES
from layerwise.data.readers import (
    CIFAR10,
    CIFAR100,
    pickled_part,
    read_cifar,
    read_idx,
)
from layerwise.errors import InvalidInput
from layerwise.runs.headings import HEADINGS
from layerwise.utils.csv_text import csv_text
from layerwise.utils.terminal import visible
from tests.hostile import TEXTS, within_bounds

HOSTILE_SIZES = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1])


@contextlib.contextmanager
def refused_or_read() -> Iterator[None]:
    """Nothing but a refusal is raised, within bounds."""
    with within_bounds(), contextlib.suppress(InvalidInput):
        yield


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A content cut, grown, or with some of its bytes changed."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(len(changed) - 1, 300))))
        piece = draw(
            st.binary(max_size=8) | HOSTILE_SIZES.map(lambda size: struct.pack("<I", size))
        )
        changed[place : place + len(piece)] = piece
    return bytes(changed[: draw(st.integers(0, len(changed)))] if draw(st.booleans()) else changed)


def as_published(files: tuple[RemoteFile, ...], folder: Path) -> tuple[RemoteFile, ...]:
    """Files with the digests of those that lie in a folder."""
    return tuple(
        replace(file, sha256=hashlib.sha256((folder / file.name).read_bytes()).hexdigest())
        for file in files
    )


IDX = struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 28, 28) + bytes(2 * 28 * 28)


@given(content=damaged(IDX) | st.binary(max_size=100), packed=st.booleans())
def test_idx(content: bytes, packed: bool, folder: Path) -> None:
    end = ".gz" if packed else ""
    for file in FILES["mnist"]:
        written = gzip.compress(content) if packed else content
        (folder / (file.name.removesuffix(".gz") + end)).write_bytes(written)
    files = as_published(FILES["mnist"], folder) if packed else FILES["mnist"]
    with refused_or_read():
        read_idx(folder, "MNIST", files)
    for path in folder.iterdir():
        path.unlink()


@given(
    content=st.binary(max_size=50) | st.integers(1, 3).map(lambda n: bytes(3073 * n)),
    size=st.integers(0, 2),
)
def test_cifar_binary(content: bytes, size: int, folder: Path) -> None:
    for form in (CIFAR10[0], CIFAR100[0]):
        for name in (*form.train, *form.test):
            (folder / name).write_bytes(content + bytes(size))
        with refused_or_read():
            read_cifar(folder, [form])
        for path in folder.iterdir():
            path.unlink()


PICKLE = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}, 2)
OPCODES = st.lists(
    st.sampled_from(
        [
            *b"()]}.02NRabcdeghijlopqrstu\x80\x81\x85\x87\x8a\x8b\x8d\x8e\x92\x93\x94\x95\x96",
            10,
            255,
        ]
    ),
    max_size=60,
).map(bytes)


@given(content=damaged(PICKLE) | OPCODES | st.binary(max_size=60))
def test_pickles_are_opened_only_with_the_published_digest(content: bytes, folder: Path) -> None:
    names = (*CIFAR10[1].train, *CIFAR10[1].test)
    for name in names:
        (folder / name).write_bytes(content)
    with within_bounds(), pytest.raises(InvalidInput, match="MD5 is not that of the published"):
        read_cifar(folder, [CIFAR10[1]])
    for name in names:
        (folder / name).unlink()


@given(content=damaged(PICKLE))
def test_pickles_that_are_damaged(content: bytes) -> None:
    with refused_or_read():
        pickled_part(content, Path("data_batch_1"), "labels")


class Planted:
    """An object that runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    raw = pickle.dumps({"data": Planted(tmp_path / "ran"), "labels": []})
    with pytest.raises(InvalidInput, match="which was not executed"):
        pickled_part(raw, Path("data_batch_1"), "labels")
    assert not (tmp_path / "ran").exists()


def test_archives_are_opened_only_with_the_published_digest(tmp_path: Path) -> None:
    """As one that unpacks to 10 GB from 10 MB, or that names files elsewhere, is not."""
    form = CIFAR10[1]
    with tarfile.open(tmp_path / form.archive, "w:gz") as archive:
        entry = tarfile.TarInfo(f"{form.folder}/../../../elsewhere")
        entry.size = 10**6
        archive.addfile(entry, io.BytesIO(bytes(10**6)))
    with pytest.raises(InvalidInput, match="SHA256 is not that of the published file"):
        read_cifar(tmp_path, [form])
    assert [path.name for path in tmp_path.iterdir()] == [form.archive]


CELLS = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(TEXTS)
)


@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=4))
def test_tables_come_back_and_hold_no_formula(rows: list[tuple[Any, Any]]) -> None:
    text = csv_text(("first", "second"), ({"first": a, "second": b} for a, b in rows))
    lines = list(csv.reader(io.StringIO(text, newline="")))
    assert len(lines) == len(rows) + 1
    for cells, values in zip(lines[1:], rows, strict=True):
        for cell, value in zip(cells, values, strict=True):
            text = "" if value is None else visible(str(value))
            assert cell in (text, f"'{text}")
            assert not cell.startswith(tuple("=@\t\n"))
            assert not cell.startswith(("+", "-")) or is_number(cell)


def is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def test_headings_of_tables_hold_no_formula() -> None:
    assert csv_text(["=1+1", *HEADINGS], []).startswith("'=1+1,")


@given(
    content=st.binary(max_size=100),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]),
)
def test_images_that_are_damaged(content: bytes, kind: str, folder: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, kind)
    raw = bytearray(file.getvalue())
    place = len(content) % len(raw)
    raw[place : place + len(content)] = content
    path = folder / f"image.{kind.lower()}"
    path.write_bytes(raw)
    with refused_or_read():
        read_image(path, 8, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")
