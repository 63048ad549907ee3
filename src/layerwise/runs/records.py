"""Runs as they lie on disk, for readers of many.

No torch; nothing is locked, and nothing is raised for a broken run.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.runs.damage import read_result
from layerwise.runs.folder import CONFIGURATION, LOG, RESULT, SEPARABILITY, RunFolder
from layerwise.runs.lines import is_number
from layerwise.runs.run import Run
from layerwise.utils.files import open_file, read_file
from layerwise.utils.words import few

UNITS = b', "units": ['  # where the part of a log's line begins that is large and seldom needed
WHOLE = b"}]}"  # how such a line ends
DEEPEST = 6  # folders below one that was named
SHOWN = 5  # names of files that are of no run


@dataclass(frozen=True)
class Broken:
    """A folder or file that is no run, or not all of one, and why, in words."""

    path: str
    reason: str


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        path: of its folder, as it was found.
        run: what was trained.
        facts: all of ``run.json``: ``machine``, ``units``, ``data`` and, where it was noted,
            ``commit`` and ``command``.
        epochs: the log's records without their units: ``epoch``, ``epochs``, ``test_accuracy`` and
            ``val_accuracy`` in percent (None where not evaluated), ``images_per_second``,
            ``seconds``.
        result: of a finished run; see ``Meter.result``.
        places: where in the log each of ``epochs`` begins and ends; kept instead of the lines,
            which can be gigabytes.
        damaged: names of its files that are not those that it wrote; nothing is read from them.
    """

    path: str
    run: Run
    facts: dict[str, Any]
    epochs: tuple[dict[str, Any], ...]
    result: dict[str, Any] | None
    places: tuple[tuple[int, int], ...]
    damaged: tuple[str, ...] = ()

    @property
    def test_accuracy(self) -> float | None:
        """Percent, of the last epoch of a finished run; None for a run that is not finished."""
        return self.result["test_accuracy"] if self.result else None

    def units(self, index: int) -> list[dict[str, Any]]:
        """The units of an entry of ``epochs``, read from disk now.

        Each has ``index``, ``name``, ``loss``, ``accuracy`` and, of held-out images, ``val_loss``
        and ``val_accuracy``.
        """
        begin, end = self.places[index]
        with open_file(Path(self.path) / LOG) as log:
            log.seek(begin)
            try:
                units: list[dict[str, Any]] = json.loads(log.read(end - begin))["units"]
            except RecursionError:
                raise ValueError("nested too deeply") from None
        return units

    def separability(self) -> list[dict[str, Any]]:
        """Measurements of the features while training, a record per measured epoch; often none."""
        if SEPARABILITY in self.damaged:
            return []
        try:
            return [record for record, _ in read_lines(Path(self.path) / SEPARABILITY)[0]]
        except InvalidInput:  # what is in its place was said
            return []


def read_runs(paths: Sequence[str | Path]) -> tuple[list[Record], list[Broken]]:
    """Read every run in and below some folders.

    Returns:
        The runs in the order of their paths, and what could not be read or only in part: truncated
        lines, missing results, files that belong to no run.

    Raises:
        InvalidInput: a path is not a folder.
    """
    folders = list(find(paths))
    records, broken = [], strays(paths, folders) if folders else []
    for folder in folders:
        try:
            record, problems = read_run(folder)
        except (InvalidInput, OSError) as error:
            broken.append(Broken(str(folder), str(error)))
            continue
        records.append(record)
        broken += [Broken(str(folder), problem) for problem in problems]
    return records, broken


def find(paths: Iterable[str | Path]) -> Iterator[Path]:
    """The folders of runs, each once."""
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.is_file():
            raise InvalidInput(
                f"Cannot read runs: {path} is a file. Give a folder of runs; unpack an archive of "
                "them first."
            )
        if not path.is_dir():
            raise InvalidInput(
                f"Cannot read runs: there is no folder {path}. Give folders of runs, or one that "
                "holds them; `layerwise train` makes runs/."
            )
        for folder in sorted(walk(path, DEEPEST)):
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield folder


def walk(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    for entry in entries(folder) if depth else ():
        if entry.is_dir() and not entry.is_symlink():
            yield from walk(entry, depth - 1)


def is_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (CONFIGURATION, LOG, RESULT))


def entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []  # not ours to read


def strays(paths: Iterable[str | Path], runs: Iterable[Path]) -> list[Broken]:
    """Files beside runs that belong to none: an entry for each folder that holds such files."""
    places = {Path(path) for path in paths if not is_run(Path(path))}
    places |= {run.parent for run in runs if run not in set(map(Path, paths))}
    broken = []
    for folder in sorted(places):
        names = [entry.name for entry in entries(folder) if not belongs_beside_runs(entry)]
        if names:
            broken.append(
                Broken(str(folder), f"not of a run, and passed over: {few(names, SHOWN)}")
            )
    return broken


