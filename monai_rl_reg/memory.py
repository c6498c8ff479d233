"""What the C library does with memory that was freed, and when Python looks for some that could be."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30
"""Bytes of freed memory that a process holds on to before it gives any back."""
LARGE = 32 << 20
"""Blocks of more bytes are given back at once: the largest that glibc allows."""


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
