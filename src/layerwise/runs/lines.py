"""Files of one JSON object per line and epoch, tied to the state by their digest. No torch."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from sys import float_info
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.utils.files import read_file, refuse_what_is_no_file, replacing

Mark = Mapping[str, Any]  # bytes and their SHA-256: how far a file reached


class Lines:
    """A file of a line per epoch, hashed as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes, self.digest = 0, hashlib.sha256()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line, on the disk when this returns."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        refuse_what_is_no_file(self.path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(self.path, flags, 0o666), "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.bytes += len(line)
        self.digest.update(line)

    def mark(self) -> dict[str, Any]:
        """How far the file reaches, and the digest of it up to there."""
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}

    def content(self) -> bytes:
        try:
            return read_file(self.path)
        except FileNotFoundError:
            return b""

    def records(self) -> list[dict[str, Any]]:
        """The whole lines, without those that are cut short or hold something else."""
        records = []
        for line in self.content().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if is_record(record):
                    records.append(record)
        return records

    def lost(self, mark: Mark) -> bool:
        """Whether the file has been removed since a mark was made.

        Raises:
            InvalidInput: it is there, but is not the file that was marked.
        """
        if not mark["bytes"]:
            return False
        if not os.path.lexists(self.path):
            return True
        if hashlib.sha256(self.content()[: mark["bytes"]]).hexdigest() != mark["sha256"]:
            raise InvalidInput(
                f"Cannot go on with {self.path.parent}: {self.path.name} was cut or altered since "
                "the state was saved. Restore it, or move it away to go on without its epochs."
            )
        return False

    def truncate(self, epochs: int, mark: Mark | None) -> None:
        """Keep what the mark covers; without one, the epochs up to a number.

        The file is written anew, so that another that shares its content is left as it is.
        """
        content = self.content()
        if mark is None:
            records = [record for record in self.records() if record["epoch"] <= epochs]
            content = "".join(json.dumps(record) + "\n" for record in records).encode()
        else:
            content = content[: mark["bytes"]]
        with replacing(self.path) as draft:
            draft.write_bytes(content)
        self.bytes, self.digest = len(content), hashlib.sha256(content)


def is_record(record: Any) -> bool:
    """Whether a line is of an epoch, with units that are numbered and losses that are numbers."""
    return (
        isinstance(record, dict)
        and isinstance(record.get("epoch"), int)
        and isinstance(record.get("units"), list)
        and all(
            isinstance(unit, dict)
            and isinstance(unit.get("index"), int)
            and is_number(unit.get("loss", 0))
            for unit in record["units"]
        )
    )


def is_number(value: Any) -> bool:
    """Whether a value is a number that can be shown.

    Text is none, nor are NaN and infinity, which Python's JSON allows.
    """
    return isinstance(value, int | float) and abs(value) <= float_info.max
