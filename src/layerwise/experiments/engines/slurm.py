"""Slurm, by submitit: a job for every run, together in an array."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import InvalidInput, choose, last_line_of
from layerwise.experiments.engines.base import Engine, WorkerDied
from layerwise.experiments.engines.task import Outcome, Task
from layerwise.experiments.states import FAILED

PAUSE = 1.0  # seconds between looks at jobs; submitit asks Slurm itself less often
LOGS = ".slurm"  # folder of submitit's files, in the output folder


class CarryOut:
    """A task's training, which Slurm may put back into its queue at the end of its time."""

    def __call__(self, task: Task) -> Outcome:
        from layerwise.experiments.engines.worker import carry_out

        return carry_out(task)

    def checkpoint(self, task: Task) -> Any:
        """The same task: it goes on from the state that its folder holds."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, task)


@dataclass(kw_only=True)
class Slurm(Engine):
    """Jobs of Slurm, or, with ``cluster=local``, processes on this machine to try a sweep with.

    Args:
        cluster: slurm or local.
        minutes: time limit of a job; one that reaches it goes back into the queue.
        memory: of a job, such as 16GB.
        partition, account: that jobs are submitted to.
        at_once: most jobs that run at the same time.
    """

    cluster: str = "slurm"
    minutes: int = 1440
    memory: str | None = None
    partition: str | None = None
    account: str | None = None
    at_once: int = 256

    @property
    def place(self) -> str:
        return "Slurm" if self.cluster == "slurm" else "processes on this machine"

    def check(self) -> None:
        super().check()
        choose("cluster", self.cluster, ["slurm", "local"])
        if self.gpus != int(self.gpus):
            raise InvalidInput(
                f"Cannot use --on-option gpus={self.gpus}: Slurm gives whole GPUs. Give 0 or more."
            )

    def least(self) -> dict[str, int]:
        return {**super().least(), "minutes": 1, "at_once": 1}

    @contextmanager
    def connected(self, output: Path) -> Iterator[None]:
        import submitit

        self.logs = output / LOGS
        try:
            self.executor = submitit.AutoExecutor(
                self.logs, cluster=self.cluster, slurm_max_num_timeout=self.retries
            )
        except RuntimeError:
            raise InvalidInput(
                "Cannot reach Slurm: this machine has no srun. Give the command on a machine of "
                "the cluster, or try it here with --on-option cluster=local."
            ) from None
        self.executor.update_parameters(**self.parameters())
        yield

    def parameters(self) -> dict[str, Any]:
        """What jobs ask for, as submitit names it."""
        wanted = {
            "name": "layerwise",
            "timeout_min": self.minutes,
            "cpus_per_task": self.cpus,
            "gpus_per_node": int(self.gpus),
            "slurm_mem": self.memory,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_array_parallelism": self.at_once,
        }
        return {name: value for name, value in wanted.items() if value}

    def start(self, tasks: Sequence[Task]) -> Sequence[Any]:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            return self.executor.map_array(CarryOut(), tasks)
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            reason = last_line_of(error)
            raise InvalidInput(
                f"Cannot submit to Slurm: {reason}. Correct --on-option, then give the command "
                "again."
            ) from None

    def ended(self, jobs: Sequence[Any]) -> Sequence[Any]:
        ended = [job for job in jobs if job.done()]
        if not ended:
            time.sleep(PAUSE)
        return ended

    def outcome(self, job: Any) -> Outcome:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        log = job.paths.stderr
        try:
            outcome: Outcome = job.result()
            return outcome
        except FailedJobError as error:  # raised outside of the task's training
            reason = last_line_of(error)
            return Outcome(FAILED, "a worker", f"Cannot train by {job.job_id}: {reason}; see {log}")
        except UncompletedJobError:
            raise WorkerDied(f"job {job.job_id}, {job.state.lower()}; see {log}") from None

    def leave(self, jobs: Sequence[Any]) -> str:
        names = " ".join(job.job_id for job in jobs)
        if self.cluster == "local":
            for job in jobs:
                job.cancel()
            for job in jobs:
                job.wait()
            return f"the processes {names} are stopped, and their runs keep their last state"
        return f"jobs of Slurm go on: {names} (to stop them: scancel {names})"
