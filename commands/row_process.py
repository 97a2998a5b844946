"""A process for each command of a sweep's rows, started without importing the libraries each time.

A plain `python -m lrc.cli` imports for five seconds of a core, twice a row: a row of a tiny model took 13 to 18 s that way, and
1.2 s this way. Where it is safe, on Linux without an accelerator, the processes are forked from one that has imported the
libraries and done nothing else (multiprocessing's fork server).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import runpy
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import SweepError
from ..model.machine.host_memory import peak_rss

# What `lrc compress` and `lrc eval` import. The fork server ignores a name that does not exist; a test does not.
IMPORTS = ("lrc.run.pipeline", "lrc.evaluation.evaluate", "transformers.modeling_layers")
_LAST_LINES = 12
_LOOK = 0.2  # seconds between two looks at how much memory a process takes
_processes = threading.Lock()  # multiprocessing polls all children when one is started, which is not safe in two threads


def run(words: Sequence[str], log: Path, module: str = "lrc.cli") -> tuple[float, int]:
    """Run a command line to its end in a process of its own: (seconds, peak resident bytes).

    Args:
        words: the command line, without the program's name.
        log: what the process prints is added to this file.
        module: run as a program.

    Raises:
        SweepError: it failed; its last lines say why.
    """
    # a device cannot be used by a process that was forked after it was looked for, and importing may look
    forked = sys.platform == "linux" and not torch.accelerator.is_available()
    context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
    context.set_forkserver_preload(list(IMPORTS))
    process = context.Process(target=_program, args=(module, list(words), log))
    log.touch()
    started, peak = time.perf_counter(), 0
    with _processes:
        process.start()
    while True:
        peak = max(peak, peak_rss(process.pid))  # the system tells it of running processes only
        multiprocessing.connection.wait([process.sentinel], _LOOK)
        with _processes:
            if process.exitcode is not None:
                break
    if process.exitcode:
        last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        if process.exitcode < 0:  # it was killed and could not print why
            last.append(f"The process was ended by signal {-process.exitcode}; the system sends signal 9 when memory runs out.")
        raise SweepError({log.stem: "\n".join(last)})
    return time.perf_counter() - started, peak


def _end_with_parent() -> None:
    """End this process when the one that began it ends: left alone, it would work in a folder that the next sweep needs."""
    if (parent := multiprocessing.parent_process()) is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _program(module: str, words: list[str], log: Path) -> None:
    """In the process: run a module as `python -m` does; what it prints is added to the log."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")
