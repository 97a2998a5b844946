"""Weights are read from the disk into the system's cache before they are asked for, while the processor computes.

Nothing is kept: whoever needs the weights reads them as always, and finds them in memory. The system's own advice for this
(`posix_fadvise`) is heeded for the first few hundred kilobytes only.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PIECE = 4 << 20  # bytes that are read at once, into the same memory


@dataclass(frozen=True)
class Extent:
    """Bytes of a file: `length` of them from byte `start` on."""

    path: Path
    start: int
    length: int


class ReadAhead:
    """Reads what was asked for last, in a thread."""

    def __init__(self) -> None:
        self._outdated = threading.Event()

    def begin(self, extents: Sequence[Extent]) -> threading.Thread:
        """Read these bytes from now on, and no longer what was asked for before; the thread that does so."""
        self._outdated.set()
        self._outdated = threading.Event()
        thread = threading.Thread(target=_read, args=(extents, self._outdated), daemon=True)
        thread.start()
        return thread


def _read(extents: Sequence[Extent], outdated: threading.Event) -> None:
    piece = memoryview(bytearray(_PIECE))
    try:
        for extent in extents:
            with extent.path.open("rb", buffering=0) as file:
                file.seek(extent.start)
                left = extent.length
                while left > 0 and not outdated.is_set() and (got := file.readinto(piece[:left])):
                    left -= got
    except OSError:  # whoever needs the bytes reads them again, and says what is wrong
        return
