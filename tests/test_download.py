"""Downloads from a loopback server that cuts, refuses, lies or interrupts as its path says."""

import contextlib
import hashlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from layerwise.data.download import BLOCK, RemoteFile, download
from layerwise.data.published import FILES
from layerwise.errors import InvalidInput

CONTENT = bytes(range(256)) * (3 * BLOCK // 256)
HALF = len(CONTENT) // 2


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; the first part of the path says how."""

    server: "Server"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def answer(
        self, status: int, body: bytes, announced: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        behaviour, asked = self.path.split("/")[1], self.headers.get("Range")
        self.server.seen.append((behaviour, asked))
        getattr(self, f"do_{behaviour}")(
            int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        )

    def do_good(self, start: int) -> None:
        if not start:
            self.answer(200, CONTENT)
        elif start >= len(CONTENT):
            self.answer(416, b"")
        else:
            self.answer(
                206,
                CONTENT[start:],
                Content_Range=f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}",
            )

    def do_cut(self, start: int) -> None:
        self.answer(200, CONTENT[:HALF], announced=len(CONTENT))

    def do_unannounced(self, start: int) -> None:
        """Send half without Content-Length, so that only the known size tells that it was cut."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CONTENT[:HALF])

    def do_norange(self, start: int) -> None:
        self.answer(200, CONTENT)

    def do_shifted(self, start: int) -> None:
        self.answer(
            206, CONTENT[start:], Content_Range=f"bytes 1-{len(CONTENT) - 1}/{len(CONTENT)}"
        )

    def do_wrong(self, start: int) -> None:
        self.answer(200, CONTENT[::-1])

    def do_portal(self, start: int) -> None:
        self.answer(200, b"<html>please log in</html>")

    def do_missing(self, start: int) -> None:
        self.send_error(404)

    def do_endless(self, start: int) -> None:
        """Send more than the file without Content-Length, until the client has gone."""
        self.send_response(200)
        self.end_headers()
        for _ in range(1000):
            self.server.sent += self.wfile.write(CONTENT)

    def do_trickling(self, start: int) -> None:
        """Send a byte every tenth of a second."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.trickle(CONTENT[:60])

    def do_heading(self, start: int) -> None:
        """Send a header that does not end."""
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
        self.trickle(b"x" * 60)

    def trickle(self, content: bytes) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)

    def do_interrupt(self, start: int) -> None:
        """Send half, then press Ctrl-C on the client while it waits for the rest."""
        self.answer(200, CONTENT[:HALF], announced=len(CONTENT))
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not (
            self.server.part.exists() and self.server.part.stat().st_size
        ):
            time.sleep(0.01)
        identity = threading.main_thread().ident
        assert identity is not None
        signal.pthread_kill(identity, signal.SIGINT)
        self.server.interrupted.wait(30)


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str | None]] = []
        self.part = Path()  # where the client keeps what it has
        self.interrupted = threading.Event()
        self.sent = 0  # bytes of an endless body


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


class Site:
    """One file in a fresh data directory, offered by mirrors of chosen behaviour."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.files: list[RemoteFile] = []
        self.target = folder / "Tiny" / "raw" / "file.bin"
        self.part = folder / "Tiny" / "raw" / "file.bin.part"
        server.part = self.part

    def offer(self, *behaviours: str) -> None:
        mirrors = tuple(
            f"http://127.0.0.1:{self.server.server_port}/{kind}/file.bin" for kind in behaviours
        )
        digest = hashlib.sha256(CONTENT).hexdigest()
        self.files = [RemoteFile("Tiny/raw/file.bin", digest, len(CONTENT), mirrors)]

    def leave(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def assert_done(self, *requests: tuple[str, str | None]) -> None:
        assert self.target.read_bytes() == CONTENT
        assert not self.part.exists()
        assert self.server.seen == list(requests)


@pytest.fixture
def site(server: Server, tmp_path: Path) -> Site:
    return Site(server, tmp_path / "data")


def test_plain_fetch(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.offer("good")
    assert download(site.files, site.folder) == [site.target]
    site.assert_done(("good", None))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"file.bin from 127.0.0.1:{site.server.server_port}" in lines[0]


def test_no_more_is_received_than_the_file_has(site: Site) -> None:
    site.offer("endless", "good")
    download(site.files, site.folder)
    site.assert_done(("endless", None))
    assert site.server.sent < 1000 * len(CONTENT)


def test_next_mirror_continues_a_cut_connection(site: Site) -> None:
    site.offer("cut", "good")
    download(site.files, site.folder)
    site.assert_done(("cut", None), ("good", f"bytes={HALF}-"))


def test_next_call_continues_a_cut_connection(site: Site) -> None:
    site.offer("cut")
    with pytest.raises(InvalidInput, match=f"cut after {HALF} of {len(CONTENT)} bytes"):
        download(site.files, site.folder)
    assert site.part.read_bytes() == CONTENT[:HALF]
    assert not site.target.exists()
    site.offer("good")
    download(site.files, site.folder)
    site.assert_done(("cut", None), ("good", f"bytes={HALF}-"))


def test_cut_without_announced_length_is_told_by_the_known_size(site: Site) -> None:
    site.offer("unannounced", "good")
    download(site.files, site.folder)
    site.assert_done(("unannounced", None), ("good", f"bytes={HALF}-"))


def test_server_that_ignores_range_starts_over(site: Site) -> None:
    site.offer("norange")
    site.leave(site.part, b"x" * 1000)
    download(site.files, site.folder)
    site.assert_done(("norange", "bytes=1000-"))


def test_server_that_answers_another_range_is_not_used(site: Site) -> None:
    site.offer("shifted", "good")
    site.leave(site.part, CONTENT[:1000])
    download(site.files, site.folder)
    site.assert_done(("shifted", "bytes=1000-"), ("good", "bytes=1000-"))


def test_complete_part_is_installed_without_a_request(site: Site) -> None:
    site.offer("good")
    site.leave(site.part, CONTENT)
    download(site.files, site.folder)
    site.assert_done()


def test_part_that_is_too_long_starts_over(site: Site) -> None:
    site.offer("good")
    site.leave(site.part, CONTENT + b"more")
    download(site.files, site.folder)
    site.assert_done(("good", None))


def test_wrong_content_is_dropped_and_the_next_mirror_starts_from_scratch(site: Site) -> None:
    site.offer("wrong", "good")
    download(site.files, site.folder)
    site.assert_done(("wrong", None), ("good", None))


def test_spoiled_part_is_dropped_and_the_next_mirror_starts_from_scratch(site: Site) -> None:
    site.offer("good", "good")
    site.leave(site.part, b"x" * 1000)
    download(site.files, site.folder)
    site.assert_done(("good", "bytes=1000-"), ("good", None))


def test_login_page_does_not_cost_the_partial_file(site: Site) -> None:
    site.offer("portal", "good")
    site.leave(site.part, CONTENT[:1000])
    download(site.files, site.folder)
    site.assert_done(("portal", "bytes=1000-"), ("good", "bytes=1000-"))


def test_all_mirrors_failing_is_one_clear_refusal(site: Site) -> None:
    site.offer("missing", "wrong", "portal")
    with pytest.raises(InvalidInput) as refusal:
        download(site.files, site.folder)
    message = str(refusal.value)
    assert "\n" not in message
    for wanted in (
        "file.bin",
        "HTTP 404",
        "SHA-256",
        "instead of",
        "Run again",
        str(site.target),
        "by hand",
    ):
        assert wanted in message
    assert not site.target.exists()
    assert not site.part.exists()


def test_unreachable_mirror_is_named(site: Site, server: Server) -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    closed.server_close()
    site.offer("good")
    dead = f"http://127.0.0.1:{closed.server_port}/file.bin"
    site.files = [replace(file, mirrors=(dead,)) for file in site.files]
    with pytest.raises(InvalidInput, match=f"127.0.0.1:{closed.server_port}: .*refused"):
        download(site.files, site.folder)


def test_present_file_is_left_alone(site: Site) -> None:
    site.offer("good")
    site.leave(site.target, CONTENT)
    before = site.target.stat()
    assert download(site.files, site.folder) == [site.target]
    site.assert_done()
    assert site.target.stat().st_ino == before.st_ino


def test_altered_file_is_replaced(site: Site) -> None:
    site.offer("good")
    site.leave(site.target, CONTENT[:-1] + b"x")
    download(site.files, site.folder)
    site.assert_done(("good", None))


def test_altered_file_stays_until_a_verified_one_is_there(site: Site) -> None:
    site.offer("missing")
    site.leave(site.target, b"altered")
    with pytest.raises(InvalidInput):
        download(site.files, site.folder)
    assert site.target.read_bytes() == b"altered"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_full_disk_says_how_much_is_needed_where(site: Site) -> None:
    site.offer("good", "good")
    site.part.parent.mkdir(parents=True)
    site.part.symlink_to("/dev/full")
    with pytest.raises(
        InvalidInput, match=f"Tiny/raw/file.bin: No space left.*Free {len(CONTENT)} bytes"
    ):
        download(site.files, site.folder)
    assert not site.target.exists()
    assert len(site.server.seen) == 1


def test_data_directory_that_is_a_file_is_refused(site: Site) -> None:
    site.offer("good")
    site.leave(site.folder, b"")
    with pytest.raises(InvalidInput, match="Cannot write"):
        download(site.files, site.folder)
    assert site.server.seen == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started in the background, by a
    shell that has it ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs a signal sent to one thread")
@pytest.mark.usefixtures("interruptible")
def test_interruption_leaves_the_part_for_resumption(site: Site) -> None:
    site.offer("interrupt")
    with pytest.raises(KeyboardInterrupt):
        download(site.files, site.folder)
    site.server.interrupted.set()
    kept = site.part.stat().st_size
    assert 0 < kept < len(CONTENT)
    assert not site.target.exists()
    site.offer("good")
    download(site.files, site.folder)
    site.assert_done(("interrupt", None), ("good", f"bytes={kept}-"))


def test_terminal_gets_a_bar(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    site.offer("good")
    download(site.files, site.folder)
    assert "file.bin from 127.0.0.1" in terminal.getvalue()


def test_pinned_files_are_well_formed() -> None:
    assert list(FILES) == ["cifar10", "cifar100", "mnist", "fashion-mnist", "kmnist", "svhn"]
    files = [file for group in FILES.values() for file in group]
    assert (
        len({file.path for file in files})
        == len({file.sha256 for file in files})
        == len(files)
        == 16
    )
    for file in files:
        assert len(bytes.fromhex(file.sha256)) == 32
        assert file.size
        assert len(file.mirrors) >= 2
        assert all(url.startswith(("https://", "http://")) for url in file.mirrors)
        assert all(url.endswith("/" + Path(file.path).name) for url in file.mirrors)
    for name in ("cifar10", "cifar100"):
        assert "cs.toronto.edu" in FILES[name][0].mirrors[-1]


def test_a_stream_slower_than_the_slowest_mirror_is_given_up(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.data.download.TIMEOUT", 0.5)
    began = time.monotonic()
    site.offer("trickling")
    with pytest.raises(InvalidInput, match="slower than 1000 bytes a second"):
        download(site.files, site.folder)
    assert time.monotonic() - began < 5


def test_headers_that_never_end_are_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.data.download.ANSWER", 1.0)
    began = time.monotonic()
    site.offer("heading")
    with pytest.raises(InvalidInput, match="no answer in 1 seconds"):
        download(site.files, site.folder)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_part_that_is_no_file_of_its_own_is_not_written_into(site: Site, kind: str) -> None:
    site.part.parent.mkdir(parents=True)
    other = site.part.with_name("precious")
    if kind == "link":
        other.write_text("precious")
    match kind:
        case "pipe":
            os.mkfifo(site.part)
        case "folder":
            site.part.mkdir()
        case _:
            site.part.symlink_to(other)
    site.offer("good")
    with pytest.raises(InvalidInput, match="it is not a regular file"):
        download(site.files, site.folder)
    assert other.exists() == (kind == "link")
    assert kind != "link" or other.read_text() == "precious"
