"""Compiled loops in as many threads as torch has, which are started once: that takes longer than most of these loops."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_numba() -> bool:
    """Whether numba, which compiles such loops, is installed."""
    return find_spec("numba") is not None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of the threads


def in_threads(count: int, work: Callable[[int, int], None], least: int = 1) -> None:
    """Call `work(first, last)` on equal parts of range(count), at once.

    Args:
        work: releases the interpreter's lock while it computes.
        least: fewer than twice as many are done by the calling thread alone.
    """
    threads = min(torch.get_num_threads(), max(1, count // least))
    edges = [count * part // threads for part in range(threads + 1)]
    others = [_pool(threads).submit(work, edges[part], edges[part + 1]) for part in range(1, threads)]
    work(0, edges[1])
    for each in others:
        each.result()
