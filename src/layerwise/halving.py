"""Hierarchies ranked by successive halving of short trainings, as an Optuna study that can be stopped and shared.

Every proposal is a trial, in the proposals' order. A trial reports its validation accuracy after every epoch and is given up at
epoch 1, 3, 9 … unless it is among the best third of those that came as far before it (Li et al. 2020, asynchronous successive
halving; the first trials are therefore compared with few). The study lies in the output folder: a killed one goes on, and
processes that are given the same command share its trials.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import Busy, Diverged, InvalidInput
from layerwise.hierarchy import Design
from layerwise.progress import Progress, clock
from layerwise.ranking import Ranked
from layerwise.runs import LOCK, Execution, Run, RunFolder, described
from layerwise.train import Interrupted, train

if TYPE_CHECKING:
    import optuna

DATABASE = "study.db"
CHOICE = "design"  # what the study calls what it chooses from
FACTOR = 3  # of every three hierarchies one is trained on
WAIT = 1.0  # seconds between looks at what other processes train


def check_optuna() -> None:
    """Refuse a search that needs what is not installed.

    Raises:
        InvalidInput: optuna is missing.
    """
    if find_spec("optuna") is None:
        raise InvalidInput(
            "--search halving needs optuna: install it with pip install 'layerwise[search]', or give --search gain"
        )


def rank_by_halving(runs: dict[Design, tuple[Run, RunFolder]], output: Path, execution: Execution) -> list[Ranked]:
    """Rank hierarchies by short trainings, most of which end early.

    Args:
        runs: each design's short training and its folder, in the proposals' order.
        output: folder for the study's file.

    Returns:
        All of them: those trained longest first, among these by validation accuracy.

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

    def __init__(self, runs: dict[Design, tuple[Run, RunFolder]], output: Path, execution: Execution) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        output.mkdir(parents=True, exist_ok=True)
        self.designs = {design.text: design for design in runs}
        self.runs = {design.text: found for design, found in runs.items()}
        self.execution = execution
        self.study = optuna.create_study(
            storage=f"sqlite:///{output / DATABASE}",
            study_name=study_name([run for run, _ in runs.values()]),
            direction="maximize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=FACTOR),
            load_if_exists=True,
        )

    def finish(self) -> None:
        """Carry out trials until every design has one that ended, here or in another process."""
        began, done = time.monotonic(), 0
        while unsettled := self.unsettled():
            free = [name for name in unsettled if not is_locked(self.runs[name][1])]
            if not free:
                time.sleep(WAIT)
                continue
            left = f", about {clock((time.monotonic() - began) / done * len(unsettled))} left" if done else ""
            self.carry_out(free[0], f"short run {len(self.runs) - len(unsettled) + 1} of {len(self.runs)}{left}")
            done += 1

    def unsettled(self) -> list[str]:
        """Designs without a trial that came to its end or was given up."""
        settled = {trial.params[CHOICE] for trial in self.ended()}
        return [name for name in self.runs if name not in settled]

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
        run, folder = self.runs[name]
        reporter = Reporter(trial, run)
        try:
            for record in folder.log():
                reporter.epoch(record)
            train(run, folder, self.execution, resume=True, progress=reporter)
            self.study.tell(trial, reporter.accuracy)
        except (GivenUp, Diverged) as reason:
            print(f"  {reason}", flush=True)
            self.study.tell(trial, state=TrialState.PRUNED)
        except Busy:
            self.study.tell(trial, state=TrialState.FAIL)
        except Interrupted as interruption:
            self.study.tell(trial, state=TrialState.FAIL)
            raise KeyboardInterrupt(f"{interruption}. Go on with the same command") from None

    def ranking(self) -> list[Ranked]:
        found: dict[str, tuple[int, float]] = {}
        for trial in self.ended():
            reached = max(trial.intermediate_values.items(), default=(0, 0.0))
            found[trial.params[CHOICE]] = max(reached, found.get(trial.params[CHOICE], (0, 0.0)))
        ordered = sorted(found, key=lambda name: (*(-number for number in found[name]), list(self.runs).index(name)))
        return [
            Ranked(self.designs[name], rank, found[name][1], f"{found[name][1]:.2f} % at epoch {found[name][0]}")
            for rank, name in enumerate(ordered, start=1)
        ]


class GivenUp(Exception):
    """A short training that is not among the best of those that came as far."""


class Reporter(Progress):
    """Tells a trial of every epoch, and stops it where it is to be given up."""

    def __init__(self, trial: Any, run: Run) -> None:
        self.trial, self.run = trial, run
        self.accuracy, self.reached = 0.0, 0

    def epoch(self, record: dict[str, Any]) -> None:
        if record["val_accuracy"] is None or record["epoch"] <= self.reached:
            return
        self.accuracy, self.reached = record["val_accuracy"], record["epoch"]
        self.trial.report(self.accuracy, self.reached)
        if self.reached < self.run.epochs and self.trial.should_prune():
            raise GivenUp(f"given up after epoch {self.reached} at {self.accuracy:.2f} % on validation images")


def is_locked(folder: RunFolder) -> bool:
    """Whether another process trains into a folder."""
    if not folder.file(LOCK).exists():
        return False
    try:
        with folder.locked():
            return False
    except Busy:
        return True


def study_name(runs: Sequence[Run]) -> str:
    """The same for the same runs, so that another search in the same folder is another study."""
    text = json.dumps([described(run) for run in runs], sort_keys=True)
    return f"halving-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
