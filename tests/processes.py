"""What a sweep's processes may do, as functions that a process of its own can import."""

from __future__ import annotations

import os
import signal
import time


def hold(words: list[str]) -> None:
    """Hold so many bytes for a second."""
    held = bytearray(int(words[0]))
    time.sleep(1)
    del held


def die(words: list[str]) -> None:
    """Be killed, as by a system without memory."""
    os.kill(os.getpid(), signal.SIGKILL)
