"""A CPU's memory: how much is free, and whether freed memory is kept.

Handing it out can cost more than what is computed with it.
"""

import contextlib
import ctypes
import os
from pathlib import Path

# names and numbers of glibc's mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
PADDING = 1 << 26  # bytes that the heap grows by at once


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its next tensors, in large pages.

    By default glibc maps every large tensor anew, and the system fills its pages with zeros at the
    first touch: for a map of some 30 MB five times the time of an operation that writes it. Kept,
    memory is only touched once; in exchange the process stays as large as it ever was, and its
    largest size grows by what lies unused between blocks (docs/log.md, 2026-11-23). Large pages are
    asked for by ``THP_MEM_ALLOC_ENABLE``, which PyTorch reads at the first tensor that it makes, so
    call this before.

    Returns:
        Whether the C library could be told so; only glibc can.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - another C library has no such function
        settings = (
            (M_MMAP_MAX, 0),
            (M_TRIM_THRESHOLD, 2**31 - 1),
            (M_TOP_PAD, PADDING),
            (M_ARENA_MAX, 1),
        )
        return min(library.mallopt(*setting) for setting in settings) == 1
    return False


def free_memory(system: Path = Path("/")) -> int | None:
    """Bytes that this process can still use without swapping; None where unknown (not Linux).

    The least of what the machine has left (``MemAvailable``) and what its control group, such as a
    container, may still take.
    """
    with contextlib.suppress(OSError, ValueError, StopIteration):
        free = 1024 * entry(system / "proc/meminfo", "MemAvailable:")
        # no groups, or one without a limit, which says "max"
        with contextlib.suppress(OSError, ValueError, StopIteration):
            for group in control_groups(system):
                free = min(free, left_in(group, free))
        return max(free, 0)
    return None


def control_groups(system: Path) -> list[Path]:
    """The folders of this process's control group and of those that hold it, each with a limit."""
    root = system / "sys/fs/cgroup"
    own = ""
    with contextlib.suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                own = line.removeprefix("0::/")
    return [root / own, *(root / part for part in Path(own).parents)] if own else [root]


def left_in(group: Path, free: int) -> int:
    """Bytes that a control group may still take; ``free`` where it has no limit."""
    try:
        limit, taken = (
            int((group / name).read_text()) for name in ("memory.max", "memory.current")
        )
        # contents of files, which are given up first
        return limit - taken + entry(group / "memory.stat", "inactive_file")
    except (OSError, ValueError, StopIteration):  # a group without a limit says "max"
        return free


def entry(path: Path, name: str) -> int:
    """A number of a file that has a name and a number in each line."""
    words = (line.split() for line in path.read_text().splitlines())
    return next(int(word[1]) for word in words if word[:1] == [name])
