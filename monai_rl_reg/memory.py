"""How much memory there is, what the C library does with what was freed, and when Python looks for such."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30
"""Bytes of freed memory that a process holds on to before it gives any back."""
LARGE = 32 << 20
"""Blocks of more bytes are given back at once: the largest that glibc allows."""

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where Linux says what a container or a cluster's job may use, and what it does."""


def available_memory() -> int:
    """Return how many bytes this process may still take: of the machine, or of its container or job."""
    free = int(psutil.virtual_memory().available)
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the limit is "max"
            free = min(free, max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return free


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for the next step or pair: volumes of a brain are made by the hundred.

    glibc gives them back to the system, which hands them out anew page by page: a tenth of a registration's time.
    Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc; TypeError: Windows
        return
    mallopt(M_TRIM_THRESHOLD, KEPT)
    mallopt(M_MMAP_THRESHOLD, LARGE)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without the garbage collector, which goes through all that is there again and again, and finds nothing.

    A fifth of the start of torch and MONAI. What they left is not looked at later either. Where torch was there before,
    the collector is left alone: it is no longer imports alone that it would miss.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
