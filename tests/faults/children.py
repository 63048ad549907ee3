"""Processes that run the program and are killed, or must end by themselves in time."""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from layerwise.cli import main, set_environment

TIME_LIMIT = 10.0  # seconds that a command may take
NOBODY = 65534  # user that may not read what only its owner may
PRELOADED = (
    *(
        "torch._dynamo",
        "sklearn.datasets",
        "encodings.unicode_escape",
        "encodings.idna",
        "PIL.Image",
        "rich.table",
        "safetensors.torch",
    ),
    *("layerwise.training.loop", "layerwise.training.saved", "layerwise.analysis.table"),
    *("layerwise.experiments.compare", "layerwise.experiments.reproduce", "layerwise.report"),
    *(f"layerwise.cli.{name}" for name in ("train", "compare", "reproduce", "report")),
    *(f"layerwise.cli.{name}" for name in ("evaluate", "separability", "predict")),
)


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; negative: the signal that killed it.
        operations: on files below the folder that was watched; of one that was not killed.
    """

    code: int
    seconds: float
    output: str
    operations: int


def preload() -> None:
    """Import what the program needs, so that processes that are forked need not."""
    set_environment()
    for name in PRELOADED:
        import_module(name)
    import_module("torch").set_num_threads(1)


def run(
    arguments: Sequence[str],
    watched: Path,
    after_seconds: float | None = None,
    before_operation: int | None = None,
    limit: float = TIME_LIMIT,
    as_nobody: bool = False,
) -> Ended:
    """Run a command in a process of its own.

    Args:
        watched: folder whose file operations are counted.
        after_seconds: when it is killed; None: not by the clock.
        before_operation: number of the operation before which it is killed; None: before none.
        limit: seconds after which it counts as hanging, and is killed.
        as_nobody: whether it runs as a user who may read less, where this one may change its user.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as counts:
        began = time.monotonic()
        process = os.fork()
        if not process:
            act(arguments, watched, before_operation, output.fileno(), counts.fileno(), as_nobody)
        status = waited(process, limit if after_seconds is None else after_seconds)
        seconds = time.monotonic() - began
        output.seek(0)
        counts.seek(0)
        text = output.read().decode(errors="replace")
        return Ended(status, seconds, text, int(counts.read() or 0))


def waited(process: int, limit: float) -> int:
    """The exit code of a process, which is killed when its time has passed."""
    until = time.monotonic() + limit
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return -signal.SIGKILL
        time.sleep(0.0005)


def act(
    arguments: Sequence[str],
    watched: Path,
    before_operation: int | None,
    output: int,
    counts: int,
    as_nobody: bool,
) -> None:
    """What the forked process does; it never returns."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        operations = count_operations(watched, before_operation)
        if as_nobody:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            main(arguments)
            code = 0
        except SystemExit as ending:
            code = int(ending.code or 0)
        os.write(counts, str(len(operations)).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_operations(watched: Path, kill_before: int | None) -> list[str]:
    """Count what this process does to files of a folder, and kill it before one of these."""
    operations: list[str] = []
    place = str(watched)

    def note(event: str, values: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "fsync"):
            return
        if event == "fsync" or place in str(values[0]):
            if len(operations) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            operations.append(event)

    fsync = os.fsync

    def noted(fd: Any) -> None:
        note("fsync", ())
        fsync(fd)

    os.fsync = noted
    sys.addaudithook(note)
    return operations
