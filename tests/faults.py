"""A command that is disturbed at its n-th change to a folder: killed, or told that the disk is full."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from commandline import run_lrc

import lrc.checkpoint.artifact
import lrc.checkpoint.atomic

_CREATES = ("os.rename", "os.mkdir")
_REMOVES = ("os.remove", "os.rmdir", "os.truncate")


def killed_before(operation: int, folder: Path, arguments: list[object]) -> bool:
    """Run the command in a child that is killed before its n-th change to `folder`; False if it was done earlier.

    Every creation, renaming, shortening and removal of a file or folder counts, and every writing of a safetensors file: there
    the child is killed in the middle, when the library has made its own temporary file. SIGKILL leaves no room for clean-up.
    """

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    code, _ = _in_child(operation, folder, arguments, die, full=False)
    assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), f"exit {code} before operation {operation}"
    return code != 0


def disk_full_before(operation: int, folder: Path, arguments: list[object]) -> tuple[int, str, bool]:
    """Run the command in a child for which the disk of `folder` is full from its n-th change on.

    Returns:
        Its exit code, its stderr, and whether it came to that change.
    """
    met = mmap.mmap(-1, 1)  # shared with the child

    def full() -> None:
        met[0] = 1
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    code, said = _in_child(operation, folder, arguments, full, full=True)
    return code, said, met[0] == 1


def run_in_child(told: int, arguments: list[object], first: Callable[[], object]) -> NoReturn:
    """Run a command in a forked process and end it: stderr, or the traceback of a bug (exit code 70), goes into a pipe.

    Args:
        told: the pipe.
        arguments: of the command.
        first: called before the command.
    """
    try:
        first()
        result = run_lrc(*arguments)
        os.write(told, result.err.encode()[-8000:])
        os._exit(result.code)
    except BaseException:  # noqa: BLE001 (a child of pytest must never return into it)
        os.write(told, traceback.format_exc().encode()[-8000:])
        os._exit(70)


def _in_child(
    operation: int, folder: Path, arguments: list[object], disturb: Callable[[], None], full: bool
) -> tuple[int, str]:
    """(Exit code, stderr) of the command; 70 for a traceback, which stderr holds."""
    said, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(said)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        run_in_child(told, arguments, lambda: _disturbed(operation, folder, disturb, full))
    os.close(told)
    deadline = time.monotonic() + 300
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"the run hangs before operation {operation}")
        time.sleep(0.002)
    with os.fdopen(said, "rb") as pipe:
        return os.waitstatus_to_exitcode(ended[1]), pipe.read().decode()


def _place(event: str, args: tuple) -> str:
    """The path of an event; `shutil.rmtree` names what it removes relative to an open folder."""
    if event in ("os.remove", "os.rmdir") and args[1] >= 0:
        return f"{os.readlink(f'/proc/self/fd/{args[1]}')}/{args[0]}"
    return str(args[0])


def _disturbed(operation: int, folder: Path, disturb: Callable[[], None], full: bool) -> None:
    """Disturb this process at its n-th change to the folder; where the disk is full, at every later creation, too."""
    seen = 0

    def audit(event: str, args: tuple) -> None:
        nonlocal seen
        if event not in (*_CREATES, *_REMOVES, "open"):
            return
        creates = event in _CREATES or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (creates or event in _REMOVES) and _place(event, args).startswith(str(folder)):
            seen += 1
            if seen == operation or (full and creates and seen > operation):
                disturb()

    def counted(save: Callable[..., None]) -> Callable[..., None]:
        def counted_save(tensors: Any, path: Any, *rest: Any, **more: Any) -> None:
            nonlocal seen
            seen += str(path).startswith(str(folder))
            if seen == operation or (full and seen > operation):
                # its own writes are not Python's: the limit ends them after 8 bytes
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN if full else signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (8, resource.RLIM_INFINITY))
            save(tensors, path, *rest, **more)

        return counted_save

    for module in (lrc.checkpoint.artifact, lrc.checkpoint.atomic):
        module.save_file = counted(module.save_file)
    sys.addaudithook(audit)
