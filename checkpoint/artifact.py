"""The artifact on disk. It is written shard by shard, so that a run can be killed at any time and still never looks finished.

During a run the folder holds the finished shards and a journal, but no config.json, so no tool takes it for a model. Each shard
is written to a temporary file, synced and renamed; then a line is appended to the journal. config.json appears last, and only
after the result was checked. The journal's first line is the identity of the run (recipe, model, calibration); a different
request is refused, and the message lists the differences.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, OutputError, RequestError, ResumeError
from .atomic import (
    PARTIAL,
    clear_leftovers,
    locked,
    own_digest_fits,
    replacing,
    sha256_of,
    signed_json,
    sync_file,
    sync_folder,
    unique_json,
    writing,
)

JOURNAL = "lrc.journal.jsonl"
RECORD = "lrc.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
UNCHECKED = "config.json.unchecked"
SCHEMA = 1
LOCK = ".lrc.lock"
_RECORDED = ("identity", "calibration", "shards", "files", "bytes")  # keys that every reader of the record needs
OWN = {JOURNAL, RECORD, INDEX, UNCHECKED, "config.json", CARD}
# weights in any format, and adapters
WEIGHTS = (
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "adapter_*",
)  # fmt: skip
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Shard:
    """A finished shard: its file, sha256, size in bytes, tensor names, and the run's record of it."""

    file: str
    sha256: str
    nbytes: int
    tensors: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict)


