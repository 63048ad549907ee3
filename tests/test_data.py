"""Data on the device: splits, augmentation by the batch, folders of images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from layerwise.data import Splits, hold_out, image_folder, resize
from layerwise.data.loader import (
    Augmentation,
    Draws,
    ImageSet,
    Loader,
    PixelsInMemory,
    crop_and_flip,
    cut_out,
)
from layerwise.errors import InvalidInput, MissingData
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare
from tests.helpers import digits

CPU = torch.device("cpu")


def load(run: Run, **execution: Any) -> Splits:
    return prepare(run, Execution(**execution)).load_data()


def make_loader(count: int = 20, batch_size: int = 6, **options: object) -> Loader:
    pixels = torch.randint(
        0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Loader(
        PixelsInMemory(pixels), torch.arange(count), [0] * 3, [1] * 3, 8, batch_size, **options
    )


def test_crops_and_flips_are_those_of_each_image_alone() -> None:
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    draws = Augmentation(padding=2, flip=True).draw(5, 8, seed=1)
    result = crop_and_flip(pixels, draws)
    for number in range(5):
        padded = torch.zeros(3, 12, 12, dtype=torch.uint8)
        padded[:, 2:10, 2:10] = pixels[number]
        top, left = (draws.offsets[number] + 2).tolist()
        expected = padded[:, top : top + 8, left : left + 8]
        assert torch.equal(result[number], expected.flip(2) if draws.flips[number] else expected)
    # not one draw for the whole batch
    assert len({tuple(offset) for offset in draws.offsets.tolist()}) > 1


def test_cutout_blanks_a_square_of_each_image() -> None:
    centres = torch.tensor([[4, 4], [0, 7]])
    images = cut_out(torch.ones(2, 3, 8, 8), Draws(centres, centres[:, 0] > 9, centres), side=4)
    assert torch.equal(images[0, 0, 2:6, 2:6], torch.zeros(4, 4))
    # the second reaches over the border
    assert (images == 0).sum((1, 2, 3)).tolist() == [3 * 16, 3 * 2 * 3]


def test_an_epoch_is_every_image_once_and_can_be_entered_anywhere() -> None:
    loader = make_loader(augmentation=Augmentation(1, True, 2), seed=4)
    whole = list(loader.batches(3))
    assert sorted(torch.cat([labels for _, labels in whole]).tolist()) == list(range(20))
    late = list(loader.batches(3, start=2))
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(whole[2:], late, strict=True)
    )
    assert [labels.tolist() for _, labels in loader.batches(4)] != [
        labels.tolist() for _, labels in whole
    ]


def test_an_image_looks_the_same_in_whichever_batch_it_comes() -> None:
    loader = make_loader(augmentation=Augmentation(2, True))
    indices = torch.tensor([7, 3, 11])
    together, alone = loader.images(indices, 5), loader.images(indices[1:2], 5)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(loader.images(indices, 6), together)


def test_views_repeat_in_turn() -> None:
    loader = make_loader(augmentation=Augmentation(2, True), views=2)
    indices = torch.arange(8)
    assert torch.equal(loader.images(indices, 0), loader.images(indices, 2))
    assert not torch.equal(loader.images(indices, 0), loader.images(indices, 1))


def test_a_last_batch_of_one_is_left_out() -> None:
    assert [len(labels) for _, labels in make_loader(13, 6).batches(0)] == [6, 6]
    assert len(make_loader(13, 6)) == 2


def test_images_are_normalised_by_the_training_set() -> None:
    splits = digits(train_images=1000)
    images = torch.cat([images for images, _ in splits.train.in_order()])
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_held_out_images_are_stratified_seeded_and_disjoint() -> None:
    run = Run(data="digits", val_fraction=0.25)
    splits = load(run)
    assert splits.validation is not None
    share = torch.bincount(splits.validation.labels) / (
        torch.bincount(splits.train.labels) + torch.bincount(splits.validation.labels)
    )
    assert share.tolist() == pytest.approx([0.25] * 10, abs=0.01)
    again, other = load(run), load(Run(data="digits", val_fraction=0.25, seed=1))

    def held(splits: object) -> Tensor:
        return splits.validation.pixels.images

    assert torch.equal(held(splits), held(again))
    assert not torch.equal(held(splits), held(other))
    train = {image.numpy().tobytes() for image in splits.train.pixels.images}
    assert not train & {image.numpy().tobytes() for image in held(splits)}
    assert load(Run(data="digits", val_fraction=0.0)).validation is None


def test_a_limited_training_set_has_all_classes() -> None:
    splits = load(Run(data="digits", train_images=53))
    counts = torch.bincount(splits.train.labels)
    assert int(counts.sum()) == 53
    assert counts.min() >= 4


def test_resizing_averages_down_and_interpolates_up() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    assert resize(images, 4)[0, 0, 0, 0] == round((0 + 1 + 8 + 9) / 4)
    assert resize(images, 16).shape == (1, 1, 16, 16)
    assert torch.equal(resize(images, 8), images)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (Run(data="cifar11"), "Did you mean 'cifar10'"),
        (Run(val_fraction=1.0), "Cannot use val_fraction 1.0: it is out of range. Give 0 up to"),
        (Run(batch_size=1), "Cannot use batch_size 1: it is out of range. Give 2 or more"),
        (
            Run(train_images=3),
            "Cannot use train_images 3: 1295 images are left of 10 classes. Give 10",
        ),
        (
            Run(crop_padding=-1),
            "Cannot use crop_padding -1 with images of 8 pixels: it is out of range. Give 0 to 8",
        ),
        (
            Run(cutout=100),
            "Cannot use cutout 100 with images of 8 pixels: it is out of range. Give 0 to 16",
        ),
        (Run(views=0), "Cannot use views 0: it is out of range. Give 1 or more"),
        (Run(image_size=0), "Cannot use image_size 0: it is out of range. Give 1 pixel or more"),
    ],
)
def test_refusals(run: Run, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        load(run)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="--download"):
        load(Run(data="cifar10"), data_dir=str(tmp_path))


def test_a_known_data_set_of_another_size_is_cut_short(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.bin").write_bytes(bytes(3074) * 5)
    (folder / "fine_label_names.txt").write_text(
        "\n".join(f"class{number}" for number in range(100))
    )
    with pytest.raises(
        InvalidInput, match="has 5 training and 5 test images instead of 50000 and 10000"
    ):
        load(Run(data="cifar100"), data_dir=str(tmp_path))


def fill(root: Path, count: int = 10) -> None:
    """Two classes, dark and bright, as images of odd sizes and kinds."""
    for label, level in (("bright", 220), ("dark", 30)):
        (root / label).mkdir(parents=True)
        for number in range(count):
            mode, suffix = (("RGB", "png"), ("L", "jpg"), ("RGBA", "webp"))[number % 3]
            Image.new(mode, (40 + number, 30), level if mode == "L" else (level,) * len(mode)).save(
                root / label / f"{number}.{suffix}"
            )


def test_a_folder_of_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    run = Run(data="folder", image_size=16, val_fraction=0.25, batch_size=4)
    splits = load(run, data_dir=str(tmp_path))
    assert splits.class_names == ("bright", "dark")
    assert (len(splits.train.labels), len(splits.validation.labels), len(splits.test.labels)) == (
        12,
        4,
        4,
    )
    monkeypatch.setattr(image_folder, "MEMORY_SHARE", 0.0)  # nothing fits: read by workers
    streamed = load(run, data_dir=str(tmp_path), workers=1)
    assert isinstance(streamed.train.pixels, image_folder.PixelsInFiles)
    for one, other in zip(splits.train.batches(1), streamed.train.batches(1), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert ((one[0].mean((1, 2, 3)) > 0) == (one[1] == 0)).all()


def test_a_folder_with_parts_keeps_them(tmp_path: Path) -> None:
    fill(tmp_path / "train", 6)
    fill(tmp_path / "val", 3)
    splits = load(Run(data="folder", image_size=8, val_fraction=0.0), data_dir=str(tmp_path))
    assert (len(splits.train.labels), len(splits.test.labels)) == (12, 6)


def test_a_folder_with_train_alone_gives_up_a_fifth_for_the_test(tmp_path: Path) -> None:
    fill(tmp_path / "train", 10)
    splits = load(Run(data="folder", image_size=8, val_fraction=0.0), data_dir=str(tmp_path))
    assert splits.class_names == ("bright", "dark")
    assert (len(splits.train.labels), len(splits.test.labels)) == (16, 4)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    (tmp_path / "dark" / "0.png").write_bytes((tmp_path / "dark" / "0.png").read_bytes()[:40])
    with pytest.raises(InvalidInput, match=r"Cannot read .*dark/0\.png as an image: "):
        load(Run(data="folder", image_size=8), data_dir=str(tmp_path))


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "only" / "a.png")
    with pytest.raises(MissingData, match="holds 1 class folder with"):
        load(Run(data="folder"), data_dir=str(tmp_path))


@pytest.mark.parametrize("limit", [3, 20, 45, 80])
def test_every_class_keeps_an_image(limit: int) -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 2)
    images = ImageSet(PixelsInMemory(torch.zeros(92, 1, 2, 2, dtype=torch.uint8)), labels)
    train, _ = hold_out(images, 0.1, limit, 3, seed=0)
    counts = torch.bincount(train.labels, minlength=3).tolist()
    assert sum(counts) == limit
    assert min(counts) >= 1
    most, held = hold_out(images.pick(torch.arange(59, 92)), 0.9, None, 3, seed=0)
    assert torch.bincount(most.labels, minlength=3).tolist() == [1, 3, 1]
    assert len(held.labels) == 33 - 5


def test_holding_out_nothing_keeps_everything() -> None:
    images = ImageSet(
        PixelsInMemory(torch.zeros(10, 1, 2, 2, dtype=torch.uint8)),
        torch.from_numpy(np.arange(10) % 2),
    )
    train, held = hold_out(images, 0.0, None, 2, seed=0)
    assert (len(train.labels), len(held.labels)) == (10, 0)
