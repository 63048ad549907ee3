"""A run of a sweep as a worker is given it, and what comes back. No torch."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.runs.run import Execution, Run
from layerwise.utils.files import refusing_disk_errors
from layerwise.utils.plugins import IMPORTED
from layerwise.utils.version import version

if TYPE_CHECKING:
    from layerwise.experiments.entry import Entry

MARK = ".sweep"  # file in the output folder, by which a worker knows that folder


@dataclass(frozen=True)
class Task:
    """A run for a worker.

    Attributes:
        folder: of the run, absolute.
        label: what the run is called.
        place: folder that the command was given in, which relative paths are read from.
        mark: text of the file ``MARK`` beside the run's folder.
        imported: Python files of the user's own.
        version: of this program where the sweep was begun.
    """

    run: Run
    execution: Execution
    folder: Path
    label: str
    place: Path
    mark: str
    imported: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        state: in ``experiments.states``.
        host: name of the machine.
        message: a sentence on what went wrong, or nothing.
    """

    state: str
    host: str
    message: str = ""


def task_of(entry: "Entry", execution: Execution, mark: str) -> Task:
    """The task of a run, to be begun with an execution."""
    folder = entry.folder.path.absolute()
    imported = tuple(IMPORTED)
    return Task(entry.run, execution, folder, entry.label, Path.cwd(), mark, imported, version())


def mark_folder(output: Path) -> str:
    """The text of the file by which workers know the output folder, written if it is missing."""
    path = output / MARK
    with refusing_disk_errors(path):
        output.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        return path.read_text()
