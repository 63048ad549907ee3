"""Downloads of published files, each checked against its SHA-256.

A download that breaks off is kept beside its target, as ``<name>.part``, and continued by the next
mirror or the next call.
"""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, cast
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from layerwise.errors import InvalidInput
from layerwise.utils.terminal import unguarded

TIMEOUT = 30.0  # seconds a mirror may stay silent
ANSWER = 2 * TIMEOUT  # seconds until a mirror's headers are there
SLOWEST = 1000.0  # bytes a second; the slowest mirror sends 60,000
BLOCK = 64 * 1024  # bytes read at a time: about one second of the slowest mirror


@dataclass(frozen=True)
class RemoteFile:
    """A published file.

    Attributes:
        path: under the data folder, where torchvision would put it.
        sha256: in hexadecimal; size: in bytes.
        mirrors: URLs in order of trial.
    """

    path: str
    sha256: str
    size: int
    mirrors: tuple[str, ...]

    @property
    def name(self) -> str:
        return Path(self.path).name

    def matches(self, path: Path) -> bool:
        """Whether a path holds exactly this file."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == self.sha256


class MirrorFailed(Exception):
    """A mirror that could not give the file; the message says why in a few words."""


def download(files: Sequence[RemoteFile], data_dir: Path) -> list[Path]:
    """Fetch the files that a folder lacks or holds altered; return the paths of all.

    Raises:
        InvalidInput: every mirror failed, or ``data_dir`` cannot be written.
    """
    for file in files:
        target = data_dir / file.path
        try:
            if not file.matches(target):
                fetch(file, target)
        except OSError as error:
            raise InvalidInput(
                f"Cannot write {target}: {error.strerror or error}. Free {file.size} bytes there, "
                "or choose another --data-dir."
            ) from error
    return [data_dir / file.path for file in files]


def fetch(file: RemoteFile, target: Path) -> None:
    """Download a file, which replaces what is there only once it is verified.

    Raises:
        InvalidInput: every mirror failed.
        OSError: the disk refused.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    check_part(part)
    failures: list[str] = []
    mirrors = iter(file.mirrors)
    while not file.matches(part):  # it does where a call was stopped just before the renaming
        mirror = next(mirrors, None)
        if mirror is None:
            raise InvalidInput(
                f"Cannot download {target.name}: {'; '.join(failures)}. Run again to resume, or "
                f"place the file at {target} by hand."
            )
        try:
            receive(mirror, file, part)
        except MirrorFailed as failure:
            failures.append(f"{urlsplit(mirror).netloc}: {failure}")
    with part.open("rb+") as content:
        os.fsync(content.fileno())
    part.replace(target)


def receive(mirror: str, file: RemoteFile, part: Path) -> None:
    """Append to ``part`` what it lacks of a file, and not a byte more.

    Raises:
        MirrorFailed: ``part`` is kept for the next attempt unless its content proved wrong.
        OSError: the disk refused.
    """
    offset = part.stat().st_size if part.exists() else 0
    if offset >= file.size:
        offset = 0
    with ask(mirror, offset) as response:
        start = offset if response.status == 206 else 0
        check_offer(response, start, file.size)
        with (
            part.open("ab" if start else "wb") as output,
            progress(mirror, start, file.size) as advance,
        ):
            began = time.monotonic()
            while block := next_block(response, file.size - output.tell()):
                output.write(block)
                advance(len(block))
                check_rate(output.tell() - start, time.monotonic() - began)
    size = part.stat().st_size
    if size < file.size:  # http.client does not report a body cut short
        raise MirrorFailed(f"connection cut after {size} of {file.size} bytes")
    if not file.matches(part):
        part.unlink()
        raise MirrorFailed("wrong content, its SHA-256 is not the expected one")


def ask(mirror: str, offset: int) -> HTTPResponse:
    """Answer with the bytes from ``offset`` on (status 206) or from the start (200)."""
    headers = {"User-Agent": "layerwise"} | ({"Range": f"bytes={offset}-"} if offset else {})
    asked = partial(request.urlopen, request.Request(mirror, headers=headers), timeout=TIMEOUT)
    try:
        return cast(HTTPResponse, within(ANSWER, asked))
    except HTTPError as error:
        error.close()
        raise MirrorFailed(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:  # ValueError: led to no address
        raise MirrorFailed(describe(error)) from error


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call, or its error.

    Raises:
        MirrorFailed: it takes longer, and is left to itself: a server can send its headers a byte
            at a time.
    """
    results: list[Any] = []
    errors: list[Exception] = []

    def answer() -> None:
        try:
            results.append(call())
        except Exception as error:  # is raised below
            errors.append(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise MirrorFailed(f"no answer in {seconds:.0f} seconds")
    return results[0]


def check_offer(response: HTTPResponse, start: int, size: int) -> None:
    """Refuse an answer that cannot be the file, such as a login page, before writing."""
    if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise MirrorFailed("answered with another range than asked")
    if response.length is not None and start + response.length != size:
        raise MirrorFailed(f"offers {start + response.length} bytes instead of {size}")


def next_block(response: HTTPResponse, remaining: int) -> bytes:
    """Bytes of the body.

    An error here is the mirror's, so that any other ``OSError`` is the disk's.
    """
    try:
        return response.read1(min(BLOCK, remaining)) if remaining > 0 else b""
    except (OSError, HTTPException) as error:
        raise MirrorFailed(describe(error)) from error


def check_rate(received: int, seconds: float) -> None:
    """Give a mirror up that sends so slowly that it would never end.

    Raises:
        MirrorFailed: as said.
    """
    if seconds > TIMEOUT and received < SLOWEST * seconds:
        raise MirrorFailed(f"slower than {SLOWEST:.0f} bytes a second")


def check_part(part: Path) -> None:
    """Refuse to write into something else than a file of the data folder itself.

    Raises:
        InvalidInput: it is a link, a pipe or a folder.
    """
    link = part.is_symlink() and not part.is_char_device()  # a device keeps nothing
    if link or part.is_fifo() or part.is_dir():
        raise InvalidInput(f"Cannot write {part}: it is not a regular file. Remove it.")


def describe(error: Exception) -> str:
    return str(getattr(error, "reason", error)) or type(error).__name__


@contextmanager
def progress(mirror: str, done: int, size: int) -> Iterator[Callable[[int], None]]:
    """Progress on stderr, a bar on a terminal and one line elsewhere; it yields a counter."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    text, terminal = (
        f"{mirror.rpartition('/')[2]} from {urlsplit(mirror).netloc}",
        sys.stderr.isatty(),
    )
    if not terminal:
        print(f"downloading {text}: {done} of {size} bytes present", file=sys.stderr)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(file=unguarded(sys.stderr))
    with Progress(*columns, console=console, disable=not terminal) as bar:
        task = bar.add_task(text, total=size, completed=done)
        yield lambda count: bar.advance(task, count)
