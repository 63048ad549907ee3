"""What engines share: runs are handed to workers, and those of dead workers to others."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import InvalidInput
from layerwise.experiments.engines.task import Outcome, Task, mark_folder, task_of
from layerwise.experiments.states import FAILED
from layerwise.runs.run import Execution

if TYPE_CHECKING:
    from layerwise.experiments.entry import Entry


class WorkerDied(Exception):
    """A worker that ended and left no outcome."""


@dataclass(kw_only=True)
class Engine(ABC):
    """Workers that another program gives; each trains one run at a time.

    Args:
        cpus: cores of a run, and threads of its operations.
        gpus: GPUs of a run.
        retries: how often a run is tried again whose worker has died.
    """

    cpus: int = 1
    gpus: float = 0.0
    retries: int = 2

    @property
    @abstractmethod
    def place(self) -> str:
        """Where runs are trained, in words."""

    def check(self) -> None:
        """Refuse options that are out of range.

        Raises:
            InvalidInput: naming the option.
        """
        for option, least in self.least().items():
            if not getattr(self, option) >= least:
                raise InvalidInput(
                    f"Cannot use --on-option {option}={getattr(self, option)}: it is too small. "
                    f"Give {least} or more."
                )

    def least(self) -> dict[str, int]:
        """The smallest value of each option that is a number."""
        return {"cpus": 1, "gpus": 0, "retries": 0}

    @abstractmethod
    def connected(self, output: Path) -> AbstractContextManager[None]:
        """Reach the workers, before anything is written.

        Raises:
            InvalidInput: they cannot be reached.
        """

    @abstractmethod
    def start(self, tasks: Sequence[Task]) -> Sequence[Hashable]:
        """A job for every task."""

    @abstractmethod
    def ended(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Those of some jobs that have ended; it waits a moment for one."""

    @abstractmethod
    def outcome(self, job: Any) -> Outcome:
        """How a job ended.

        Raises:
            WorkerDied: it left no outcome.
        """

    @abstractmethod
    def leave(self, jobs: Sequence[Any]) -> str:
        """What becomes of jobs that nobody waits for any longer, in words."""

    def train(self, entries: Sequence["Entry"]) -> list[Outcome]:
        """Train runs on workers, and return how each ended.

        Raises:
            InvalidInput: no worker can be reached; nothing was written.
            KeyboardInterrupt: interrupted; it says what still runs.
        """
        output = entries[0].folder.path.parent.absolute()
        with self.connected(output):
            mark = mark_folder(output)
            tasks = [
                task_of(entry, self.on_worker(entry.prepared.execution), mark) for entry in entries
            ]
            outcomes = dict(self.outcomes(tasks))
        return [outcomes[task.folder] for task in tasks]

    def on_worker(self, execution: Execution) -> Execution:
        """An execution with the cores and the GPU that a worker is given."""
        device = execution.device
        if device == "auto":
            device = "cuda" if self.gpus else "cpu"
        return replace(execution, device=device, cpu_threads=execution.cpu_threads or self.cpus)

    def outcomes(self, tasks: Sequence[Task]) -> Iterator[tuple[Path, Outcome]]:
        """The folder of every task and how it ended, as they end."""
        deaths: Counter[Path] = Counter()
        waiting: dict[Any, Task] = {}
        with self.told(waiting):
            waiting |= zip(self.start(tasks), tasks, strict=True)
            print(f"runs to train: {len(tasks)}; by {self.place}", flush=True)
            while waiting:
                for job in self.ended(list(waiting)):
                    task = waiting.pop(job)
                    try:
                        outcome = self.outcome(job)
                    except WorkerDied as death:
                        deaths[task.folder] += 1
                        number = deaths[task.folder]
                        if number <= self.retries:
                            print(f"worker lost, trying again: {task.label} ({death})", flush=True)
                            waiting |= zip(self.start([task]), [task], strict=True)
                            continue
                        outcome = dead(task, number, death)
                    print(f"{outcome.state} on {outcome.host}: {task.label}", flush=True)
                    yield task.folder, outcome

    @contextmanager
    def told(self, waiting: dict[Any, Task]) -> Iterator[None]:
        """Say on an interruption or a refusal what becomes of the jobs that were waited for."""
        try:
            yield
        except InvalidInput as refusal:
            if not waiting:
                raise
            raise InvalidInput(f"{refusal} Meanwhile {self.leave(list(waiting))}.") from None
        except KeyboardInterrupt:
            said = self.leave(list(waiting)) if waiting else "nothing runs any longer"
            message = f"stopped waiting; {said}. Go on with the same command"
            raise KeyboardInterrupt(message) from None


def dead(task: Task, number: int, death: WorkerDied) -> Outcome:
    """The outcome of a task whose workers died too often."""
    times = "once" if number == 1 else f"{number} times"
    message = (
        f"Cannot finish {task.label}: its worker was lost {times} ({death}). What it saved is in "
        f"{task.folder}; the same command goes on from there."
    )
    return Outcome(FAILED, "a worker", message)
