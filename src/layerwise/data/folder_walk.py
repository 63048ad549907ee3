"""A walk through a folder of images that counts what it passes over, and why."""

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from layerwise.data.image_file import endings
from layerwise.errors import InvalidInput, MissingData
from layerwise.utils.printable import printable

# what systems and programs leave, besides names that begin with a dot
LEFT_BY_SYSTEMS = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle"),
    *("$recycle.bin", "system volume information", "lost+found", "__pycache__"),
}
EXAMPLES = 3  # names of each kind in a note
HIDDEN = "hidden or left by a system"


class Walk:
    """The folders and images below a root, without what is passed over.

    Links are followed unless they lead to what is read anyway, round in a circle, or nowhere.

    Attributes:
        passed_over: reason -> paths, as they were met.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.read_anyway = [Path(os.path.realpath(root))]
        self.linked: set[Path] = set()  # folders that links have led to
        self.passed_over: dict[str, dict[str, None]] = defaultdict(dict)

    def enter(self, folders: Iterable[Path]) -> None:
        """Read these folders alone from now on."""
        self.read_anyway = [Path(os.path.realpath(folder)) for folder in folders]
        self.linked.clear()

    def pass_over(self, reason: str, path: Path | str) -> None:
        self.passed_over[reason][str(path)] = None

    def notes(self) -> Iterator[str]:
        """A line for each reason: how many, and the first of them."""
        for reason, paths in self.passed_over.items():
            names = [printable(os.path.relpath(path, self.root)) for path in list(paths)[:EXAMPLES]]
            more = ", …" if len(paths) > EXAMPLES else ""
            yield f"{len(paths)} × {reason} ({', '.join(names)}{more})"

    def folders(self, folder: Path, quiet: bool = False) -> list[Path]:
        """The folders in a folder, sorted.

        Args:
            quiet: whether to look only, so that links may be followed again.
        """
        linked = set(self.linked)
        paths = [Path(path) for path, is_folder in self.entries(str(folder)) if is_folder]
        if quiet:
            self.linked = linked
        return paths

    def loose_images(self, folder: Path) -> list[str]:
        """The images directly in a folder."""
        return [path for path, is_folder in self.entries(str(folder), False) if not is_folder]

    def images(self, folder: Path) -> list[str]:
        """The images in a folder and below, sorted by the parts of their paths."""
        images: list[str] = []
        pending = [str(folder)]
        while pending:
            for path, is_folder in self.entries(pending.pop()):
                (pending if is_folder else images).append(path)
        return sorted(images, key=lambda path: path.split(os.sep))

    def entries(self, folder: str, folders: bool = True) -> Iterator[tuple[str, bool]]:
        """Paths of folders and images in a folder, sorted, and whether each is a folder."""
        try:
            with os.scandir(folder) as listing:
                items = sorted(listing, key=lambda item: item.name)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            raise (MissingData if missing else InvalidInput)(
                f"Cannot read the folder {printable(folder)}: {error.strerror or error}. Give a "
                "--data-dir that can be read."
            ) from None
        for item in items:
            is_folder = self.is_folder(item, folders)
            if is_folder is not None:
                yield item.path, is_folder

    def is_folder(self, item: os.DirEntry[str], folders: bool) -> bool | None:
        """Whether an entry is a folder, or an image; None: it is neither, or passed over."""
        try:
            mode = item.stat().st_mode
        except OSError:
            mode = 0
        folder = stat.S_ISDIR(mode)
        if folder and not folders:
            return None
        reason = reason_of(item, mode) or self.reason_of_link(item)
        if reason:
            self.pass_over(reason, item.path)
            return None
        return folder

    def reason_of_link(self, item: os.DirEntry[str]) -> str | None:
        """Why a link is passed over; None: it is no link, or is followed."""
        if not item.is_symlink():
            return None
        target = Path(os.path.realpath(item.path))
        if any(
            target.is_relative_to(base) or base.is_relative_to(target) for base in self.read_anyway
        ) or not self.linked.isdisjoint((target, *target.parents)):
            return "link to what is read anyway"
        if item.is_dir():
            self.linked.add(target)
        return None


def reason_of(item: os.DirEntry[str], mode: int) -> str | None:
    """Why an entry is passed over by its name and kind; None: it is a folder or an image."""
    if item.name.startswith(".") or item.name.casefold() in LEFT_BY_SYSTEMS:
        return HIDDEN
    if not mode:
        return "link that leads nowhere"
    if stat.S_ISDIR(mode):
        return None
    if os.path.splitext(item.name)[1].lower() not in endings():
        return "no image file by its ending"
    return None if stat.S_ISREG(mode) else "no regular file"
