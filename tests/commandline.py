"""The command line, run inside the test's process: a start of its own costs seconds, a bug still shows its traceback."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from lrc.cli import main


@dataclass(frozen=True)
class Result:
    """What a person sees of a finished command: its results, its messages, and both in the order in which they came."""

    code: int
    out: str
    err: str
    printed: str

    @property
    def told(self) -> str:
        """What lrc said of the error itself, after the plan and the progress."""
        return self.err[self.err.find("lrc: ") :] if self.err.startswith("lrc: ") else self.err[self.err.find("\nlrc: ") + 1 :]


class _Stream(io.StringIO):
    """A stream that also writes into another one, which it shares with its twin."""

    def __init__(self, both: io.StringIO) -> None:
        super().__init__()
        self._both = both

    def write(self, text: str) -> int:
        self._both.write(text)
        return super().write(text)


def run_lrc(*arguments: object) -> Result:
    """Run `lrc ARGUMENTS`; anything but a clean exit (a bug) is raised."""
    both = io.StringIO()
    out, err = _Stream(both), _Stream(both)
    code = 0
    with (
        mock.patch.object(sys, "argv", ["lrc", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return Result(code, out.getvalue(), err.getvalue(), both.getvalue())


def lrc_ok(*arguments: object) -> str:
    """Run `lrc ARGUMENTS`, which must succeed; what it printed, results and messages."""
    result = run_lrc(*arguments)
    assert result.code == 0, result.err
    return result.printed


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder with its sha256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def untouched(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file under a folder with its inode and time of change: equal only if nothing was written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
