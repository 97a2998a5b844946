"""Writing files so that a killed run, a full disk or a second process cannot leave a file that looks finished and is not."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from ..errors import CheckpointError, OutputError, RequestError

PARTIAL = ".lrc-partial"
# A file that begins with its own digest: the sha256 of the file with 64 zeros in place of the digest. It shows accidents to any
# byte; whoever forges the file can compute another one.
_UNSIGNED = "0" * 64
_DIGEST = re.compile(rb'\A\{\n  "digest": "([0-9a-f]{64})"')
T = TypeVar("T")


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locked(path: Path) -> IO[str]:
    """Take an exclusive lock on a file; it is held until the returned file is closed or the process ends.

    Raises:
        RequestError: another process holds it.
    """
    while True:
        with contextlib.ExitStack() as unless_held:
            lock = unless_held.enter_context(path.open("w"))
            if not claimed(lock, fcntl.LOCK_EX):
                raise RequestError(f"Another lrc is writing to {path.parent}.", "Wait for it, or give another --out.")
            # the previous holder may have deleted the file that this process has just locked
            if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                unless_held.pop_all()
                return lock


def claimed(lock: IO[str], kind: int) -> bool:
    """Take a lock of this kind (`fcntl.LOCK_SH`, `LOCK_EX`), replacing one that is held; False if others prevent it."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to `path` at the end; deleted if an error occurs (a full disk needs the space).

    Its name contains the process's id, so two processes that write the same file at the same time both write it completely.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after a success the temporary name no longer exists


def clear_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes; no other process may be writing to the folder."""
    for leftover in folder.glob("*" + PARTIAL):
        leftover.unlink()


def read_json(path: Path, shape: type[T]) -> T | None:
    """The content of a JSON file that an earlier run wrote with `write_json`; None if there is no such file.

    Args:
        shape: the type of the content: a dataclass, or built-in types, nested.

    Raises:
        CheckpointError: the file is damaged, or its content has another type.
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
        raise CheckpointError(f"{path} cannot be read: {reason}", "Delete it: its content is computed again.") from error


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value for `read_json`, completely or not at all.

    Args:
        value: of built-in types and dataclasses, nested.
        indent: spaces per level, for files that people read.

    Raises:
        OutputError: no space, or the folder cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(value, indent=indent, default=dataclasses.asdict) + "\n")


def unique_json(text: bytes | str) -> Any:
    """A JSON value in which no object has a key twice; two readers could take different ones of them.

    Raises:
        ValueError: it is not JSON, or has a key twice.
    """

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in entries:
            if key in found:
                raise ValueError(f"the key '{key[:200]}' stands there twice")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=pairs)


def signed_json(value: Mapping[str, Any]) -> bytes:
    """A JSON text for people that begins with its own digest, under the key `digest`."""
    text = (
        json.dumps({"digest": _UNSIGNED} | {key: held for key, held in value.items() if key != "digest"}, indent=2) + "\n"
    ).encode()
    return text.replace(_UNSIGNED.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def own_digest_fits(text: bytes) -> bool | None:
    """Whether a text of `signed_json` still has the digest that it begins with; None if it begins with none."""
    found = _DIGEST.match(text)
    if found is None:
        return None
    unsigned = text[: found.start(1)] + _UNSIGNED.encode() + text[found.end(1) :]
    return hashlib.sha256(unsigned).hexdigest() == found[1].decode()


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors into an `OutputError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        text = str(error)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text:
            remedy = "Free some space and run the same command again: it continues after the last finished shard."
        elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "Give an --out folder that you may write to."
        elif code in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            remedy = "Give a folder, not a file, as --out."
        else:
            remedy = "Fix that and run the same command again: it continues after the last finished shard."
        raise OutputError(f"Cannot write {path}: {text}", remedy) from error
