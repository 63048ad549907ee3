"""The world: the processes that train together, each a rank, on PyTorch's own engine.

A rank that ends for a reason leaves its sentence in the store that all ranks share, so that the
others, whose connections to it break, can repeat it.
"""

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TextIO

import torch
import torch.distributed as dist

from layerwise.distributed.meeting import common_store
from layerwise.errors import CannotSplit, Diverged, InvalidInput, LostRank, brief, first_line_of
from layerwise.runs.ranges import check_number
from layerwise.utils.launch import launched_local_rank, launched_rank, launched_size

# Tracing imports this module, whose functions have the process group of that moment as a default.
# Such a group would never end: its threads would meet a Python that has ended, and abort.
if dist.is_available():
    importlib.import_module("torch.distributed.nn.functional")

REFUSALS = (InvalidInput, CannotSplit, Diverged)
LAST_WORDS = "layerwise/last-words"  # key of the sentence with which a rank ended
LARGEST_PORT = 65_535
STORE_TIMEOUT = timedelta(seconds=2)  # for the last words; the store may have gone too


@dataclass
class Stopping:
    """A wish to stop training, on its way to all ranks.

    Attributes:
        asked: whether this rank was asked to.
        agreed: whether it stops after the batch at hand, as all ranks do.
    """

    asked: bool = False
    agreed: bool = False


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process among those on its machine.
        timeout: seconds after which a rank that does not answer is given up.
        stopping: the wish to stop.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    timeout: float = 0.0
    stopping: Stopping = field(default_factory=Stopping, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0


ALONE = World()
_joined: World = ALONE
_users: World = ALONE  # of a process group that is not ours


def world() -> World:
    """The world of this process: of ``joined``, or of the process group that a user's program
    has made; without either, of this process alone.
    """
    global _users
    if _joined is not ALONE or not (dist.is_available() and dist.is_initialized()):
        return _joined
    users = World(dist.get_rank(), dist.get_world_size(), launched_local_rank())
    _users = _users if _users == users else users
    return _users


@contextmanager
def joined(device: str, timeout: float) -> Iterator[World]:
    """Join the processes that ``torchrun`` started with this one, for as long as the context lasts.

    Messages between CPUs go by gloo, those between GPUs by NCCL.

    Args:
        device: as ``--device`` names it.
        timeout: seconds after which a rank that does not answer is given up.

    Raises:
        InvalidInput: the timeout is out of range, PyTorch lacks a backend, the environment is not
            torchrun's, or not all processes came in time.
    """
    global _joined
    refuse_size(os.environ.get("WORLD_SIZE", ""))
    if launched_size() == 1 or (dist.is_available() and dist.is_initialized()):
        yield world()
        return
    check_number("rank_timeout", timeout)
    backend = backend_for(device)
    here = World(launched_rank(), launched_size(), launched_local_rank(), timeout)
    start(backend, here)
    _joined = here
    try:
        yield here
    except BaseException as error:
        leave_last_words(error, here)
        raise
    finally:
        _joined = ALONE
        with suppress(RuntimeError):  # connections may be broken
            dist.destroy_process_group()
        gc.collect()  # groups end their threads when nothing has them any more


def start(backend: str, here: World) -> None:
    """Start PyTorch's process group.

    Raises:
        InvalidInput: torchrun's environment is not sound, or a process did not come in time.
    """
    refuse_environment(here)
    try:
        dist.init_process_group(
            backend,
            store=common_store(here.rank, here.size, here.timeout),
            rank=here.rank,
            world_size=here.size,
            timeout=timedelta(seconds=here.timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise InvalidInput(
            f"Cannot train on {here.size} ranks: they did not all come within {here.timeout:g} s "
            f"({first_line_of(error)}). See that all were started with the same address and port."
        ) from None


def refuse_size(text: str) -> None:
    """Refuse a number of processes that is none: each would train alone, into one folder.

    Raises:
        InvalidInput: as said.
    """
    if text and not (text.isdecimal() and int(text) > 0):
        raise InvalidInput(
            f"Cannot train: WORLD_SIZE is {brief(repr(text))}, not a number of processes. Start "
            "with torchrun, which sets it, or unset it."
        )


def refuse_environment(here: World) -> None:
    """Refuse an environment by which these processes could not meet.

    Raises:
        InvalidInput: naming the variable.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InvalidInput(
            f"Cannot train on {here.size} ranks: WORLD_SIZE is set, but {missing[0]} is not. Start "
            "with torchrun, which sets both, or unset WORLD_SIZE."
        )
    if here.rank >= here.size:
        raise InvalidInput(
            f"Cannot train on {here.size} ranks: RANK is {here.rank}. Start with torchrun, which "
            f"gives each process a number from 0 to {here.size - 1}."
        )
    if not (port := os.environ["MASTER_PORT"]).isdecimal() or int(port) > LARGEST_PORT:
        raise InvalidInput(
            f"Cannot train on {here.size} ranks: MASTER_PORT is {brief(repr(port))}. Start with "
            f"torchrun, which sets it, or give a number up to {LARGEST_PORT}."
        )


def backend_for(device: str) -> str:
    """The backend for a device, as ``init_process_group`` takes it.

    Raises:
        InvalidInput: PyTorch was built without it.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    present = dist.is_available() and dist.is_gloo_available()
    if not present or (on_gpu and not dist.is_nccl_available()):
        name = "NCCL" if present else "gloo"
        remedy = "Use --device cpu, or a" if present else "Use a"
        raise InvalidInput(
            f"Cannot train on several ranks: this PyTorch was built without {name}. {remedy} build "
            "that has it."
        )
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def gathered(value: Any) -> list[Any]:
    """A value of every rank, by rank; all ranks must call this.

    Raises:
        LostRank: a rank does not answer.
    """
    here = world()
    if here.size == 1:
        return [value]
    values: list[Any] = [None] * here.size
    with naming_lost_ranks():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Let errors of PyTorch's communication say that a rank was lost, and why if it said so.

    Raises:
        LostRank: instead of what PyTorch raises.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRank):
            raise
        here = world()
        reason = last_words(here)
        timed_out = "imed out" in str(error) or "timeout" in str(error).lower()
        if reason:
            text = f"Cannot go on: {reason}"
        elif timed_out:
            text = (
                f"Cannot go on: another rank has not answered{within(here)}. Go on from the last "
                "saved epoch with --resume, with a larger --rank-timeout if it was busy."
            )
        else:
            text = (
                "Cannot go on: the connection to another rank was lost; it was killed or has "
                "failed. Go on from the last saved epoch with --resume."
            )
        raise LostRank(text) from error


def within(here: World) -> str:
    """The time that a rank was given, in words; nothing of a process group of a user's own."""
    return f" for {here.timeout:g} s" if here.timeout else ""


def leave_last_words(error: BaseException, here: World) -> None:
    """Tell the other ranks why this one ends, unless it ends because of them."""
    if isinstance(error, LostRank) or getattr(error, "of_all_ranks", False):
        return
    with suppress(RuntimeError):
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(STORE_TIMEOUT)
        store.set(LAST_WORDS, f"rank {here.rank} ended: {first_line_of(error)}")


def last_words(here: World) -> str | None:
    """The sentence with which another rank ended, if it left one."""
    with suppress(RuntimeError):
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(STORE_TIMEOUT)
        if store.check([LAST_WORDS]):
            return str(store.get(LAST_WORDS).decode())
    return None


def print_once(text: str, stream: TextIO | None = None) -> None:
    """Print a line on stderr, or on another stream, on the first rank alone."""
    if world().first:
        print(text, file=stream or sys.stderr, flush=True)
