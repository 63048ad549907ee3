"""How ``torchrun`` started this process, read from the environment. No torch."""

import os


def number(name: str, default: int) -> int:
    """A whole number of the environment."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def launched_size() -> int:
    """Number of processes that were started together; 1: this one alone."""
    return number("WORLD_SIZE", 1)


def launched_rank() -> int:
    """Number of this process among them, from 0."""
    return number("RANK", 0)


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return launched_rank() == 0


def launched_local_rank() -> int:
    """Number of this process among those on its machine, from 0."""
    return number("LOCAL_RANK", launched_rank())


def restarts() -> int:
    """How often ``torchrun --max-restarts`` has started the processes again."""
    return number("TORCHELASTIC_RESTART_COUNT", 0)
