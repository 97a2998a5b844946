"""Resident memory of this process: its high-water mark, and giving freed memory back."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

import psutil


def peak_rss(child: int | None = None) -> int:
    """The largest resident memory that this process, or a child that is running, has had, in bytes; 0 of a child that ended.

    Linux counts in `getrusage` what a child's parent held when it was started.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{child or 'self'}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    if child is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(child).memory_info().rss)
    return 0


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what was freed, and the peak would grow from layer to layer."""
    with contextlib.suppress(AttributeError, OSError):  # another C library has no malloc_trim and no such habit
        ctypes.CDLL(None).malloc_trim(0)


def steady_memory() -> None:
    """Hold memory for the next batch, and give it back when a layer is done (`give_back`).

    A block that is mapped when it is made and unmapped when it is freed comes back as pages that the system has to clear: with
    every activation of more than 1 MiB treated so, forwards and backward passes of a small model took half as long again. What
    glibc does by itself depends on what was freed before; here it is said. What was freed before (a tokenizer leaves some
    150 MB) goes back at once.
    """
    give_back()
    with contextlib.suppress(AttributeError, OSError):  # another C library has no such settings
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 64 << 20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
