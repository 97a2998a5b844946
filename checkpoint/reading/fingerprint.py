"""What a checkpoint's weights are: a sha256 over every byte of its files, which is computed once per file and remembered.

A run compares it with that of the run that it continues, and statistics with that of the model that they were collected on. A
file's hash is kept in a small file under the user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`), under the file's
device, inode, size, time of change and time of the inode's change. A file that was written since has another inode-change
time, which no program can set; so a second run on a checkpoint of 140 GB does not read it again. Nothing here orders times.

Names of files in the hub's cache are their hashes, as the hub states them. They are not taken instead of reading: a program
that writes to a snapshot writes through its link into the blob, and the name stays. A run reads every byte anyway. The name
tells something else: a blob that does not hash to its name was damaged after its download.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...errors import CheckpointError, LrcError
from ..atomic import read_json, sha256_of, write_json

Tell = Callable[[int, int], None]  # (files done, files in all)
_SETTLED = 2.0  # seconds: clocks of file systems tick as slowly; a younger file could change again within one tick
_MOST = 4096  # files that are remembered
_AT_ONCE = 4  # files that are read at a time
_BLOB = re.compile(r"[0-9a-f]{64}")
_known: dict[str, str] = {}  # of this process; also where the cache folder cannot be written
_guard = threading.Lock()


def fingerprint(files: Sequence[Path], tell: Tell = lambda done, total: None) -> str:
    """sha256 over the names, sizes and sha256s of some files.

    Args:
        files: in any order.
        tell: called after each file that was read.

    Raises:
        CheckpointError: a file cannot be read, changes meanwhile, or is a damaged file of the hub's cache.
    """
    digest = hashlib.sha256()
    found = _sha256s(files, tell)
    for path in sorted(files):
        digest.update(f"{path.name}\n{path.stat().st_size}\n{found[path]}\n".encode())
    return digest.hexdigest()


def unread_bytes(files: Iterable[Path]) -> int:
    """How many bytes of these files `fingerprint` would read; reads none of them."""
    known = _remembered()
    return sum(path.stat().st_size for path in files if _key(path) not in known)


def _sha256s(files: Sequence[Path], tell: Tell) -> dict[Path, str]:
    known = _remembered()
    found = {path: known[key] for path in files if (key := _key(path)) in known}
    missing = [path for path in files if path not in found]
    if not missing:
        return found
    fresh: dict[str, str] = {}
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        for done, (path, (lasting, sha256)) in enumerate(zip(missing, pool.map(_read, missing), strict=True), 1):
            found[path] = sha256
            if lasting is not None:
                fresh[lasting] = sha256
            tell(done, len(missing))
    _remember(fresh)
    return found


def _read(path: Path) -> tuple[str | None, str]:
    """(Key under which a file's hash may be remembered, sha256)."""
    try:
        before, started = _key(path), time.time()
        sha256 = sha256_of(path)
        changed = path.stat().st_ctime
        if _key(path) != before:
            raise CheckpointError(f"{path} changes while it is read.", "Wait until it is written, and start again.")
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error}", "Download or copy that file again.") from error
    real = path.resolve()
    if real.parent.name == "blobs" and _BLOB.fullmatch(real.name) and real.name != sha256:
        raise CheckpointError(
            f"{path} was changed or damaged after its download: its sha256 is {sha256}, the hub's is {real.name}.",
            f"Delete {real} and start again: it is downloaded anew.",
        )
    return (before if changed + _SETTLED < started else None), sha256


def _key(path: Path) -> str:
    found = path.stat()
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _store() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # a relative path is to be ignored (XDG Base Directory Specification)
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "lrc" / "fingerprints.json"


def _remembered() -> dict[str, str]:
    held: dict[str, str] = {}
    with contextlib.suppress(LrcError, RuntimeError):  # damaged, not readable, or no home folder: the files are read again
        held = read_json(_store(), dict[str, str]) or {}
    with _guard:
        return held | _known


def _remember(fresh: dict[str, str]) -> None:
    with _guard:
        _known.update(fresh)
    if fresh:
        with contextlib.suppress(LrcError, RuntimeError):  # not writable: the next run reads the files again
            write_json(_store(), dict(list((_remembered() | fresh).items())[-_MOST:]))
