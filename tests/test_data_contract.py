"""Every entry of the table of data sets, and one added from outside, keeps what the table says."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from layerwise.cli import main
from layerwise.data import DATASETS, Arrays, DataSet, ImageFormat
from layerwise.errors import InvalidInput
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare
from tests.test_formats import idx

CPU = torch.device("cpu")
SMALL = (20, 10)  # training and test images of the miniatures


def draw(dataset: DataSet) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random images and labels of a data set's format; every class is there."""
    rng, images = np.random.default_rng(0), dataset.expected()
    shape = images.channels, images.image_size, images.image_size
    parts = []
    for count in SMALL:
        labels = np.arange(count * images.num_classes // 10) % images.num_classes
        parts.append((rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8), labels))
    return parts


def write_idx(folder: Path, dataset: DataSet) -> None:
    names = [Path(file.path.removesuffix(".gz")) for file in dataset.files]
    arrays = [array for images, labels in draw(dataset) for array in (images[:, 0], labels)]
    for name, array in zip(names, arrays, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(idx(array))


def write_cifar(folder: Path, dataset: DataSet) -> None:
    form, parts = dataset.read.keywords["forms"][0], draw(dataset)
    label_bytes = form.decode.keywords["label_bytes"]
    for names, (images, labels) in zip((form.train, form.test), parts, strict=True):
        records = [
            bytes([label] * label_bytes) + image.tobytes()
            for image, label in zip(images, labels, strict=True)
        ]
        for number, name in enumerate(names):
            (folder / form.folder).mkdir(exist_ok=True)
            (folder / form.folder / name).write_bytes(b"".join(records[number :: len(names)]))


def write_images(folder: Path, dataset: DataSet) -> None:
    for part, (images, labels) in zip(("train", "test"), draw(dataset), strict=True):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{number}.png")


WRITERS: dict[str, Callable[[Path, DataSet], None]] = {
    "digits": lambda folder, dataset: None,  # at hand
    "cifar10": write_cifar,
    "cifar100": write_cifar,
    "mnist": write_idx,
    "fashion-mnist": write_idx,
    "kmnist": write_idx,
    "folder": write_images,
}  # of SVHN only the published files are read


def read_mine(folder: Path) -> Arrays:
    images = np.load(folder / "images.npy")
    return Arrays(images, np.arange(len(images)) % 3)


def write_mine(folder: Path, dataset: DataSet) -> None:
    np.save(
        folder / "images.npy", np.random.default_rng(1).integers(0, 256, (90, 3, 12, 12), np.uint8)
    )


@pytest.fixture(params=[*WRITERS, "mine"])
def entry(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Path]:
    """A data set's name and a folder that holds it."""
    name = request.param
    if name == "mine":
        monkeypatch.setitem(DATASETS, name, DataSet(read_mine, ImageFormat(("a", "b", "c"), 3, 12)))
    dataset = DATASETS[name]
    {**WRITERS, "mine": write_mine}[name](tmp_path, dataset)
    if name != "digits":
        monkeypatch.setitem(
            DATASETS, name, replace(dataset, images=None)
        )  # fewer than are published
    return name, tmp_path


def test_every_entry_is_tried() -> None:
    assert {*WRITERS, "svhn"} == DATASETS.keys()


@pytest.mark.parametrize("name", DATASETS)
def test_an_entry_is_whole(name: str) -> None:
    dataset = DATASETS[name]
    names, images = dataset.format.class_names, dataset.expected()
    assert len(set(names)) == len(names) == {"folder": 0, "cifar100": 100}.get(name, 10)
    assert images.channels in (1, 3)
    assert 0 < dataset.padding_at(images.image_size) < images.image_size
    assert dataset.expected(16).image_size == 16
    assert dataset.files or name in ("digits", "folder")


def test_images_and_labels_are_as_the_entry_says(entry: tuple[str, Path]) -> None:
    name, folder = entry
    dataset = DATASETS[name]
    first, second = (
        prepare(
            Run(data=name, batch_size=8, val_fraction=0.5), Execution(data_dir=str(folder))
        ).load_data()
        for _ in range(2)
    )
    assert first.channels == dataset.format.channels
    assert first.image_size == dataset.format.image_size
    if dataset.format.class_names:
        assert first.class_names == dataset.format.class_names
    assert len(set(first.class_names)) == first.num_classes >= 2
    for part in ("train", "validation", "test"):
        loader, again = getattr(first, part), getattr(second, part)
        pixels = next(loader.pixels.stream([torch.arange(len(loader.labels))]))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (
            len(loader.labels),
            first.channels,
            first.image_size,
            first.image_size,
        )
        assert 0 <= loader.labels.min() <= loader.labels.max() < first.num_classes
        assert loader.labels.dtype == torch.int64
        for (images, labels), (images_again, labels_again) in zip(
            loader.batches(1), again.batches(1), strict=True
        ):
            assert torch.equal(images, images_again)
            assert torch.equal(labels, labels_again)


def test_a_data_set_from_outside_is_listed_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = DataSet(read_mine, ImageFormat(("a", "b", "c"), 3, 12))
    monkeypatch.setitem(DATASETS, "mine", dataset)
    write_mine(tmp_path, dataset)
    main(["list", "datasets"])
    assert "mine" in capsys.readouterr().out
    arguments = [
        "--data",
        "mine",
        "--data-dir",
        str(tmp_path),
        "--width",
        "0.0625",
        "--epochs",
        "1",
        "--batch-size",
        "16",
    ]
    output = tmp_path / "run"
    main(["train", "vgg8b", *arguments, "--device", "cpu", "--output", str(output)])
    facts = json.loads((output / "run.json").read_text())["data"]
    assert facts["class_names"] == ["a", "b", "c"]
    assert facts["images"] == [66, 6, 18]  # of training, validation and test


LABELS = np.arange(6) % 3
GOOD = np.zeros((6, 3, 12, 12), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (Arrays(GOOD.astype(np.float32), LABELS), "float32 of shape"),
        (Arrays(GOOD[:, :1], LABELS), r"not uint8 of shape \(3, 12, 12\)"),
        (Arrays(GOOD[:, :, :8], LABELS), r"not uint8 of shape \(3, 12, 12\)"),
        (Arrays(GOOD, LABELS[:5]), r"6 images and labels of shape \(5,\)"),
        (Arrays(GOOD[:0], LABELS[:0]), "0 images"),
        (Arrays(GOOD, LABELS + 1), "the label 3, not an integer from 0 to 2"),
        (Arrays(GOOD, LABELS - 1), "the label -1"),
        (Arrays(GOOD, LABELS + 0.5), "the label 0.5"),
        (Arrays(GOOD, LABELS, GOOD, LABELS + 1), "the label 3"),
    ],
)
def test_what_a_reader_gives_is_checked(arrays: Any, words: str, tmp_path: Path) -> None:
    dataset = DataSet(lambda folder: arrays, ImageFormat(("a", "b", "c"), 3, 12))
    with pytest.raises(InvalidInput, match=words) as caught:
        dataset.arrays(tmp_path)
    assert str(tmp_path) in str(caught.value)
