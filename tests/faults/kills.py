"""Kills at random moments: what goes on must end as if it had never been stopped."""

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import InvalidInput
from layerwise.paper.rows import SCALES, Scale
from layerwise.runs.folder import WEIGHTS, RunFolder
from tests.faults import children

MOST_KILLS = 6  # of one run before it is let to its end
TRAIN = ["train", "vgg8b", "--hierarchy", "1,1,1,1", "--width", "0.04", "--resume"]
TRAIN += ["--train-images", "80", "--batch-size", "20", "--lr", "3e-3"]
TRAIN += ["--cpu-threads", "1", "--device", "cpu"]
CACHED = ("--rule", "sequential", "--cache", "--views", "1")
SCALE = {"data": "digits", "width": 1 / 32, "train_images": 40, "epochs": 2, "batch_size": 20}
SWEEP = ["reproduce", "5", "--rows", "resnet18_r1", "--scale", "tiny", *TRAIN[-4:]]
# options that may change when a run goes on
CHANGES: tuple[list[str], ...] = (
    [],
    ["--eval-every", "2"],
    ["--save-every", "2"],
    ["--save-every", "3", "--eval-every", "3"],
    ["--no-keep-memory"],
    ["--workers", "0"],
    ["--separability-every", "2", "--separability-measures", "fisher"],
)


@dataclass
class Case:
    """A command that is killed.

    Attributes:
        arguments: for an output in a folder, without options that may change.
        check: function of the folder with the output of a command that ran to its end; the digests
            that must always be the same.
        changes: options that may be drawn, each time that it goes on.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    check: Callable[[Path], dict[str, str]]
    changes: Sequence[list[str]] = ([],)
    weight: int = 1
    seconds: float = 0.0
    operations: int = 0
    expected: dict[str, str] | None = None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_below(folder: Path) -> dict[str, str]:
    """The digest of every run's weights below a folder, once all files fit each other."""
    weights = {}
    for path in sorted(folder.rglob("run.json")):
        RunFolder(path.parent).verify_all()
        weights[str(path.parent.relative_to(folder))] = digest(path.parent / WEIGHTS)
    return weights


def page(folder: Path) -> dict[str, str]:
    return {"page": digest(folder / "page.html")}


def cases(place: Path) -> list[Case]:
    """Everything that is killed; weights say how often."""
    SCALES["tiny"] = Scale("tiny", "for faults", {**SCALE, "dropout": 0.0, "lr": 1e-3})

    def training(*more: str) -> Callable[[Path], list[str]]:
        return lambda folder: [*TRAIN, *more, "--output", str(folder / "run")]

    reported = place / "reported"
    return [
        Case("train", training("--at", "3", "--epochs", "8"), weights_below, CHANGES, 6),
        Case(
            "train by a sequential rule",
            training("--at", "3", "--epochs", "2", *CACHED),
            weights_below,
            CHANGES,
            2,
        ),
        Case(
            "train globally", training("--rule", "global", "--epochs", "8"), weights_below, CHANGES
        ),
        Case("reproduce", lambda f: [*SWEEP, "--output", str(f)], weights_below, CHANGES[:5], 2),
        Case(
            "report",
            lambda folder: ["report", str(reported), "--output", str(folder / "page.html")],
            page,
        ),
    ]


def kill_all(place: Path, seed: int, kills: int, say: Callable[[str], None]) -> list[str]:
    """Kill so many processes, and return what did not survive, in words."""
    wanted = cases(place)
    for case in wanted:
        measure(case, place)
    dice, done, failures = random.Random(seed), 0, list[str]()
    survived: dict[str, int] = {}
    while done < kills:
        [case] = dice.choices(wanted, [case.weight for case in wanted])
        count, failure = kill_one(case, place / "killed", dice, min(MOST_KILLS, kills - done))
        done += count
        survived[case.name] = survived.get(case.name, 0) + count * (not failure)
        if failure:
            failures.append(f"{case.name}, of kills {done - count + 1} to {done}: {failure}")
            say(failures[-1])
    for name, count in survived.items():
        say(f"  {name}: {count} kills survived")
    say(f"{sum(survived.values())} of {done} kills survived (seed {seed})")
    return failures


def measure(case: Case, place: Path) -> None:
    """Run a case undisturbed: its length, its number of operations, and what it gives."""
    folder = place / ("reported" if case.name == "train" else case.name)
    folder.mkdir()
    ended = children.run(case.arguments(folder), folder, limit=60)
    assert ended.code == 0, ended.output
    case.seconds, case.operations = ended.seconds, ended.operations
    case.expected = case.check(folder)


def kill_one(case: Case, folder: Path, dice: random.Random, most: int) -> tuple[int, str]:
    """Kill a case again and again, let it end, and say what is wrong with the end; else nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kills = 0
    for moment in moments(case, dice, most):
        ended = children.run(case.arguments(folder) + dice.choice(case.changes), folder, **moment)
        if ended.code == 0:
            break
        kills += 1
        if ended.code != -9:
            return kills, f"exit {ended.code}: {ended.output[-300:]}"
    ended = children.run(case.arguments(folder) + dice.choice(case.changes), folder, limit=60)
    if ended.code:
        return kills, f"it could not be finished: {ended.output[-300:]}"
    try:
        written = case.check(folder)
    except (OSError, InvalidInput) as error:
        return kills, str(error)
    return kills, "" if written == case.expected else "the bits differ"


def moments(case: Case, dice: random.Random, most: int) -> Iterator[dict[str, float | int]]:
    """Moments to kill at: by the clock, or before an operation on a file."""
    for _ in range(dice.randint(1, most)):
        if dice.random() < 0.5:
            yield {"after_seconds": dice.uniform(0, case.seconds)}
        else:
            yield {"before_operation": dice.randrange(case.operations)}
