"""Ranks for tests: processes on loopback that join by gloo.

They are forked from a server that has imported torch once, so that a world of two takes a fraction
of a second.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from layerwise.distributed import joined, world
from layerwise.training.progress import Progress

PRELOADED = ["torch", "pytest", "layerwise.training.loop", "tests.contract"]
THREADS_LEFT = 77  # exit code
PATIENCE = 60.0  # seconds for all of a test's ranks


class StopAfter(Progress):
    """Asks the first rank to stop when so many steps have been made."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def tick(self, tick: Any, meter: Any) -> None:
        self.left -= 1
        if not self.left and world().first:
            os.kill(os.getpid(), signal.SIGINT)


@cache
def server() -> Any:
    """The context of processes that are forked from a server with torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What ``torchrun`` tells a rank."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {
        **{name: str(value) for name, value in names.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def work(
    pipe: Connection,
    variables: dict[str, str],
    timeout: float,
    patience: float,
    task: Callable[..., Any],
    args: Any,
) -> None:
    """Carry out a task as one rank, and send what it returns, or the exception that it raised."""
    faulthandler.enable()  # a crash says where
    faulthandler.dump_traceback_later(patience, exit=True)
    os.environ.update(variables, OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    try:
        with joined("cpu", timeout):
            pipe.send(task(*args))
    except BaseException as error:
        pipe.send(error)
        return
    if any("gloo" in name for name in thread_names()):
        os._exit(THREADS_LEFT)


def thread_names() -> list[str]:
    """What the system calls this process's threads; none where it does not say."""
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


def on_ranks(
    task: Callable[..., Any],
    *args: Any,
    size: int = 2,
    timeout: float = 20.0,
    patience: float = PATIENCE,
) -> list[Any]:
    """What a function of a module returns on every rank, or the exception that it raised there.

    A rank that ends without either, such as one that is killed, has None.

    Args:
        timeout: seconds that ranks wait for each other.
        patience: seconds that the task may take; a rank that takes longer says where it is.
    """
    port, processes, pipes = free_port(), [], []
    for rank in range(size):
        here, there = server().Pipe()
        arguments = (there, environment(rank, size, port), timeout, patience, task, args)
        process = server().Process(target=work, args=arguments, daemon=True)
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    results = [received(pipe, patience + 10) for pipe in pipes]
    for process in processes:
        process.join(10)
        assert process.exitcode is not None, "a rank hangs"
        assert process.exitcode != THREADS_LEFT, "threads of a rank go on after it has left"
    return results


def received(pipe: Connection, patience: float) -> Any:
    try:
        assert pipe.poll(patience), "a rank hangs"
        return pipe.recv()
    except EOFError:
        return None
