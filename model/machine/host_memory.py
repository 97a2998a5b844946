"""Resident memory of this process: its high-water mark, and giving freed memory back."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

import psutil


def peak_rss(child: int | None = None) -> int:
    """Peak resident memory of this process, or of a running child, in bytes; 0 for a child that has ended.

    `getrusage` is only the fallback: on Linux it starts a child's count with its parent's memory.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{child or 'self'}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    if child is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(child).memory_info().rss)
    return 0


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps freed memory, and the peak would grow from layer to layer."""
    with contextlib.suppress(AttributeError, OSError):  # another C library has no malloc_trim and no such habit
        ctypes.CDLL(None).malloc_trim(0)


def steady_memory() -> None:
    """Let glibc keep freed memory for the next batch; `give_back` returns it when a layer is done.

    By default glibc maps a large block when it is allocated and unmaps it when it is freed, and the system has to clear its
    pages each time: with every activation above 1 MiB, forward and backward passes of a small model took 1.5 times as long.
    glibc adapts these thresholds at run time; they are fixed here. Memory freed so far (a tokenizer leaves some 150 MB) is
    returned at once.
    """
    give_back()
    with contextlib.suppress(AttributeError, OSError):  # another C library has no such settings
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, 64 << 20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
