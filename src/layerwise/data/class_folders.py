"""Class folders of images: which folders are parts and classes, and what is passed over.

Parts are recognised in any letter case: train/ or training/; test/ or testing/; val/, valid/ or
validation/. What systems leave among images is passed over, and so is what would be read twice.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from layerwise.data.dataset import Arrays
from layerwise.data.folder_walk import Walk
from layerwise.errors import InvalidInput, MissingData
from layerwise.utils.printable import decodable, printable
from layerwise.utils.words import counted

SET = r"([ _.-]?(data|dataset|images?|set|split))?"
ROLES = {
    "train": re.compile(rf"train(ing)?{SET}"),
    "test": re.compile(rf"test(ing)?{SET}"),
    "val": re.compile(rf"(val|valid|validation){SET}"),
}
MOST_NAMED = 5  # names in a sentence
Classes = Mapping[str, list[str]]  # name of a folder -> paths of its images


class Layout(NamedTuple):
    """The folder of each part; only the first where classes lie side by side."""

    train: Path
    test: Path | None = None


def read_folder(root: Path) -> Arrays:
    """Paths and labels of ``root/train/CLASS/*`` and ``root/test/CLASS/*``.

    Without such folders, ``root/CLASS/*`` is read, for training. A val/ is the test part where no
    test/ is.

    Raises:
        MissingData: there is no such folder, or it holds no class folders with images.
        InvalidInput: it cannot be told which folders are parts and which are classes, or the test
            part has a class that the training part lacks.
    """
    walk = Walk(root)
    layout = find_parts(root, walk)
    walk.enter(path for path in layout if path)
    classes = read_classes(layout.train, walk)
    if len(classes) < 2:
        refuse_classes(layout.train, classes, walk)
    names = sorted(classes)
    arrays = Arrays(*labelled_paths(classes, names), class_names=class_names(root, names))
    if layout.test is not None:
        test = read_classes(layout.test, walk)
        refuse_other_classes(layout, test, names)
        images, labels = labelled_paths(test, names)
        arrays = arrays._replace(test_images=images, test_labels=labels)
    return arrays._replace(notes=tuple(walk.notes()))


def role_of(name: str) -> str | None:
    """The part that a folder's name stands for, in any letter case."""
    return next((role for role, form in ROLES.items() if form.fullmatch(name.casefold())), None)


def sounds_like_a_part(name: str) -> bool:
    words = re.split(r"[^a-z]+", name.casefold())
    return role_of(name) is not None or any(role_of(word) for word in words if word)


def find_parts(root: Path, walk: Walk) -> Layout:
    """The folders of the parts; the root alone where the classes lie in it.

    A folder of that name is a part where it holds folders. Where it holds images, beside folders of
    other names, it is a class: trains are photographed, too.

    Raises:
        InvalidInput: as ``read_folder`` says.
    """
    folders = walk.folders(root)
    parts: dict[str, Path] = {}
    for path in folders:
        role = role_of(path.name)
        if role is None or not walk.folders(path, quiet=True):
            continue
        if role in parts:
            raise InvalidInput(
                f"Cannot use {printable(root)}: it holds both {parts[role].name}/ and "
                f"{path.name}/. Give a --data-dir with one folder for each part."
            )
        parts[role] = path
    if "test" not in parts:
        refuse_images_without_classes(root, folders, walk)
    if not parts:
        refuse_parts_without_classes(root, folders)
        return Layout(root)
    if "train" not in parts:
        held = " and ".join(f"{path.name}/" for path in parts.values())
        raise InvalidInput(
            f"Cannot use {printable(root)}: it holds {held} but no train/ with class folders. Name "
            "the folder to train on train/, or give a --data-dir whose folders are the classes."
        )
    test = parts.get("test", parts.get("val"))
    for path in folders:
        if path == parts.get("val") and "test" in parts:
            # the paper's protocol: validation images are a share of the training images
            walk.pass_over(f"folder beside {parts['test'].name}/", path)
        elif path not in (parts["train"], test):
            walk.pass_over("folder beside the parts", path)
    return Layout(parts["train"], test)


def refuse_images_without_classes(root: Path, folders: list[Path], walk: Walk) -> None:
    """Raise ``InvalidInput`` where a test part has images, but no class folders."""
    for path in folders:
        is_part = role_of(path.name) in ("test", "val")
        if is_part and not walk.folders(path, quiet=True) and walk.loose_images(path):
            raise InvalidInput(
                f"Cannot use {printable(root)}: {path.name}/ holds images in no class folder. Put "
                "them in folders of their classes, or take it away."
            )


def refuse_parts_without_classes(root: Path, folders: list[Path]) -> None:
    """Raise ``InvalidInput`` where every folder is named like a part: they are no classes."""
    if len(folders) > 1 and all(sounds_like_a_part(path.name) for path in folders):
        named = ", ".join(f"{printable(path.name)}/" for path in folders[:MOST_NAMED])
        raise InvalidInput(
            f"Cannot use {printable(root)}: its folders {named} are named like parts, not like "
            "classes. Give a --data-dir with train/ and test/ that hold a folder of images for "
            "each class."
        )


def read_classes(part: Path, walk: Walk) -> dict[str, list[str]]:
    """Images of each class folder; those without any are passed over."""
    classes = {}
    for folder in walk.folders(part):
        if images := walk.images(folder):
            classes[folder.name] = images
        else:
            walk.pass_over("folder without images", folder)
    for path in walk.loose_images(part):
        walk.pass_over("image outside class folders", path)
    return classes


def refuse_classes(part: Path, classes: Classes, walk: Walk) -> None:
    """Raise ``MissingData``: fewer than two classes; the layout one folder deeper is offered."""
    deeper = ""
    folders = walk.folders(part, quiet=True)
    if len(folders) == 1 and len(walk.folders(folders[0], quiet=True)) > 1:
        deeper = f" Did you mean {printable(folders[0])}?"
    notes = "".join(f" Passed over: {note}." for note in walk.notes())
    raise MissingData(
        f"Cannot use {printable(part)}: it holds {counted(len(classes), 'class folder')} with "
        f"images.{deeper} Give a --data-dir with two or more, such as cats/ and dogs/, or train/ "
        f"and test/ that hold them.{notes}"
    )


def refuse_other_classes(layout: Layout, test: Classes, names: list[str]) -> None:
    """Raise ``InvalidInput`` unless the test part has images, all of classes that are trained."""
    assert layout.test is not None
    unknown = sorted(set(test) - set(names))
    if test and not unknown:
        return
    problem = "it holds no class folders with images"
    if unknown:
        problem = f"its class {printable(unknown[0])} is not in {layout.train.name}/"
    listed = ", ".join(map(printable, names[:MOST_NAMED])) + " …" * (len(names) > MOST_NAMED)
    raise MissingData(
        f"Cannot use {printable(layout.test)}: {problem}. Give it the folders of "
        f"{layout.train.name}/ ({listed}), or take it away: a share of the training images is then "
        "held out for the test."
    )


def class_names(root: Path, folders: list[str]) -> tuple[str, ...]:
    """Names of the classes as text; a folder's may be no UTF-8.

    Raises:
        InvalidInput: two would have the same.
    """
    names = tuple(map(decodable, folders))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(
            f"Cannot use {printable(root)}: two class folders read as {printable(twice)}. Rename "
            "one."
        )
    return names


def labelled_paths(classes: Classes, names: list[str]) -> tuple[list[str], np.ndarray]:
    """Paths of all images, class by class, and their labels."""
    paths = [path for name in names for path in classes.get(name, ())]
    counts = [len(classes.get(name, ())) for name in names]
    return paths, np.repeat(np.arange(len(names), dtype=np.int64), counts)
