"""Files written whole or not at all, and locked."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from layerwise.errors import Busy, InvalidInput
from layerwise.utils.bounded import read_head

DRAFT = ".draft"  # ends the name of a file that is being written
FIGURE_MARK = "Written by layerwise"  # in the metadata of figures


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold a file's lock, which ends with the process at the latest.

    Raises:
        Busy: another process holds it.
    """
    with contextlib.ExitStack() as held:
        with refusing_disk_errors(path.parent):
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
    """Write a file so that a kill at any moment leaves the old one or the new one, whole."""
    draft = path.with_name(path.name + DRAFT)
    with refusing_disk_errors(path):
        try:
            yield draft
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            draft.replace(path)
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
