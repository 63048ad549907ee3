"""The folder that a run is kept in. No torch."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerwise.errors import Busy, InvalidInput
from layerwise.runs.run import Execution, Run, check_value, described, renamed, run_from
from layerwise.utils.files import DRAFT, locked_file, refusing_disk_errors, replacing, write_json

CONFIGURATION, LOG, RESULT, STATE = "run.json", "log.jsonl", "result.json", "last.pt"
# of the last epoch, and of the best on the validation images
WEIGHTS, BEST = "model.safetensors", "best.safetensors"
SEPARABILITY = "separability.jsonl"
LOCK = "lock"
FORMATS = (2, 3)  # of the folder that can be read; the last is written


class RunFolder:
    """Where a run is kept: what it is, one line per epoch, its states, its result.

    Every write is whole or not at all.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        return self.file(RESULT).exists()

    @property
    def begun(self) -> bool:
        return self.file(CONFIGURATION).exists()

    @contextlib.contextmanager
    def created(self, run: Run, facts: Mapping[str, Any]) -> Iterator[None]:
        """Make the folder for a run that begins, and keep other processes from it.

        Args:
            facts: what else belongs beside the run: the data set's classes, the machine, the
                command.

        Raises:
            InvalidInput: the folder holds something already, or cannot be made.
        """
        self.refuse_begun()
        self.refuse_existing()
        with refusing_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with self.locked():
            self.refuse_begun()
            self.refuse_existing()
            write_json(
                self.file(CONFIGURATION), {"format": FORMATS[-1], "run": described(run), **facts}
            )
            yield

    def refuse_begun(self) -> None:
        """Refuse a folder that was free when the caller began to prepare its run."""
        if self.begun:
            raise Busy(
                f"Cannot begin {self.path}: it was begun by another process in the meantime. Go on "
                "with --resume once that one stops."
            )

    def refuse_existing(self) -> None:
        """Refuse a folder that holds a run, or anything else."""
        if self.begun:
            state = "a finished run" if self.finished else "an unfinished run"
            remedy = (
                "Choose another --output."
                if self.finished
                else "Go on with --resume, or choose another --output."
            )
            raise InvalidInput(
                f"Cannot begin a run in {self.path}: it holds {state}, which is never overwritten. "
                f"{remedy}"
            )
        if self.path.exists() and (
            not self.path.is_dir() or any(map(is_foreign, self.path.iterdir()))
        ):
            raise InvalidInput(
                f"Cannot begin a run in {self.path}: it exists and is not a run. Choose another "
                "--output, or an empty folder."
            )
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise InvalidInput(
                f"Cannot begin a run in {self.path}: {parent} cannot be written to. Choose another "
                "--output, or change its permissions."
            )

    def facts(self) -> dict[str, Any]:
        """Everything in the configuration file.

        Raises:
            InvalidInput: there is no such file, or it cannot be read.
        """
        path = self.file(CONFIGURATION)
        try:
            facts = json.loads(path.read_text())
            if facts["format"] not in FORMATS:
                raise ValueError(f"format {facts['format']} is not one of {FORMATS}")
            if not isinstance(facts["run"], dict) or not isinstance(facts["data"], dict):
                raise ValueError("its run or its data is not a table")
            return facts
        except FileNotFoundError:
            raise InvalidInput(
                f"Cannot read {self.path}: it is not a run, for no {CONFIGURATION} is in it. Give "
                "the folder of a run."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"Cannot read {path} as a run: {error}. Restore it, or start the run anew."
            ) from error

    def run(self) -> Run:
        facts = self.facts()
        return run_from(facts["run"], facts["format"], self.file(CONFIGURATION))

    def execution(self) -> Execution:
        """The execution that the run began with."""
        accepted = {item.name: item for item in fields(Execution)}
        values = renamed(self.facts().get("execution", {}))
        return Execution(
            **{
                name: check_value(self.file(CONFIGURATION), accepted[name], values[name])
                for name in accepted & values.keys()
            }
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into this folder at the same time."""
        with locked_file(self.file(LOCK)):
            yield

    def append(self, record: Mapping[str, Any], name: str = LOG) -> None:
        """Add a line to the log, or to another file of a line per epoch."""
        with refusing_disk_errors(self.path), self.file(name).open("a") as log:
            log.write(json.dumps(record, allow_nan=False) + "\n")
            log.flush()
            os.fsync(log.fileno())

    def log(self, name: str = LOG) -> list[dict[str, Any]]:
        """The whole lines of the log, or of another such file, without one cut short by a kill."""
        records = []
        if self.file(name).exists():
            for line in self.file(name).read_text(errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
        return records

    def truncate_log(self, epochs: int) -> None:
        """Drop what was logged after the state that training goes on from."""
        for name in (LOG, SEPARABILITY):
            records = [record for record in self.log(name) if record["epoch"] <= epochs]
            if name == LOG or self.file(name).exists():
                with replacing(self.file(name)) as draft:
                    draft.write_text("".join(json.dumps(record) + "\n" for record in records))

    def result(self) -> dict[str, Any]:
        try:
            # wherever it lies now
            return {**json.loads(self.file(RESULT).read_text()), "run": str(self.path)}
        except FileNotFoundError:
            raise InvalidInput(
                f"Cannot read a result of {self.path}: it has none yet. Finish it with --resume."
            ) from None
        except (ValueError, TypeError) as error:
            raise InvalidInput(
                f"Cannot read {self.file(RESULT)}: {error}. Remove it and finish the run with "
                "--resume."
            ) from None


def is_foreign(path: Path) -> bool:
    """Whether a file is none of those that a run leaves when it is killed before it has begun."""
    return path.name not in (LOCK, CONFIGURATION + DRAFT)
