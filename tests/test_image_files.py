"""Image files and folders as users have them: turned, deep, transparent, large, linked, few."""

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from layerwise.data import DATASETS, Arrays, DataSet, ImageFormat, load_folder
from layerwise.data.image_file import BACKGROUND, read_image
from layerwise.data.image_folder import PixelsInFiles
from layerwise.errors import InvalidInput
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare

RAMP = np.tile(np.linspace(0, 1, 33), (21, 1))


def save(path: Path, pixels: np.ndarray | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((9, 11, 3), 90, np.uint8) if pixels is None else pixels
    Image.fromarray(pixels).save(path, **options)
    return path


def classes(root: Path, count: int = 4, names: tuple[str, ...] = ("ant", "bee")) -> Path:
    for name in names:
        for number in range(count):
            save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("a.tiff", (RAMP * 65535).astype(">u2")),
        ("a.pgm", (RAMP * 65535).astype(np.uint16)),
        ("a.tif", (RAMP * 255).astype(np.int32)),
        ("b.tif", (RAMP * 255).astype(np.float32)),
    ],
)
def test_deep_values_are_those_of_8_bits(tmp_path: Path, name: str, pixels: np.ndarray) -> None:
    plain = read_image(save(tmp_path / "plain.png", (RAMP * 255).astype(np.uint8)), 16)
    deep = read_image(save(tmp_path / name, pixels), 16)
    assert np.abs(deep.astype(int) - plain).max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 255).astype(np.uint8),  # Pillow turns these round, writing and reading
        ((1 - RAMP) * 65535).astype(np.uint16),
    ],
)
def test_white_may_be_zero(tmp_path: Path, values: np.ndarray) -> None:
    path = save(tmp_path / "a.tif", values, tiffinfo={262: 0})
    plain = read_image(save(tmp_path / "plain.png", (RAMP * 255).astype(np.uint8)), 16)
    stored = read_image(path, 16).astype(int)
    with Image.open(path) as picture:
        assert picture.tag_v2[262] == 0
    assert np.abs(stored - plain).max() <= 1


def test_a_stated_white_is_used(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", (RAMP * 1023).astype(np.uint16), tiffinfo={281: 1023})
    assert read_image(path, 16).max() > 180


@pytest.mark.parametrize(
    "pixels",
    [
        (RAMP * 1023).astype(np.uint16),
        (RAMP * 70000).astype(np.int32),
        (RAMP - 0.5).astype(np.float32),
        np.full((8, 8), np.nan, np.float32),
    ],
)
def test_values_of_unknown_range_are_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match=r"Cannot read .*a\.tif: .*Save it as"):
        read_image(save(tmp_path / "a.tif", pixels), 16)


@pytest.mark.parametrize("orientation", [4, 5, 7])
def test_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    shown = {4: pixels[::-1], 5: pixels.swapaxes(0, 1), 7: pixels[::-1, ::-1].swapaxes(0, 1)}
    turned = read_image(save(tmp_path / "a.png", pixels, exif=exif), 16)
    assert np.array_equal(turned, shown[orientation].transpose(2, 0, 1))


@pytest.mark.parametrize("level", [0, 255])
def test_a_drawing_in_the_transparency_is_seen(tmp_path: Path, level: int) -> None:
    drawing = np.full((12, 12, 4), level, np.uint8)
    drawing[..., 3] = 255
    drawing[:, :6, 3] = 0
    for image in (Image.fromarray(drawing), Image.fromarray(drawing).convert("LA")):
        image.save(tmp_path / "a.png")
        seen = read_image(tmp_path / "a.png", 12)
        assert seen[0, 0, 0] == BACKGROUND[0]
        assert seen[0, 0, -1] == level
    palette = Image.fromarray(drawing[..., 0]).convert("P")
    palette.save(tmp_path / "b.gif", transparency=palette.getpixel((0, 0)))
    assert read_image(tmp_path / "b.gif", 12)[0, 0, 0] == BACKGROUND[0]


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(InvalidInput, match="more than 89478485 pixels"):
        read_image(path, 8)


def test_a_long_strip_is_read_in_little_memory(tmp_path: Path) -> None:
    strip = np.zeros((1, 200_000), np.uint8)
    strip[:, 99_000:101_000] = 200
    assert (read_image(save(tmp_path / "strip.png", strip), 64) == 200).all()


def test_pipes_and_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(InvalidInput, match="Give the path of an image file"):
            read_image(tmp_path / name, 8)


@pytest.mark.parametrize(
    ("train", "test"), [("TRAIN", "Testing"), ("Training_set", "test data"), ("train", "VALID")]
)
def test_parts_by_other_names(tmp_path: Path, train: str, test: str) -> None:
    classes(tmp_path / train)
    classes(tmp_path / test, 2)
    images = load_folder(tmp_path, 8)
    assert images.class_names == ("ant", "bee")
    assert images.test is not None
    assert (len(images.train.labels), len(images.test.labels)) == (8, 4)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert load_folder(classes(tmp_path, names=("bus", "train")), 8).class_names == ("bus", "train")


