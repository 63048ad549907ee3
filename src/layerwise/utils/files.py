"""Files written whole or not at all, read only if they are files, and locked."""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from layerwise.errors import Busy, InvalidInput
from layerwise.utils.bounded import read_head

DRAFT = ".draft"  # ends the name of a file that is being written
FIGURE_MARK = "Written by layerwise"  # in the metadata of figures
KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of_file(mode: int) -> str:
    """A word for what is in a file's place; empty for a file."""
    return KINDS.get(stat.S_IFMT(mode), "")


def open_file(path: Path) -> BufferedReader:
    """Open a file to read, and nothing that could make the reader wait.

    Raises:
        FileNotFoundError: it is not there.
        InvalidInput: a folder, FIFO, socket or device is in its place, or it may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        kind = kind_of_file(os.fstat(descriptor).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except PermissionError as error:
        raise InvalidInput(
            f"Cannot read {path}: it may not be read ({error.strerror}). Change its permissions."
        ) from None
    except OSError as error:  # a socket, a link in a circle
        raise InvalidInput(
            f"Cannot read {path}: {error.strerror}. Put the file itself in its place."
        ) from None
    if kind:
        os.close(descriptor)
        raise InvalidInput(
            f"Cannot read {path}: it is {kind}, not a file. Put the file itself in its place."
        )
    return os.fdopen(descriptor, "rb")


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        FileNotFoundError, InvalidInput: see ``open_file``.
    """
    with open_file(path) as file:
        return file.read()


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError, InvalidInput: see ``open_file``.
        ValueError: it is no JSON.
    """
    try:
        return json.loads(read_file(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def digest_of(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        FileNotFoundError, InvalidInput: see ``open_file``.
    """
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_what_is_no_file(path: Path) -> None:
    """Refuse to write where a link, folder, FIFO, socket or device is.

    Raises:
        InvalidInput: as said.
    """
    try:
        kind = kind_of_file(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if kind:
        raise InvalidInput(
            f"Cannot write {path}: it is {kind}, not a file. Put the file itself in its place, or "
            "move it away."
        )


def sync_folder(folder: Path) -> None:
    """Let what was made or renamed in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold a file's lock, which ends with the process at the latest.

    Raises:
        Busy: another process holds it.
    """
    with contextlib.ExitStack() as held:
        with refusing_disk_errors(path.parent):
            refuse_what_is_no_file(path)
            if path.exists() and path.stat().st_size:  # the lock would empty it
                raise InvalidInput(
                    f"Cannot lock {path.parent}: {path} holds something that this "
                    "program did not write. Move it away."
                )
            try:
                held.enter_context(FileLock(path, timeout=0))
            except Timeout:
                raise Busy(
                    f"Cannot train {path.parent}: it is being trained by another process. Wait for "
                    "it, or stop it first."
                ) from None
        yield


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that a kill at any moment leaves the old one or the new one, whole.

    A link in the place of the file or of its draft is replaced, never followed.
    """
    draft = path.with_name(path.name + DRAFT)
    with refusing_disk_errors(path):
        draft.unlink(missing_ok=True)  # of a process that was killed
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield draft
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            draft.replace(path)
            sync_folder(path.parent)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def refusing_disk_errors(path: Path) -> Iterator[None]:
    """Say a full disk or a missing permission in one sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInput(
            f"Cannot write {path}: {reason}. What was saved before is untouched. Free space or "
            "change permissions, then start again (what was training: with --resume)."
        ) from error


def refuse_unwritable(option: str, path: Path) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        InvalidInput: it is a folder, or it lies in one that does not exist or takes no files.
    """
    if path.is_dir():
        raise InvalidInput(f"Cannot write {option} {path}: it is a folder. Give a file in it.")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InvalidInput(
            f"Cannot write {option} {path}: it lies in a folder that does not exist. Make it "
            "first, or give another path."
        )
    refuse_closed(option, path, folder)


def refuse_unwritable_folder(option: str, path: Path) -> None:
    """Refuse a folder that could not be made, or that takes no files.

    Raises:
        InvalidInput: as said.
    """
    nearest = next(part for part in (path, *path.absolute().parents) if os.path.lexists(part))
    if not nearest.is_dir():
        raise InvalidInput(f"Cannot write {option} {path}: {nearest} is a file. Give a folder.")
    refuse_closed(option, path, nearest)


def refuse_closed(option: str, path: Path, folder: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell
    except OSError as error:
        raise InvalidInput(
            f"Cannot write {option} {path}: {folder} takes no files ({error.strerror}). Give a "
            "path in another folder."
        ) from None


def refuse_foreign(option: str, path: Path, mark: str, command: str) -> None:
    """Refuse to overwrite a file that this program did not write.

    Args:
        mark: what its first bytes hold if it did. command: that writes such files.

    Raises:
        InvalidInput: as said.
    """
    if not path.exists():
        return
    try:
        head = read_head(path)
    except (OSError, ValueError):
        head = b""
    if mark.encode() not in head:
        raise InvalidInput(
            f"Cannot write {option} {path}: it exists and was not written by layerwise {command}. "
            "Give another path, or move it."
        )


def figure_metadata(kind: str) -> dict[str, str | None]:
    """Metadata of a figure in a file, by which this program knows it again; it is not dated."""
    if kind == "svg":
        return {"Date": None, "Creator": FIGURE_MARK}
    return {"Software": FIGURE_MARK}


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
