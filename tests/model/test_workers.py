"""Threads for devices: every job once, on a free device, with the caller's settings; errors come out."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lrc.model.machine.workers import on_devices, side_by_side

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("devices", [[CPU], [CPU, META], [CPU, META, CPU]])
def test_every_job_is_done_once(devices):
    done: list[tuple[int, torch.device]] = []
    on_devices(list(range(20)), devices, lambda job, device: done.append((job, device)))
    assert sorted(job for job, _ in done) == list(range(20))
    assert {device for _, device in done} <= set(devices)


def test_a_device_has_one_job_at_a_time_and_none_waits_for_a_long_one():
    busy: set[torch.device] = set()
    took: dict[torch.device, int] = {CPU: 0, META: 0}
    both = threading.Event()

    def work(job: int, device: torch.device) -> None:
        assert device not in busy
        busy.add(device)
        if len(busy) == 2:
            both.set()
        assert both.wait(10), "the second device was never used"
        time.sleep(0.2 if job == 0 else 0.001)
        took[device] += 1
        busy.remove(device)

    on_devices(list(range(9)), [CPU, META], work)
    assert sorted(took.values()) == [1, 8]  # while one device has the long job, the other does all the rest


def test_threads_compute_as_their_caller_does():
    seen: list[tuple[bool, int]] = []
    with torch.no_grad():
        on_devices([1, 2], [CPU, META], lambda job, device: seen.append((torch.is_grad_enabled(), torch.get_num_threads())))
        side_by_side(lambda worker: seen.append((torch.is_grad_enabled(), torch.get_num_threads())), 2)
    assert seen == [(False, torch.get_num_threads())] * 4


def test_an_error_comes_out_and_ends_the_work():
    begun: list[int] = []

    def work(job: int, device: torch.device) -> None:
        begun.append(job)
        time.sleep(0.02)
        raise ValueError(f"job {job}")

    with pytest.raises(ValueError, match="job 0"):
        on_devices(list(range(100)), [CPU, META], work)
    assert len(begun) < 50
