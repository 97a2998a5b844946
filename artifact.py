"""The artifact on disk: written shard by shard, so that a run can be killed anywhere and nothing half-written looks finished.

While a run is under way the folder holds finished shards and a journal, but neither config.json nor an index: no tool takes it
for a model. Each shard is written to a temporary file, synced and renamed; then a line goes into the journal. The last file
to appear is config.json. The journal's first line is the identity of the run (recipe, model, calibration); another request is
refused with the differences.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import CheckpointError, OutputError, RequestError, ResumeError

JOURNAL = "journal.jsonl"
RECORD = "lrc.json"
INDEX = "model.safetensors.index.json"
SCHEMA = 1
_LOCK = ".lock"
_OURS = {JOURNAL, RECORD, INDEX, "config.json", "README.md", _LOCK}


@dataclass(frozen=True)
class Shard:
    """A finished shard: its file, sha256, size in bytes, tensor names, and what the run recorded with it."""

    file: str
    sha256: str
    nbytes: int
    tensors: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)


class Artifact:
    """An output folder that is being written.

    Args:
        folder: created if need be; must be empty, or hold a run of the same identity.
        identity: what this run is of; a JSON mapping. Two runs with equal identities write equal bytes.
        restart: delete a run that is there.

    Use as a context: it holds a lock on the folder. `done` maps a shard's key to the shard for everything that an earlier,
    interrupted run finished; `finished` says that the artifact is complete already.

    Raises:
        ResumeError: the folder holds a run of something else; lists the differences.
        RequestError: the folder holds foreign files, or another process is writing to it.
        OutputError: it cannot be created or written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self._restart = restart
        self.done: dict[str, Shard] = {}
        self.finished = False

    def __enter__(self) -> Artifact:
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RequestError(f"Another lrc is writing to {self.folder}.", "Wait for it, or give another --out.") from error
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / _LOCK).unlink()
        self._lock.close()

    def _open(self) -> None:
        foreign = sorted(p.name for p in self.folder.iterdir() if not _is_ours(p.name))
        ours = (self.folder / JOURNAL).exists() or (self.folder / RECORD).exists()
        if foreign and not ours:
            raise RequestError(
                f"{self.folder} holds other files ({', '.join(foreign[:3])}); lrc would mix its own with them.",
                "Give an empty or new folder as --out.",
            )
        with _writing(self.folder):
            if self._restart:
                self._clear()
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink()
            if (self.folder / RECORD).exists() and (self.folder / "config.json").exists():
                self._compare(read_record(self.folder)["identity"])
                self.finished = True
            elif (self.folder / JOURNAL).exists():
                self._read_journal()
            else:
                self._append({"identity": self.identity})

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _compare(self, other: Mapping[str, Any]) -> None:
        differences = list(_differences(other, self.identity))
        if differences:
            raise ResumeError(str(self.folder), differences)

    def _read_journal(self) -> None:
        path = self.folder / JOURNAL
        lines = path.read_bytes().splitlines(keepends=True)
        entries, length = [], 0
        for line in lines:  # a kill may leave half a line at the end
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
            if not line.endswith(b"\n"):
                break
            length += len(line)
        if length < sum(map(len, lines)):
            os.truncate(path, length)
            entries = entries[: sum(1 for line in lines if line.endswith(b"\n"))]
        if not entries:
            self._append({"identity": self.identity})
            return
        self._compare(entries[0]["identity"])
        for entry in entries[1:]:
            shard = Shard(entry["file"], entry["sha256"], entry["nbytes"], tuple(entry["tensors"]), entry["record"])
            file = self.folder / shard.file
            if file.is_file() and file.stat().st_size == shard.nbytes:
                self.done[entry["key"]] = shard

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self.folder / JOURNAL).open("ab") as journal:
            journal.write(json.dumps(entry).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        _sync_folder(self.folder)

    def require_space(self, nbytes: int) -> None:
        """Refuse before any work if `nbytes` more do not fit on the disk."""
        free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            raise OutputError(
                f"{self.folder} has {free / 1e9:.2f} GB free; the result needs {nbytes / 1e9:.2f} GB.",
                "Free some space, or give an --out on another disk.",
            )

    def write(self, key: str, file: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Shard:
        """Commit one shard: temporary file, sync, rename, journal."""
        path = self.folder / file
        with _writing(path):
            temporary = path.with_name(path.name + ".tmp")
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
            _sync_file(temporary)
            shard = Shard(file, sha256_of(temporary), temporary.stat().st_size, tuple(tensors), dict(record))
            temporary.rename(path)
            _sync_folder(self.folder)
            self._append({"key": key, "file": file, "sha256": shard.sha256, "nbytes": shard.nbytes,
                          "tensors": shard.tensors, "record": shard.record})  # fmt: skip
        self.done[key] = shard
        return shard

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of a finished shard."""
        return read_shard(self.folder, self.done[key])

    def finish(self, config: Mapping[str, Any], record: Mapping[str, Any], card: str, files: Mapping[str, bytes]) -> None:
        """Write everything else; config.json appears last, and the journal goes."""
        shards = self.done.values()
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": {name: shard.file for shard in sorted(shards, key=lambda s: s.file) for name in shard.tensors},
        }
        whole = dict(record) | {
            "schema": SCHEMA,
            "identity": self.identity,
            "shards": {shard.file: {"sha256": shard.sha256, "nbytes": shard.nbytes} for shard in shards},
        }
        with _writing(self.folder):
            for name, content in files.items():
                self._put(name, content)
            self._put("README.md", card.encode())
            self._put(INDEX, _json(index))
            self._put(RECORD, _json(whole))
            self._put("config.json", _json(config))
            (self.folder / JOURNAL).unlink()
        self.finished = True

    def withdraw(self) -> None:
        """Make a finished artifact look unfinished again (its check failed): config.json is set aside."""
        with _writing(self.folder):
            (self.folder / "config.json").rename(self.folder / "config.json.rejected")

    def _put(self, name: str, content: bytes) -> None:
        temporary = self.folder / (name + ".tmp")
        temporary.write_bytes(content)
        _sync_file(temporary)
        temporary.rename(self.folder / name)
        _sync_folder(self.folder)


def read_record(folder: Path) -> dict[str, Any]:
    """`lrc.json` of a finished artifact.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        unfinished = (
            " (a run was interrupted here: the same `lrc compress` command continues it)" if (folder / JOURNAL).exists() else ""
        )
        raise CheckpointError(f"{folder} holds no {RECORD}{unfinished}.", "Give the --out folder of a finished `lrc compress`.")
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if record["schema"] > SCHEMA:
            raise CheckpointError(f"{path} has schema {record['schema']}; this lrc reads up to {SCHEMA}.", "Upgrade lrc.")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}", "Write the artifact again.") from error
    return record


def read_shard(folder: Path, shard: Shard) -> dict[str, Tensor]:
    """All tensors of a shard, copied out of the file."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(folder / shard.file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / shard.file} cannot be read: {error}", "Start over with --restart.") from error


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_ours(name: str) -> bool:
    return (
        name in _OURS or name.endswith((".tmp", ".rejected")) or (name.startswith("model-") and name.endswith(".safetensors"))
    )


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
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


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: it has {_short(old)}, you asked for {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
