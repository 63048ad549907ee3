"""Standard output and error: text that steers no terminal, on terminals of any encoding.

Names of classes, runs and files are written by others. A control character in one could move the
cursor, change the window's title or hide a line.
"""

import contextlib
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from layerwise.errors import InvalidInput

if TYPE_CHECKING:
    from rich.table import Table

PACKAGE = Path(__file__).parents[1]
USUAL_TEXT = warnings.formatwarning
PLAIN_WIDTH = 240  # columns of a table that is written into a file or a pipe


def visible(text: str) -> str:
    """Text in which every character that a terminal would act on is a replacement character.

    Line ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(character if is_shown(character) else "\ufffd" for character in text)


def is_shown(character: str) -> bool:
    """Whether a terminal shows a character, or a space, and does nothing else."""
    return (
        character.isprintable()
        or character in "\n\t"
        or unicodedata.category(character) == "Zs"  # spaces of other widths
    )


def in_one_line(text: str) -> str:
    """Text without line ends, as refusals are printed."""
    return " ".join(text.splitlines())


class VisibleStream:
    """A text stream that writes only what is visible.

    Attributes:
        unguarded: the stream below, for a progress bar, which moves the cursor.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.unguarded, self.label = stream, name
        with contextlib.suppress(AttributeError, ValueError):  # not every stream can be changed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        with self.refusing_errors():
            self.unguarded.write(visible(text))
        return len(text)

    def flush(self) -> None:
        with self.refusing_errors():
            self.unguarded.flush()

    @contextlib.contextmanager
    def refusing_errors(self) -> Iterator[None]:
        """Say in words that nothing more can be written, such as to a full disk."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            discard(self.unguarded)
            raise InvalidInput(
                f"Cannot write to {self.label}: {error.strerror or error}. Free space, or send it "
                "elsewhere."
            ) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


def discard(stream: TextIO) -> None:
    """Send what a stream still holds to nowhere, since Python would fail again when it exits."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


@contextlib.contextmanager
def visible_streams() -> Iterator[None]:
    """Let everything that is printed pass through ``visible`` for a while."""
    open_closed_streams()
    before = sys.stdout, sys.stderr
    sys.stdout = VisibleStream(before[0], "standard output")
    sys.stderr = VisibleStream(before[1], "standard error")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def open_closed_streams() -> None:
    """Open what a shell closed (``2>&-``), since a file of a run would else take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the process's lifetime
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def unguarded(stream: Any) -> TextIO:
    """The stream below a ``VisibleStream``, or the stream itself."""
    below: TextIO = getattr(stream, "unguarded", stream)
    return below


def print_table(*tables: "Table") -> None:
    """Print tables of rich, their cells as they are: no markup, no colour."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    console = Console(width=width, markup=False, emoji=False, highlight=False, color_system=None)
    for table in tables:
        console.print(table)


def warning_text(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning of this program's as one line, and others as Python writes them."""
    if Path(filename).is_relative_to(PACKAGE):
        return f"layerwise: {message}\n"
    return USUAL_TEXT(message, category, filename, lineno, line)
