"""Writing files so that a killed run, a full disk or a second process cannot leave a file that looks finished and is not.

Every file that a later step reads carries checksums: a JSON file the sha256 of its content, a safetensors file that of each
tensor and of its metadata. A flipped bit is an error that names the file, never another number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, OutputError, RequestError, brief
from .untrusted.files import size_of

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
    """A temporary file, renamed to `path` at the end; deleted if an error occurs (a full disk needs the space).

    It is in a folder of its own beside `path`: safetensors writes `.tmpXXXXXX` beside the file that it is asked for, and a
    process that is killed meanwhile leaves it. The folder's name contains the process's id, so two processes that write the
    same file at the same time both write it completely.
    """
    folder = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        folder.mkdir(exist_ok=True)
        temporary = folder / path.name
        yield temporary
        follow_umask(temporary)
        temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_space(folder: Path, nbytes: int, what: str, remedy: str) -> None:
    """Refuse, before any work, if the disk of a folder has no room for `nbytes` more.

    Args:
        folder: it exists, or a folder above it does.
        nbytes: that are needed.
        what: what needs them, with its verb: "the result needs".
        remedy: besides freeing space.

    Raises:
        OutputError: there is too little free space.
    """
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(standing).free) < nbytes:
        raise OutputError(
            f"{standing} has {free / 1e6:,.1f} MB free; {what} {nbytes / 1e6:,.1f} MB.", f"Free some space, or {remedy}."
        )


def follow_umask(path: Path) -> None:
    """Give a file the mode that a new file has here; libraries write weights for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def clear_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes; no other process may be writing to the folder."""
    for leftover in folder.glob("*" + PARTIAL):
        remove(leftover)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def discard(folder: Path) -> None:
    """Delete a folder. A process that is killed meanwhile leaves a temporary name, which `clear_leftovers` beside it deletes.

    Raises:
        OSError: it cannot be deleted.
    """
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.{os.getpid()}{PARTIAL}")
        if doomed.exists():
            remove(doomed)
        shutil.rmtree(folder.rename(doomed))


def checksum(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def read_json(path: Path, shape: type[T]) -> T | None:
    """The content of a JSON file that an earlier run wrote with `write_json`; None if there is no such file.

    Args:
        shape: the type of the content: a dataclass, or a dictionary of built-in types, nested.

    Raises:
        CheckpointError: the file is damaged, was changed by hand, or its content has another type.
    """
    size_of(path)  # refuses a FIFO, which would be waited for
    try:
        held = json.loads(path.read_bytes())
        if not isinstance(held, dict) or "sha256" not in held:
            raise ValueError("it has no checksum")
        if held.pop("sha256") != checksum(json.dumps(held)):
            raise ValueError("its content has changed since it was written (sha256)")
        return TypeAdapter(shape).validate_python(held)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = brief(str(error))
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{brief('.'.join(map(str, first['loc']))) or 'all of it'}: {first['msg']}"
        raise CheckpointError(f"{path} cannot be read: {reason}", "Delete it: its content is computed again.") from error


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value for `read_json`, completely or not at all, with a checksum under the key `sha256`.

    Args:
        value: a dictionary or a dataclass; within it built-in types and dataclasses, nested.
        indent: spaces per level, for files that people read.

    Raises:
        OutputError: no space, or the folder cannot be written.
    """
    content = json.loads(json.dumps(value, default=dataclasses.asdict))
    content |= {"sha256": checksum(json.dumps(content))}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=indent) + "\n")
            sync_file(temporary)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, sync: bool = False
) -> None:
    """Write a safetensors file for `checked_tensors`, completely or not at all.

    Args:
        tensors: of any dtype, on any device.
        metadata: further entries of the file's header.
        sync: wait until the file is on the disk. Without, a power cut can leave it damaged, which its checksums tell.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    record = dict(metadata or {}) | {"sha256": json.dumps({name: _digest(tensor) for name, tensor in held.items()})}
    record["checksum"] = checksum(json.dumps(record, sort_keys=True))
    with replacing(path) as temporary:
        save_file(held, temporary, record)
        if sync:
            sync_file(temporary)


class CheckedTensors:
    """An open file of `write_tensors`."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.metadata: dict[str, str] = dict(file.metadata() or {})
        if self.metadata.pop("checksum", None) != checksum(json.dumps(self.metadata, sort_keys=True)):
            raise ValueError("its header has changed since it was written, or is of an earlier lrc (sha256)")
        self._sha256: dict[str, str] = json.loads(self.metadata.pop("sha256"))
        if set(file.keys()) != set(self._sha256):
            raise ValueError("it holds other tensors than were written")

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._sha256)

    def get(self, name: str) -> Tensor:
        """A copy of a tensor, on the CPU.

        Raises:
            ValueError: it has changed since it was written.
        """
        tensor: Tensor = self._file.get_tensor(name).clone()
        if _digest(tensor) != self._sha256[name]:
            raise ValueError(f"'{name}' has changed since it was written (sha256)")
        return tensor


@contextlib.contextmanager
def checked_tensors(path: Path, remedy: str) -> Iterator[CheckedTensors]:
    """A file that `write_tensors` wrote; wrap only the reading in it.

    Args:
        remedy: what to do about a damaged file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            yield CheckedTensors(file)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", remedy) from error


def _digest(tensor: Tensor) -> str:
    """sha256 of a tensor on the CPU: of its dtype, its shape and its numbers."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text, completely or not at all.

    Raises:
        OutputError: no space, or the folder cannot be written.
    """
    with writing(path), replacing(path) as temporary:
        temporary.write_text(text)
        sync_file(temporary)


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
