"""The runs of a sweep, each with its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.experiments.states import FINISHED, TO_DO, UNFINISHED
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run, run_name, run_words
from layerwise.training.loop import Interrupted, train
from layerwise.training.prepare import Prepared, prepare
from layerwise.training.progress import shown


@dataclass(frozen=True)
class Entry:
    """A run of a sweep, its folder, and what it is called."""

    prepared: Prepared
    folder: RunFolder
    label: str

    @property
    def run(self) -> Run:
        return self.prepared.run

    @property
    def state(self) -> str:
        """The entry's state.

        Raises:
            InvalidInput: the run is finished, but a file of it is not the one that it wrote.
        """
        if self.folder.has_ended:
            self.folder.verify_all()
            return FINISHED
        return UNFINISHED if self.folder.begun else TO_DO


def entries(
    runs: Sequence[Run], output: Path, execution: Execution, labels: Sequence[str] | None = None
) -> list[Entry]:
    """The runs of a sweep with their folders, each refused if it can be without data.

    Args:
        output: folder that holds the runs.
        labels: what each run is called; default: by its name.

    Raises:
        InvalidInput: a run cannot be carried out, or runs cannot be kept in ``output``.
    """
    if output.exists() and not output.is_dir():
        raise InvalidInput(f"Cannot keep runs in {output}: it is a file. Give a folder.")
    prepared = [prepare(run, execution) for run in runs]
    names = labels or [run_words(run) for run in runs]
    return [
        Entry(ready, folder_of(ready.run, output), name)
        for ready, name in zip(prepared, names, strict=True)
    ]


def folder_of(run: Run, output: Path) -> RunFolder:
    """The folder of a run: under its name, or where an earlier version has put it.

    The words of a name are as they were; what is hashed into its end has changed with the format.
    """
    folder = RunFolder(output / run_name(run))
    if not folder.begun:
        for path in sorted(output.glob(f"{run_words(run)}-??????")):
            earlier = RunFolder(path)
            if earlier.begun and is_run(earlier, run):
                return earlier
    return folder


def is_run(folder: RunFolder, run: Run) -> bool:
    try:
        return folder.run() == run
    except InvalidInput:  # altered, or of another version: not this run's
        return False


def train_entry(entry: Entry) -> dict[str, Any]:
    """Train a run to its end, and return its result.

    Raises:
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    try:
        with shown(units=False) as progress:
            return train(entry.prepared, entry.folder, resume=True, progress=progress)
    except Interrupted as interruption:
        raise KeyboardInterrupt(f"{interruption}. Go on with the same command") from None