def belongs_beside_runs(entry: Path) -> bool:
    """Whether it is a run, holds some, or is something that this program keeps beside runs."""
    ours = entry.name.startswith((".", "study", "compare-"))
    return ours or (entry.is_dir() and next(walk(entry, DEEPEST), None) is not None)


def read_run(folder: Path) -> tuple[Record, list[str]]:
    """One run, and what is wrong with it in words.

    Raises:
        InvalidInput: it has no configuration that can be read.
    """
    run_folder = RunFolder(folder)
    facts, run = run_folder.facts(), run_folder.run()
    result, damaged, problems = read_result(run_folder)
    lines, bad = ([], []) if LOG in damaged else read_lines(folder / LOG, UNITS)
    problems += bad
    epochs = [(record, place) for record, place in lines if is_epoch(record)]
    whole = list({record["epoch"]: (record, place) for record, place in epochs}.values())
    problems += uncounted(LOG, len(lines) - len(epochs), len(epochs) - len(whole))
    if result and not whole and LOG not in damaged:
        problems.append(f"{LOG} has no epoch, though the run is finished: it has no curves")
    if SEPARABILITY not in damaged:
        problems += separability_problems(folder / SEPARABILITY)
    if not run_folder.has(RESULT):
        last = whole[-1][0] if whole else None
        problems.append(
            f"not finished: {last['epoch']} of {last['epochs']} epochs, no {RESULT}"
            if last
            else "begun, but no epoch of it is finished"
        )
    return Record(
        str(folder),
        run,
        facts,
        tuple(r for r, _ in whole),
        result,
        tuple(place for _, place in whole),
        tuple(damaged),
    ), problems


def uncounted(name: str, foreign: int, repeated: int) -> list[str]:
    """Words for numbers of lines that are not of epochs, and of epochs that come again later."""
    counts = {
        f"lines of {name} that are not of epochs were left out": foreign,
        f"lines of {name} whose epoch comes again further down were left out": repeated,
    }
    return [f"{words}: {number}" for words, number in counts.items() if number]


def separability_problems(path: Path) -> list[str]:
    """What is wrong with the lines of measured epochs, in words."""
    try:
        lines, bad = read_lines(path)
    except InvalidInput as error:
        return [str(error)]
    measured = [record for record, _ in lines if is_measured_epoch(record)]
    return bad + uncounted(path.name, len(lines) - len(measured), 0)


def is_measured_epoch(record: dict[str, Any]) -> bool:
    return isinstance(record.get("epoch"), int) and isinstance(record.get("units"), list)


def read_lines(
    path: Path, stop: bytes | None = None
) -> tuple[list[tuple[dict[str, Any], tuple[int, int]]], list[str]]:
    """The JSON objects of a file, one per line, and problems in words.

    Each object comes with the places in bytes where its line begins and ends.

    Args:
        stop: read each line only up to this; a log of 400 epochs is then read 20 times as fast.
    """
    try:
        data = read_file(path)
    except FileNotFoundError:
        return [], []
    places = list(line_places(data))
    heads = read_heads(data, places, stop) if stop else None
    if heads is not None:
        return list(zip(heads, places, strict=True)), []
    records, bad = [], 0
    for begin, end in places:
        line = data[begin:end]
        cut = line.find(stop) if stop else -1
        try:
            record = json.loads(line if cut < 0 else line[:cut] + b"}")
            if not isinstance(record, dict) or (cut >= 0 and not line.endswith(WHOLE)):
                raise ValueError
            records.append((record, (begin, end)))
        except (ValueError, RecursionError):
            bad += 1
    return records, [
        f"lines of {path.name} that are cut short or no JSON were left out: {bad}"
    ] if bad else []


def line_places(data: bytes) -> Iterator[tuple[int, int]]:
    """Where each line begins and ends, without its end of line; empty ones are left out."""
    begin = 0
    while begin < len(data):
        end = data.find(b"\n", begin)
        end = len(data) if end < 0 else end
        if end > begin:
            yield begin, end
        begin = end + 1


def read_heads(
    data: bytes, places: Sequence[tuple[int, int]], stop: bytes
) -> list[dict[str, Any]] | None:
    """The part of every line before ``stop``, parsed at once; None unless all are whole.

    That is several times as fast as line by line.
    """
    heads = []
    for begin, end in places:
        cut = data.find(stop, begin, end)
        if cut < 0 or not data.endswith(WHOLE, begin, end):
            return None
        heads.append(data[begin:cut])
    try:
        records = json.loads(b"[" + b"},".join(heads) + b"}]") if heads else []
    except (ValueError, RecursionError):
        return None
    return (
        records
        if len(records) == len(places) and all(isinstance(record, dict) for record in records)
        else None
    )


def is_epoch(record: dict[str, Any]) -> bool:
    """Whether a log's record has the numbers that are shown."""
    for name in ("epoch", "epochs"):
        if not isinstance(record.get(name), int):
            return False
    # no generators: 400,000 calls in a report
    for name in ("test_accuracy", "val_accuracy", "seconds", "images_per_second"):
        value = record.get(name)
        if value is not None and not is_number(value):
            return False
    return True
