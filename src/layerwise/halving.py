"""Hierarchies ranked by successive halving of short trainings, as an Optuna study that can be stopped and shared.

Every proposal is a trial, in the proposals' order. A trial is trained to epoch 1, 3, 9 … over one or more seeds, reports there
the mean of their validation accuracies, and is given up unless it is among the best third of those that came as far before it
(Li et al. 2020, asynchronous successive halving). The first trials are compared with few; so at the end those that were given
up too early go on, and those that went on by luck are ranked where they belong. What comes out is the same in whatever order
trials were made, however often they were stopped and whoever shared them. The study lies in the output folder: a killed one
goes on, and processes that are given the same command share its trials, also on several machines that share the folder and
its file locks.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from layerwise.errors import Busy, Diverged, InvalidInput
from layerwise.hierarchy import Design
from layerwise.progress import Progress, clock
from layerwise.ranking import Ranked
from layerwise.runs import LOCK, Execution, Run, RunFolder, described, locked_file
from layerwise.train import Interrupted, train

if TYPE_CHECKING:
    import optuna

STUDY = "study.log"  # a journal, since a database file does not bear several machines
CHOICE = "design"  # what the study calls what it chooses from
DIVERGED = "diverged"  # and how it marks a trial that did
FACTOR = 3  # of every three hierarchies one is trained on
WAIT = 1.0  # seconds between looks at what other processes train
LOCKS = "study-locks"  # folder of a file per design, locked while a process trains it


def check_optuna() -> None:
    """Refuse a search that needs what is not installed.

    Raises:
        InvalidInput: optuna is missing.
    """
    if find_spec("optuna") is None:
        raise InvalidInput(
            "--search halving needs optuna: install it with pip install 'layerwise[search]', or give --search gain"
        )


Seeds = list[tuple[Run, RunFolder]]  # the short trainings of a design and their folders


def rank_by_halving(runs: dict[Design, Seeds], output: Path, execution: Execution) -> list[Ranked]:
    """Rank hierarchies by short trainings, most of which end early.

    Args:
        runs: each design's short trainings, a seed each and all of one length, in the proposals' order.
        output: folder for the study's file.

    Returns:
        All of them: the best third after the first epoch before the others, among these the best third after the third, and
        so on; each with its validation accuracy where it was left behind.

    Raises:
        InvalidInput: optuna is missing, or a run cannot be carried out.
        KeyboardInterrupt: stopped by a signal; the study and its runs go on with the same command.
    """
    check_optuna()
    search = Halving(runs, output, execution)
    search.finish()
    return search.ranking()


class Halving:
    """A study over some designs."""

    def __init__(self, runs: dict[Design, Seeds], output: Path, execution: Execution) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        (output / LOCKS).mkdir(parents=True, exist_ok=True)
        self.locks = output / LOCKS
        self.designs = {design.text: design for design in runs}
        self.runs = {design.text: found for design, found in runs.items()}
        self.execution = execution
        self.last = next(iter(runs.values()))[0][0].epochs
        journal = str(output / STUDY)
        backend = JournalFileBackend(journal, JournalFileOpenLock(journal))
        self.study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=study_name([run for seeds in runs.values() for run, _ in seeds]),
            direction="maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=FACTOR),
            load_if_exists=True,
        )

    def finish(self) -> None:
        """Carry out trials until every design has one that ended, and those that deserve it have gone on, here or elsewhere."""
        began, done = time.monotonic(), 0
        while waiting := self.unsettled() or self.given_up_too_early():
            free = [name for name in waiting if not self.is_taken(name)]
            if not free:
                time.sleep(WAIT)
                continue
            left = f", about {clock((time.monotonic() - began) / done * len(waiting))} left" if done else ""
            unsettled = len(self.unsettled())
            place = (
                f"short run {len(self.runs) - unsettled + 1} of {len(self.runs)}{left}" if unsettled else "going on after all"
            )
            self.carry_out(free[0], place)
            done += 1

    def unsettled(self) -> list[str]:
        """Designs without a trial that came to its end or was given up."""
        settled = {trial.params[CHOICE] for trial in self.ended()}
        return [name for name in self.runs if name not in settled]

    def given_up_too_early(self) -> list[str]:
        """Designs that are among the best of all that came as far, and were not trained on; those that diverged stay."""
        diverged = {trial.params[CHOICE] for trial in self.ended() if DIVERGED in trial.user_attrs}
        early = {name: None for epochs, names in self.standing().items() for name in names if self.reached(name) <= epochs}
        return [name for name in early if name not in diverged]

    def standing(self) -> dict[int, list[str]]:
        """By epoch at which trials are compared, before the last: the best of all, whatever was known when they came there."""
        names, values, found = list(self.runs), self.values(), {}
        for epochs in list(rungs(self.last))[:-1]:
            names = found[epochs] = ordered(names, epochs, values)[0]
        return found

    def reached(self, name: str) -> int:
        """Epochs that all runs of a design have been trained for."""
        return min(len(folder.log()) for _, folder in self.runs[name])

    def values(self) -> dict[str, dict[int, float]]:
        """Every design's mean validation accuracies in percent, by epoch."""
        found: dict[str, dict[int, float]] = {name: {} for name in self.runs}
        for trial in self.study.get_trials(deepcopy=False):
            if CHOICE in trial.params:
                found[trial.params[CHOICE]] |= trial.intermediate_values
        return found

    def ended(self) -> "list[optuna.trial.FrozenTrial]":
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def carry_out(self, name: str, place: str) -> None:
        """Train one design until it is given up or done; what interrupts it marks the trial as failed."""
        from optuna.trial import TrialState

        self.study.enqueue_trial({CHOICE: name})
        trial = self.study.ask()
        name = trial.suggest_categorical(CHOICE, list(self.runs))  # another process may have taken ours
        print(f"{place}: {name}", flush=True)
        try:
            with locked_file(self.lock(name)):
                self.study.tell(trial, self.climb(trial, name))
        except (GivenUp, Diverged) as reason:
            print(f"  {reason}", flush=True)
            if isinstance(reason, Diverged):
                trial.set_user_attr(DIVERGED, True)
            self.study.tell(trial, state=TrialState.PRUNED)
        except Busy:
            self.study.tell(trial, state=TrialState.FAIL)
        except Interrupted as interruption:
            self.study.tell(trial, state=TrialState.FAIL)
            raise KeyboardInterrupt(f"{interruption}. Go on with the same command") from None

    def climb(self, trial: "optuna.trial.Trial", name: str) -> float:
        """Train a design's runs from rung to rung, and return their mean validation accuracy at the last.

        Raises:
            GivenUp: it is not among the best of those that came as far.
        """
        standing = {} if self.unsettled() else self.standing()
        kept = {epochs for epochs, names in standing.items() if name in names}
        accuracy = 0.0
        for epochs in rungs(self.last):
            scores = [train_until(run, folder, epochs, self.execution) for run, folder in self.runs[name]]
            known = [score for score in scores if score is not None]
            if len(known) < len(scores):  # not evaluated yet, by --eval-every
                continue
            accuracy = fmean(known)
            trial.report(accuracy, epochs)
            if epochs < self.last and epochs not in kept and trial.should_prune():
                raise GivenUp(f"given up after epoch {epochs} at {accuracy:.2f} % on validation images")
        return accuracy

    def lock(self, name: str) -> Path:
        return self.locks / name

    def is_taken(self, name: str) -> bool:
        """Whether another process trains a design, or one of its runs."""
        return any(map(is_locked, [self.lock(name), *(folder.file(LOCK) for _, folder in self.runs[name])]))

    def ranking(self) -> list[Ranked]:
        values = self.values()
        found = places(list(self.runs), self.last, values)
        scores = [values[name].get(epochs, 0.0) for name, epochs in found]
        return [
            Ranked(self.designs[name], rank, score, self.in_words(name, epochs, score))
            for rank, ((name, epochs), score) in enumerate(zip(found, scores, strict=True), start=1)
        ]

    def in_words(self, name: str, epoch: int, accuracy: float) -> str:
        count = len(self.runs[name])
        return f"{accuracy:.2f} % at epoch {epoch}" + (f", {count} seeds" if count > 1 else "")


