"""How the C library hands out memory. On a CPU this can cost more than what is computed with it."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # names and numbers of glibc's mallopt(3)
PADDING = 1 << 26  # bytes that the heap grows by at once


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for its next tensors, instead of giving it back to the system.

    By default glibc maps every large tensor anew, and the system fills its pages with zeros at the first touch: for a map of
    some 30 MB five times the time of an operation that writes it. Kept, memory is only touched once; in exchange the process
    stays as large as it ever was, and its largest size grows by what lies unused between blocks (docs/log.md, 2026-11-23).

    Returns:
        Whether the C library could be told so; only glibc can.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - another C library has no such function
        settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, PADDING), (M_ARENA_MAX, 1))
        return min(library.mallopt(*setting) for setting in settings) == 1
    return False
