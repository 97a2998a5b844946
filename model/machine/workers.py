"""Threads that work side by side: one for each device, each with as many cores as the caller has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")


def side_by_side(work: Callable[[int], object], workers: int) -> None:
    """Call work(0) to work(workers - 1): one in this thread, several in a thread each."""
    if workers == 1:
        work(0)
        return
    with _threads(workers) as pool:
        list(pool.map(work, range(workers)))


def on_devices(jobs: Sequence[Job], devices: Sequence[torch.device], work: Callable[[Job, torch.device], object]) -> None:
    """Call work(job, device) once for every job, in order, each on the first device that is free.

    The error of the first job that fails is raised when the jobs before it are done; then no further job is begun.
    """
    if len(devices) == 1 or len(jobs) < 2:
        for job in jobs:
            work(job, devices[0])
        return
    free = deque(devices)

    def take(job: Job) -> None:
        device = free.popleft()  # there are as many threads as devices
        try:
            work(job, device)
        finally:
            free.append(device)

    with _threads(len(devices)) as pool:
        list(pool.map(take, jobs))


def _threads(count: int) -> ThreadPoolExecutor:
    """Threads with this thread's number of cores and grad mode; torch would give each all cores, and gradients."""
    cores, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def begin() -> None:
        torch.set_num_threads(cores)
        torch.set_grad_enabled(grad)

    return ThreadPoolExecutor(count, initializer=begin)
