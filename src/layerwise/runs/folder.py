"""The folder that a run is kept in. No torch."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerwise.errors import Busy, InvalidInput
from layerwise.runs.digests import BEST as BEST
from layerwise.runs.digests import STATE as STATE
from layerwise.runs.digests import digest_of_facts, refuse_broken_seal, verify
from layerwise.runs.fields import check_value
from layerwise.runs.formats import renamed, run_from
from layerwise.runs.lines import Lines, Mark
from layerwise.runs.results import refuse_unsound_result
from layerwise.runs.run import Execution, Run, described
from layerwise.utils.files import (
    DRAFT,
    locked_file,
    read_json,
    refuse_what_is_no_file,
    refusing_disk_errors,
    sync_folder,
    write_json,
)

CONFIGURATION, LOG, RESULT = "run.json", "log.jsonl", "result.json"
# of the last epoch
WEIGHTS = "model.safetensors"
# of a better epoch, until a state that knows of it is saved
NEXT_BEST = "best-next.safetensors"
SEPARABILITY = "separability.jsonl"
LOCK = "lock"
# entries of a result: digests of what describes the run (of a state too), of weights, of the rest
FACTS_DIGEST, WEIGHTS_DIGESTS, RECORDS_DIGESTS = "facts_sha256", "sha256", "records_sha256"
LOGS = (LOG, SEPARABILITY)  # of a line per epoch
WRITTEN = (CONFIGURATION, *LOGS, RESULT, STATE, WEIGHTS, BEST, NEXT_BEST, LOCK)
FORMATS = (2, 3)  # of the folder that can be read; the last is written


class RunFolder:
    """Where a run is kept: what it is, one line per epoch, its states, its result.

    Every write is whole or not at all.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lines = {name: Lines(self.path / name) for name in LOGS}

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        """Whether it has a result, and no weights that the result names have been removed."""
        if not self.has(RESULT):
            return False
        try:
            return not self.removed_weights()
        except InvalidInput:  # said where the result is read
            return True

    @property
    def archived(self) -> bool:
        """Whether it has a result, but lacks weights and the state to write them from.

        So do the runs of ``results/``: their numbers stand, but nothing can go on from them.
        """
        return self.has(RESULT) and not self.has(STATE) and not self.finished

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to train: it is finished, or was archived without weights."""
        return self.finished or self.archived

    def removed_weights(self) -> list[str]:
        """Names of weights that the result has a digest of, and that are not there."""
        return [name for name in self.result()[WEIGHTS_DIGESTS] if not self.has(name)]

    def digests(self) -> dict[str, str]:
        """The digests that the result has of the run's files, by their names."""
        result = self.result()
        return {**result[WEIGHTS_DIGESTS], **result[RECORDS_DIGESTS]}

    def has(self, name: str) -> bool:
        """Whether something is in a file's place."""
        return os.path.lexists(self.file(name))

    def verify(self, *names: str) -> None:
        """Refuse files of a finished run that are not those that it wrote.

        Only those are looked at that its result has a digest of: an earlier version's has fewer.

        Raises:
            InvalidInput: naming the first of them.
        """
        digests = self.digests()
        for name in names:
            if name in digests:
                verify(self.file(name), digests[name])
        self.verify_facts(self.result())

    def verify_facts(self, record: Mapping[str, Any]) -> None:
        """Refuse a description that a result or a state was not made by.

        Raises:
            InvalidInput: as said.
        """
        if record.get(FACTS_DIGEST, digest := self.facts_digest()) != digest:
            raise InvalidInput(
                f"Cannot use {self.path}: {CONFIGURATION} was altered since the state was saved. "
                "Restore it, or start another run."
            )

    def facts_digest(self) -> str:
        """The digest of what numbers rest on in ``run.json``."""
        return digest_of_facts(described(self.run()), self.facts())

    def verify_all(self) -> None:
        """Refuse a finished run of which any file is not the one that it wrote.

        Those that no number of the result needs any longer may be gone; see ``needed_files``.

        Raises:
            InvalidInput: naming the first of them.
        """
        refuse_unsound_result(self.file(RESULT), self.result(), self.run())
        self.verify(*self.needed_files())

    def needed_files(self) -> list[str]:
        """Names of the files with a digest that a finished run needs, and of others that it has.

        Its state may have been removed, and of an archived run the weights.
        """
        spare = [STATE, *(self.removed_weights() if self.archived else ())]
        return [name for name in self.digests() if name not in spare or self.has(name)]

    def refuse_links(self) -> None:
        """Refuse to go on where writing would reach a file elsewhere, or wait for ever.

        Raises:
            InvalidInput: naming the first such file.
        """
        for name in WRITTEN:
            refuse_what_is_no_file(self.file(name))

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
            sync_folder(self.path.absolute().parent)
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
            state = "a finished run" if self.has_ended else "an unfinished run"
            remedy = (
                "Choose another --output."
                if self.has_ended
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
        if not parent.is_dir():
            raise InvalidInput(
                f"Cannot begin a run in {self.path}: {parent} is a file. Choose another --output."
            )
        if not os.access(parent, os.W_OK | os.X_OK):
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
            facts = read_json(path)
            if facts["format"] not in FORMATS:
                raise ValueError(f"format {facts['format']} is not one of {FORMATS}")
            if not isinstance(facts["run"], dict) or not isinstance(facts["data"], dict):
                raise ValueError("its run or its data is not a table")
            if not all(isinstance(facts.get(name, {}), dict) for name in ("execution", "imported")):
                raise ValueError("its execution or what it imported is not a table")
            return facts
        except InvalidInput:
            raise
        except FileNotFoundError:
            raise InvalidInput(
                f"Cannot read {self.path}: it is not a run, since it has no {CONFIGURATION}. Give "
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
        with refusing_disk_errors(self.path):
            self.lines[name].append(record)

    def log(self, name: str = LOG) -> list[dict[str, Any]]:
        """The whole lines of the log, or of another such file, without one cut short by a kill."""
        return self.lines[name].records()

    def verified_log(self, name: str = LOG) -> list[dict[str, Any]]:
        """The same, for a number to rest on.

        Raises:
            InvalidInput: the run is finished, and the file is not the one that it wrote.
        """
        if self.has(RESULT):
            self.verify(name)
        return self.log(name)

    def marks(self) -> dict[str, Mark]:
        """How far each file of a line per epoch reaches, and its digest."""
        return {name: lines.mark() for name, lines in self.lines.items()}

    def truncate_log(self, epochs: int, marks: Mapping[str, Mark] | None = None) -> None:
        """Drop what was logged after the state that training goes on from.

        Args:
            marks: how far each file reached when the state was saved; see ``Lines.mark``.
        """
        for name in LOGS:
            if name == LOG or self.has(name):
                self.lines[name].truncate(epochs, (marks or {}).get(name))

    def result(self) -> dict[str, Any]:
        """The run's result, wherever the folder lies now.

        Raises:
            InvalidInput: there is none, or it cannot be read.
        """
        path = self.file(RESULT)
        try:
            result = read_json(path)
            refuse_broken_seal(path, result)  # before missing entries are filled in
            for name, allowed in (
                (WEIGHTS_DIGESTS, (WEIGHTS, BEST)),
                (RECORDS_DIGESTS, (STATE, *LOGS)),
            ):
                for file, digest in result.setdefault(name, {}).items():
                    if file not in allowed or not isinstance(digest, str):
                        raise ValueError(f"its {name} is not one")
        except FileNotFoundError:
            raise InvalidInput(
                f"Cannot read a result of {self.path}: it has none yet. Finish it with --resume."
            ) from None
        except InvalidInput:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"Cannot read {path}: {error}. Remove it and finish the run with --resume."
            ) from None
        return {**result, "run": str(self.path)}


def is_foreign(path: Path) -> bool:
    """Whether a file is none of those that a run leaves when it is killed before it has begun."""
    return path.name not in (LOCK, CONFIGURATION + DRAFT)
