"""Bounds that each case of a property-based test is held to, and words that programs trip on."""

import contextlib
import io
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from layerwise.cli import main

MOST_SECONDS, MOST_BYTES = 10, 10**9
ALLOWED = (None, 0, 2)  # exit codes: done, refused

NUMBERS = (
    *("0", "-1", "1e400", "-1e400", "nan", "inf", "1e-400", "1_000", "0x10", "٣", "²", "1,5", ""),
    *("9" * 31, "9" * 320, "9" * 5000, "-" + "9" * 320, str(2**31), str(2**63), str(10**30)),
)
TEXTS = (
    *("--", "-", "\0", "a\0b", "\x1b]0;title\x07", "\x1b[2J", "\r", "\n", "\u202e", "\ud800"),
    *("\udcff", "%s%n", "{0.__class__}", "../../x", "/dev/full", "/dev/zero", "/", ".", "~", "*"),
    *("a" * 300, "a/" * 3000, "=1+1", "null", "[]", "{}", "1,1,1,99999999999", "1,,1", ",", ":"),
)


@contextlib.contextmanager
def within_bounds() -> Iterator[None]:
    """Fail what takes longer than ``MOST_SECONDS``, or more than ``MOST_BYTES`` at any moment."""

    def stop(*_: int | FrameType | None) -> None:
        raise AssertionError(f"it takes more than {MOST_SECONDS} seconds")

    before, memory = signal.signal(signal.SIGALRM, stop), reset_peak()
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert status("VmHWM") - memory < MOST_BYTES


def reset_peak() -> int:
    """Make the largest memory so far that of now, and return it in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1]) * 1024


def run_program(*arguments: str) -> tuple[Any, str]:
    """Exit code and all that was printed, within bounds; any other error is a test's failure."""
    printed = io.StringIO()
    code: Any = None
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        within_bounds(),
    ):
        try:
            main(arguments)
        except SystemExit as leaving:
            code = leaving.code
    return code, printed.getvalue()


def assert_refused_or_done(*arguments: str) -> None:
    """The program ends by itself, in words that steer no terminal."""
    code, printed = run_program(*arguments)
    assert code in ALLOWED, printed
    assert code != 2 or printed.rstrip("\n").splitlines()[-1].startswith("layerwise: "), printed
    assert not set(printed) & set(map(chr, {*range(32), 127, 0x202E} - {9, 10})), printed