class GivenUp(Exception):
    """A short training that is not among the best of those that came as far."""


class Reached(Exception):
    """The epoch to stop at has been trained, saved and logged."""


class Until(Progress):
    """Stops a training after an epoch; it can go on later."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def epoch(self, record: dict[str, Any]) -> None:
        if record["epoch"] >= self.epochs:
            raise Reached


def train_until(run: Run, folder: RunFolder, epochs: int, execution: Execution) -> float | None:
    """Train a run as far as an epoch, and return its validation accuracy in percent then; None where it was not evaluated.

    One that came as far before is not trained.

    Raises:
        InvalidInput, Diverged, Busy, Interrupted: see ``train``.
    """
    if len(folder.log()) < epochs:
        with contextlib.suppress(Reached):
            train(run, folder, execution, resume=True, progress=Until(epochs) if epochs < run.epochs else Progress())
    scores = [record["val_accuracy"] for record in folder.log()[:epochs]]
    return next((score for score in reversed(scores) if score is not None), None)


def places(names: list[str], last: int, values: dict[str, dict[int, float]]) -> list[tuple[str, int]]:
    """Designs by how far they came, the best first, each with the epoch after which it was behind.

    Args:
        last: the epoch at which the last are compared.
        values: validation accuracies of each, by epoch.
    """
    found: list[tuple[str, int]] = []
    for epochs in rungs(last):
        names, behind = ordered(names, epochs, values)
        found = [(name, epochs) for name in behind] + found
    return [(name, last) for name in names] + found


def ordered(names: list[str], epochs: int, values: dict[str, dict[int, float]]) -> tuple[list[str], list[str]]:
    """The best third of some designs after an epoch, at least one, and the others; of equals the first. Best first.

    Where none was evaluated then, all are among the best.
    """
    known = sorted((name for name in names if epochs in values[name]), key=lambda name: -values[name][epochs])
    if not known:
        return names, []
    count = max(1, len(known) // FACTOR)
    return known[:count], known[count:] + [name for name in names if name not in known]


def rungs(last: int) -> Iterator[int]:
    """The epochs at which trials are compared: powers of ``FACTOR`` below the last, and the last."""
    epochs = 1
    while epochs < last:
        yield epochs
        epochs *= FACTOR
    yield last


def is_locked(path: Path) -> bool:
    """Whether another process holds a file's lock."""
    if not path.exists():
        return False
    try:
        with locked_file(path):
            return False
    except Busy:
        return True


def study_name(runs: Sequence[Run]) -> str:
    """The same for the same runs, so that another search in the same folder is another study."""
    text = json.dumps([described(run) for run in runs], sort_keys=True)
    return f"halving-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
