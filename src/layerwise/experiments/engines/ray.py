"""Ray: a remote task for every run, on this machine or on a cluster that runs."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from layerwise.errors import InvalidInput, brief, first_line_of, last_line_of
from layerwise.experiments.engines.base import Engine, WorkerDied
from layerwise.experiments.engines.task import Outcome, Task
from layerwise.experiments.states import FAILED

LOCAL = "local"
OBJECT_STORE = 80 * 2**20  # bytes: tasks and outcomes are short
PAUSE = 1.0  # seconds that a look at jobs waits for one of them
REACHED = 5.0  # seconds in which a cluster must answer
STOPPED = 120.0  # seconds in which a task saves its state


@dataclass(kw_only=True)
class Ray(Engine):
    """Tasks of Ray, each in a process of its own.

    Args:
        address: local: start Ray on this machine for this sweep; auto: the cluster that this
            machine is part of; HOST:PORT, or ray://HOST:PORT for Ray's client.
    """

    address: str = LOCAL

    @property
    def place(self) -> str:
        return f"Ray ({self.address})"

    @contextmanager
    def connected(self, output: Path) -> Iterator[None]:
        import ray

        from layerwise.experiments.engines.worker import carry_out

        self.check_address()
        own = {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
        try:
            ray.init(
                self.address,
                log_to_driver=False,
                logging_level="ERROR",
                **(own if self.address == LOCAL else {}),
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            self.refuse_address(first_line_of(error))
        try:
            self.check_resources(ray.nodes())
            self.remote = ray.remote(
                num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0, max_calls=1
            )(carry_out)
            yield
        finally:
            ray.shutdown()

    def check_address(self) -> None:
        """Refuse a cluster that does not answer, for which Ray itself would wait for minutes."""
        if self.address in (LOCAL, "auto"):
            return
        host, _, port = self.address.removeprefix("ray://").rpartition(":")
        if not host or not port.isdecimal():
            self.refuse_address("it is neither local, auto, HOST:PORT nor ray://HOST:PORT")
        try:
            socket.create_connection((host, int(port)), timeout=REACHED).close()
        except (OSError, OverflowError) as error:
            self.refuse_address(str(error))

    def refuse_address(self, reason: str) -> NoReturn:
        reason = brief(reason).rstrip(".")
        raise InvalidInput(
            f"Cannot reach a Ray cluster at address={brief(self.address)}: {reason}. Start one "
            "with `ray start --head`, correct the address, or leave it out for Ray on this machine."
        )

    def check_resources(self, nodes: Sequence[dict[str, Any]]) -> None:
        """Refuse a run that no machine is large enough for; of a cluster that may grow, say so."""
        for option, resource in (("cpus", "CPU"), ("gpus", "GPU")):
            wanted = getattr(self, option)
            most = max((node["Resources"].get(resource, 0) for node in nodes), default=0)
            if wanted > most:
                reason = f"no machine there has more than {most:g}"
                if self.address == LOCAL:
                    raise InvalidInput(
                        f"Cannot train by Ray with {option}={wanted:g}: {reason}. Give fewer."
                    )
                print(f"waiting for a machine with {option}={wanted:g}: {reason}", flush=True)

    def start(self, tasks: Sequence[Task]) -> Sequence[Any]:
        return [self.remote.remote(task) for task in tasks]

    def ended(self, jobs: Sequence[Any]) -> Sequence[Any]:
        import ray

        ended: list[Any] = ray.wait(jobs, num_returns=1, timeout=PAUSE)[0]
        return ended

    def outcome(self, job: Any) -> Outcome:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            outcome: Outcome = ray.get(job)
            return outcome
        except RayTaskError as error:  # raised outside of the task's training
            reason = last_line_of(error)
            return Outcome(FAILED, "a worker", f"Cannot train by Ray: {reason}")
        except RayError as error:
            raise WorkerDied(first_line_of(error)) from None

    def leave(self, jobs: Sequence[Any]) -> str:
        import ray

        for job in jobs:
            ray.cancel(job)
        ray.wait(jobs, num_returns=len(jobs), timeout=STOPPED)
        return "nothing runs any longer, and runs keep their last state"