class Artifact:
    """An output folder that is being written.

    Args:
        folder: created if it does not exist; must be empty, or hold a run of the same identity.
        identity: a JSON mapping of everything that determines the result. Two runs with equal identities write equal bytes.
        restart: delete the files of an earlier run in the folder; other files are kept.

    Use as a context manager: it holds a lock on the folder. `done` maps keys to the shards that an earlier, interrupted run
    finished. `finished` is True if the artifact is complete already; then no file is changed.

    Raises:
        ResumeError: the folder holds a run with another identity; the message lists the differences.
        RequestError: the folder holds files that are not lrc's, or another process is writing to it.
        CheckpointError: the folder holds a finished result that was damaged afterwards.
        OutputError: it cannot be created or written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self._restart = restart
        self._lock: IO[str] | None = None
        self.done: dict[str, Shard] = {}
        self.finished = False

    def __enter__(self) -> Artifact:
        # a lock file is left by a running process or by one that was killed: taking the lock tells which
        if not self._restart and not (self.folder / LOCK).exists() and self._is_finished():
            return self
        require_usable(self.folder)
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.folder / LOCK)
        with contextlib.ExitStack() as if_refused:
            if_refused.push(self.__exit__)
            self._open()
            if_refused.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):  # an unlocked lock file that is left over does no harm
                (self.folder / LOCK).unlink()
            self._lock.close()

    def _open(self) -> None:
        with writing(self.folder):
            if self._restart:
                self._clear()
            if (self.folder / "config.json").exists() and (self.folder / RECORD).exists():
                # killed after the result was checked and before the journal was deleted, or finished while this process waited
                (self.folder / JOURNAL).unlink(missing_ok=True)
                self._is_finished()
            elif (self.folder / JOURNAL).exists():
                self._read_journal()
            else:
                self._append({"identity": self.identity})
            clear_leftovers(self.folder)  # only now, because a run with another identity must not be changed

    def _is_finished(self) -> bool:
        """Whether the folder holds the finished result of this request; raises if it is of another request, or damaged."""
        folder = self.folder
        if (folder / JOURNAL).exists() or not ((folder / RECORD).is_file() and (folder / "config.json").is_file()):
            return False
        record = read_record(folder)
        self._compare(record.get("identity", {}))
        for name, shard in record.get("shards", {}).items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != shard["nbytes"]:
                found = "is missing" if size is None else f"has {size} bytes; {shard['nbytes']} were written"
                raise CheckpointError(f"{folder} was finished, but {folder / name} {found}.", "Start over with --restart.")
        self.finished = True
        return True

    def _clear(self) -> None:
        own = OWN | self._copied_files()
        for path in list(self.folder.iterdir()):
            if path.is_file() and (path.name in own or path.name.endswith(PARTIAL) or _SHARD.fullmatch(path.name)):
                path.unlink()

    def _copied_files(self) -> set[str]:
        """Names of the tokenizer's and other files that an earlier run wrote here, or was about to write."""
        texts = [
            *((self.folder / JOURNAL).read_bytes().splitlines() if (self.folder / JOURNAL).is_file() else []),
            (self.folder / RECORD).read_bytes() if (self.folder / RECORD).is_file() else b"",
        ]
        entries = [entry for text in texts if isinstance(entry := _parsed(text), dict)]
        return {name for entry in entries for name in entry.get("files", ()) if Path(name).name == name}

    def _compare(self, other: Mapping[str, Any]) -> None:
        differences = list(_differences(other, self.identity))
        if differences:
            raise ResumeError(str(self.folder), differences)

    def _read_journal(self) -> None:
        path = self.folder / JOURNAL
        data = path.read_bytes()
        entries, length = [], 0
        for line in data.splitlines(keepends=True):  # a killed run may leave half a line at the end, a power cut zeros
            entry = _parsed(line)
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                break
            entries.append(entry)
            length += len(line)
        if length < len(data):
            os.truncate(path, length)
        if not entries:
            self._append({"identity": self.identity})
            return
        self._compare(entries[0].get("identity", {}))
        for entry in entries[1:]:
            if "key" not in entry:
                continue
            shard = Shard(entry["file"], entry["sha256"], entry["nbytes"], tuple(entry["tensors"]), entry["record"])
            file = self.folder / shard.file
            if file.is_file() and file.stat().st_size == shard.nbytes and sha256_of(file) == shard.sha256:
                self.done[entry["key"]] = shard

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self.folder / JOURNAL).open("ab") as journal:
            journal.write(json.dumps(entry).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        sync_folder(self.folder)

    def require_space(self, nbytes: int) -> None:
        """Refuse, before any work, if the disk has no room for `nbytes` more.

        Raises:
            OutputError: there is too little free space.
        """
        free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            raise OutputError(
                f"{self.folder} has {free / 1e6:,.1f} MB free; the result needs {nbytes / 1e6:,.1f} MB.",
                "Free some space, or give an --out on another disk.",
            )

    def write(self, key: str, file: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Shard:
        """Commit one shard: temporary file, sync, rename, journal.

        Where a shard is written a second time, the journal's line comes before the renaming. A line is valid if its hash is
        that of the file. The shard is therefore finished at every moment, by the older line or by the newer one.

        Raises:
            OutputError: it cannot be written.
        """
        path, again = self.folder / file, key in self.done
        with writing(path):
            with replacing(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
                sync_file(temporary)
                # tensor names are sorted, so that the line does not depend on where the tensors come from
                shard = Shard(file, sha256_of(temporary), temporary.stat().st_size, tuple(sorted(tensors)), dict(record))
                line = {"key": key, "file": file, "sha256": shard.sha256, "nbytes": shard.nbytes,
                        "tensors": shard.tensors, "record": shard.record}  # fmt: skip
                if again:
                    self._append(line)
            sync_folder(self.folder)
            if not again:
                self._append(line)
        self.done[key] = shard
        return shard

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of a finished shard."""
        return read_shard(self.folder, self.done[key])

    def expose(self, config: Mapping[str, Any]) -> None:
        """Write what is needed to read the unfinished result: its index, and its configuration under the name `UNCHECKED`."""
        with writing(self.folder):
            self._put(INDEX, _json(self._index()))
            self._put(UNCHECKED, _json(config))

    def _index(self) -> dict[str, Any]:
        shards = sorted(self.done.values(), key=lambda shard: shard.file)
        return {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": {name: shard.file for shard in shards for name in shard.tensors},
        }

    def finish(
        self,
        config: Mapping[str, Any],
        record: Mapping[str, Any],
        card: str,
        files: Mapping[str, bytes],
        check: Callable[[], object],
    ) -> None:
        """Write all other files, check the result, and only then create config.json and delete the journal.

        Args:
            config: the content of config.json; while `check` runs it is in the file `UNCHECKED`.
            record: the content of lrc.json.
            card: the README.
            files: name -> content of the tokenizer's and other files.
            check: raises if the result is not sound; then config.json is not created.
        """
        shards = sorted(self.done.values(), key=lambda shard: shard.file)
        written = dict(files) | {INDEX: _json(self._index()), "config.json": _json(config)}
        whole = dict(record) | {
            "schema": SCHEMA,
            "identity": self.identity,
            "files": sorted(files),
            "sha256": {name: hashlib.sha256(written[name]).hexdigest() for name in sorted(written)},
            "card": hashlib.sha256(card.encode()).hexdigest(),
            "shards": {shard.file: {"sha256": shard.sha256, "nbytes": shard.nbytes} for shard in shards},
        }
        with writing(self.folder):
            self._append({"files": sorted(files)})
            for name, content in files.items():
                self._put(name, content)
            self._put(CARD, card.encode())
            self._put(RECORD, signed_json(whole))
        self.expose(config)
        check()
        with writing(self.folder):
            (self.folder / UNCHECKED).replace(self.folder / "config.json")
            sync_folder(self.folder)
            (self.folder / JOURNAL).unlink()
        self.finished = True

    def _put(self, name: str, content: bytes) -> None:
        with replacing(self.folder / name) as temporary:
            temporary.write_bytes(content)
            sync_file(temporary)
        sync_folder(self.folder)


def require_usable(folder: Path) -> None:
    """Refuse, before any work, a folder that a run cannot be written into. Writes nothing.

    Raises:
        RequestError: it holds files that are not lrc's.
        OutputError: it is not a folder, or it is not writable.
    """
    with writing(folder):
        if folder.exists():
            names = {path.name for path in folder.iterdir()}
            if not names & {JOURNAL, RECORD} and (foreign := sorted(names - {LOCK})):
                raise RequestError(
                    f"{folder} holds other files ({', '.join(foreign[:3])}); lrc would mix its own with them.",
                    "Give an empty or new folder as --out.",
                )
            foreign = sorted(name for name in names - OWN if matches(name, WEIGHTS) and not _SHARD.fullmatch(name))
            if foreign:
                raise RequestError(
                    f"{folder} holds weights that lrc did not write ({', '.join(foreign[:3])}); whoever loads the result would "
                    "read them.",
                    "Move them to another folder, or give another --out.",
                )
        standing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
        if not standing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(standing))
        if not os.access(standing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied or read-only file system", str(standing))


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
        text = path.read_bytes()
        record: dict[str, Any] = unique_json(text)
        if not isinstance(record, dict):
            raise TypeError("it is no JSON object")
        fits = own_digest_fits(text)
        if fits is False or (fits is None and {"digest", "card"} & record.keys()):  # an lrc that wrote no digest wrote no card
            raise CheckpointError(f"{path} has changed since it was written (its own digest differs).",
                                  "Copy it again, or undo the change if it is not yours.")  # fmt: skip
        if record["schema"] > SCHEMA:
            raise CheckpointError(f"{path} has schema {record['schema']}; this lrc reads up to {SCHEMA}.", "Upgrade lrc.")
        for key in _RECORDED:
            record[key]
        record["calibration"]["provenance"]
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}: it is damaged, or not lrc's.", "Write the artifact again.") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}", "Write the artifact again.") from error
    return record


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the name of a file matches one of these shell patterns, upper or lower case."""
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)


def read_shard(folder: Path, shard: Shard) -> dict[str, Tensor]:
    """All tensors of a shard, copied out of the file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(folder / shard.file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / shard.file} cannot be read: {error}", "Start over with --restart.") from error


def _parsed(text: bytes) -> Any:
    """The JSON value of a text, or None if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: it has {_short(old)}, you asked for {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:76]} … {text[-76:]}"  # paths differ at their ends
