"""Writing files so that a kill, a full disk or a second process cannot leave something that looks finished and is not."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from ..errors import CheckpointError, OutputError, RequestError

PARTIAL = ".lrc-partial"
T = TypeVar("T")


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locked(path: Path) -> IO[str]:
    """An exclusive lock by a file, held until it is closed (or the process dies).

    Raises:
        RequestError: another process holds it.
    """
    while True:
        with contextlib.ExitStack() as unless_held:
            lock = unless_held.enter_context(path.open("w"))
            if not claimed(lock, fcntl.LOCK_EX):
                raise RequestError(f"Another lrc is writing to {path.parent}.", "Wait for it, or give another --out.")
            # the holder before us may have deleted the file that we have just locked
            if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                unless_held.pop_all()
                return lock


def claimed(lock: IO[str], kind: int) -> bool:
    """Take a lock of this kind (`fcntl.LOCK_SH`, `LOCK_EX`) in the place of one that is held; False where others forbid it."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that becomes it if all goes well, and goes if not (a full disk needs the space).

    It is the process's own: two that find the same thing at one moment each put it down whole.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # where all went well it bears its final name


def clear_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written; nobody else may write there now."""
    for leftover in folder.glob("*" + PARTIAL):
        leftover.unlink()


def read_json(path: Path, shape: type[T]) -> T | None:
    """What a JSON file holds that an earlier run left; None where there is none.

    Args:
        shape: its type: a dataclass, or built-in ones inside each other, as `write_json` was given.

    Raises:
        CheckpointError: it is damaged, or holds something else.
    """
    try:
        return TypeAdapter(shape).validate_python(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
        raise CheckpointError(f"{path} cannot be read: {reason}", "Delete it: what it held is found anew.") from error


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value for `read_json`, whole or not at all.

    Args:
        value: of built-in types and dataclasses.
        indent: where people read the file.

    Raises:
        OutputError: no space, or the folder cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(value, indent=indent, default=dataclasses.asdict) + "\n")


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into errors that say what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        text = str(error)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text:
            remedy = "Free some space and run the same command again: it goes on after the last finished shard."
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "Give an --out folder that you may write to."
        elif code in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            remedy = "Give a folder, not a file, as --out."
        else:
            remedy = "Mend that and run the same command again: it goes on after the last finished shard."
        raise OutputError(f"Cannot write {path}: {text}", remedy) from error