def test_layouts_that_could_be_misread_are_refused(tmp_path: Path) -> None:
    classes(tmp_path / "flat", names=("train", "val"))
    classes(tmp_path / "prefixed", names=("seg_train", "seg_test"))
    classes(tmp_path / "two" / "train")
    classes(tmp_path / "two" / "Train")
    classes(tmp_path / "alone" / "test")
    classes(tmp_path / "other" / "train")
    classes(tmp_path / "other" / "test", names=("ant", "Bee"))
    for name in ("flat", "prefixed", "two", "alone", "other"):
        with pytest.raises(InvalidInput, match=rf"^Cannot use .*{name}"):
            load_folder(tmp_path / name, 8)
    with pytest.raises(InvalidInput, match=r"Did you mean .*deep/x"):
        load_folder(classes(tmp_path / "deep" / "x").parent, 8)


def test_what_is_found_and_passed_over_is_said(tmp_path: Path) -> None:
    classes(tmp_path, 5)
    save(tmp_path / "bee" / "5.jfif", format="JPEG")
    save(tmp_path / "ant" / ".Trash" / "0.png")
    save(tmp_path / "loose.png")
    (tmp_path / "ant" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "ant" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "ant" / "round").symlink_to(tmp_path)
    (tmp_path / "ant" / "nowhere.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    save(tmp_path / "x.png").rename(tmp_path / "caf\udce9" / "\udcff.png")
    lines: list[str] = []
    execution = Execution(data_dir=str(tmp_path))
    data = prepare(Run(data="folder", image_size=8, batch_size=2), execution).load_data(
        lines.append
    )
    assert data.class_names == ("ant", "bee", "caf\\xe9")
    text = "\n".join(lines)
    assert f"folder in {tmp_path}: 3 classes; 12 images (ant 5, bee 6, caf\\xe9 1)" in text
    assert "sizes: 11 × 9 pixels" in text
    for note in (
        "2 × hidden or left by a system",
        "1 × no image file by its ending (ant/notes.txt)",
        "1 × folder without images (empty)",
        "1 × image outside class folders (loose.png)",
        "1 × link to what is read anyway (ant/round)",
        "1 × link that leads nowhere (ant/nowhere.png)",
        "1 × no regular file (ant/pipe.png)",
    ):
        assert f"passed over: {note}" in text
    assert text.encode()  # no surrogates are left


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    store = classes(tmp_path / "store")
    (tmp_path / "set").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).symlink_to(store / name)
    assert len(load_folder(tmp_path / "set", 8).train.labels) == 8


@pytest.mark.parametrize("count", [1, 2])
def test_no_test_image_is_refused_with_the_folder_as_given(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes(tmp_path / "few", count)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match="Cannot use data folder in few: no image is left"):
        prepare(Run(data="folder"), Execution(data_dir="few")).load_data()


def test_a_part_of_one_image_is_one_batch(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    save(tmp_path / "test" / "bee" / "0.png")
    run = Run(data="folder", image_size=8, batch_size=2)
    data = prepare(run, Execution(data_dir=str(tmp_path))).load_data()
    assert [labels.tolist() for _, labels in data.test.batches(0)] == [[1]]
    assert len(data.test) == 1


def test_arrays_with_negative_strides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), np.uint8)
    labels = np.arange(20)[::-1] % 2
    arrays = Arrays(np.rot90(images, axes=(2, 3)), labels, images[::-1], labels[::-1])
    form = ImageFormat(("a", "b"), 3, 8)
    monkeypatch.setitem(DATASETS, "turned", DataSet(lambda folder: arrays, form))
    data = prepare(Run(data="turned", val_fraction=0.0, batch_size=4), Execution()).load_data()
    expected = torch.tensor(np.rot90(images, axes=(2, 3)).copy())
    assert torch.equal(data.train.pixels.images, expected)
    assert data.test.labels.tolist() == (np.arange(20) % 2).tolist()


def test_a_worker_refuses_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.data.image_folder.MEMORY_SHARE", 0.0)
    images = load_folder(classes(tmp_path), 8, workers=1).train
    (tmp_path / "ant" / "1.png").write_bytes(b"no image")
    with pytest.raises(
        InvalidInput, match=r"^Cannot read .*ant/1\.png as an image: no image format"
    ):
        list(images.pixels.stream(list(torch.arange(8).split(4))))


def test_files_are_known_by_names_and_sizes(tmp_path: Path) -> None:
    """Wherever the folder is, and whatever its images are scaled to."""
    root = classes(tmp_path / "one")
    noise = np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)
    save(root / "ant" / "0.png", noise)

    def digest(folder: Path, size: int = 8) -> object:
        run = Run("resnet18", data="folder", image_size=size, val_fraction=0.0)
        execution = Execution(data_dir=str(folder), device="cpu", workers=0)
        return prepare(run, execution).load_data().facts()["digest"]

    first = digest(root)
    assert digest(root, 16) == first
    root = root.rename(tmp_path / "two")
    assert digest(root) == first
    (root / "ant" / "0.png").rename(root / "kept.png")
    (root / "bee" / "0.png").rename(root / "ant" / "0.png")
    (root / "kept.png").rename(root / "bee" / "0.png")
    assert digest(root) != first


def test_more_workers_than_processors_are_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    paths = [str(path) for path in sorted(classes(tmp_path).rglob("*.png"))]
    pixels = PixelsInFiles(paths, 8, 3, workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len([*pixels.stream(list(torch.arange(4).split(2)))]) == 2


def test_a_share_of_few_images_that_holds_none_out_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    run = Run("resnet18", data="folder", image_size=8, val_fraction=0.1)
    execution = Execution(data_dir=str(classes(tmp_path, 5)), device="cpu", workers=0)
    assert prepare(run, execution).load_data(said.append).validation is None
    assert "no image is held out for validation" in said[-1]
