"""The artifact on disk. It is written shard by shard, so that a run can be killed at any time and still never looks finished.

During a run the folder holds the finished shards and a journal, but no config.json, so no tool takes it for a model. Each shard
is written to a temporary file, synced and renamed; then a line is appended to the journal. config.json appears last, and only
after the result was checked. The journal's first line is the identity of the run (recipe, model, calibration); a different
request is refused, and the message lists the differences. Every line carries its own checksum. The journal is deleted when
config.json is there; what else a run keeps in the folder goes after it. A folder with config.json and no journal is finished;
lrc's files in it are those that `lrc.json` lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, ResumeError
from .atomic import (
    PARTIAL,
    checksum,
    clear_leftovers,
    locked,
    remove,
    replacing,
    require_space,
    sha256_of,
    signed_json,
    sync_file,
    sync_folder,
    writing,
)
from .folder import (
    CARD,
    INDEX,
    JOURNAL,
    LOCK,
    OWN,
    RECORD,
    SCHEMA,
    SCRATCH,
    SHARD,
    UNCHECKED,
    copied_files,
    folders_of,
    leftovers,
    parsed,
    read_record,
    require_usable,
)

_CHECK = "checksum"  # of a journal's line: sha256 of the line without it


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
        note: receives a sentence for everything that was damaged and is made anew, or could not be deleted.

    Use as a context manager: it holds a lock on the folder. `done` maps keys to the shards that an earlier, interrupted run
    finished. `finished` is True if the artifact is complete already; then no file is changed.

    Raises:
        ResumeError: the folder holds a run with another identity; the message lists the differences.
        RequestError: the folder holds files that are not lrc's, or another process is writing to it.
        CheckpointError: the folder holds a finished result that was damaged afterwards.
        OutputError: it cannot be created or written.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        restart: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self._restart = restart
        self._note = note
        self._lock: IO[str] | None = None
        self.done: dict[str, Shard] = {}
        self.finished = False

    def __enter__(self) -> Artifact:
        # a lock file is left by a running process or by one that was killed: taking the lock tells which
        if not self._restart and not (self.folder / LOCK).exists() and self._is_finished() and not leftovers(self.folder):
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
            if (self.folder / JOURNAL).exists():
                self._read_journal()
            elif self._is_finished():  # by a process that was killed at its end, or while this one waited for the lock
                self._clear_leftovers()
            else:
                if (self.folder / RECORD).is_file():  # a finished result that has lost its config.json
                    self._compare(read_record(self.folder).get("identity", {}))
                self._begin()
            # only now, because a run with another identity must not be changed
            for folder in folders_of(self.folder):
                clear_leftovers(folder)

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
        """Delete everything of lrc's. What it is about must not outlive a journal, and refined shards not their training."""
        own = OWN | set(SCRATCH) | copied_files(self.folder)
        named = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*")}
        mine = [path for name, path in named.items() if name in own or name.endswith(PARTIAL) or SHARD.fullmatch(name)]
        last = (*SCRATCH, RECORD, JOURNAL)
        for path in sorted(mine, key=lambda path: last.index(path.name) + 1 if path.name in last else 0):
            remove(path)
        for name in sorted(own, key=len, reverse=True):  # folders that held nothing else, the inner ones first
            for folder in (self.folder / name).parents:
                if folder == self.folder or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def _begin(self) -> None:
        """Begin a journal. The folder has none, so scratch in it is of an unknown run."""
        for path in leftovers(self.folder):
            remove(path)
        self._append({"identity": self.identity})

    def _clear_leftovers(self) -> None:
        """Delete what a run keeps until it is finished."""
        for path in leftovers(self.folder):
            try:
                remove(path)
            except OSError as error:
                self._note(f"{path} is no longer needed and could not be deleted: {error}")

    def _compare(self, other: Mapping[str, Any]) -> None:
        if other.get("version") != self.identity.get("version"):
            raise ResumeError(
                str(self.folder), ["it was written by another version of lrc, which compares requests differently"]
            )
        differences = list(_differences(other, self.identity))
        if differences:
            raise ResumeError(str(self.folder), differences)

    def _read_journal(self) -> None:
        """Fill `done` from the journal; a damaged line is dropped and its shard made anew, if it can come out the same.

        Raises:
            CheckpointError: the first line is damaged, or a shard that was refined.
        """
        path = self.folder / JOURNAL
        lines = path.read_bytes().splitlines(keepends=True)
        entries = [_entry(line) for line in lines]
        while entries and entries[-1] is None and (not lines[-1].endswith(b"\n") or not lines[-1].strip(b"\0\n")):
            entries.pop()  # a killed run may leave half a line at the end, a power cut zeros
            lines.pop()
        if not entries:
            path.unlink()
            self._begin()
            return
        if entries[0] is None:
            old = parsed(lines[0])
            if isinstance(old, dict) and "identity" in old and _CHECK not in old:
                self._compare(old["identity"])  # of an lrc that wrote no checksums
            raise CheckpointError(f"{path} is damaged: line 1 does not have its checksum.", "Start over with --restart.")
        self._compare(entries[0].get("identity", {}))
        shards = [entry for entry in entries[1:] if entry is not None and "key" in entry]
        for entry in shards:
            shard = Shard(entry["file"], entry["sha256"], entry["nbytes"], tuple(entry["tensors"]), entry["record"])
            file = self.folder / shard.file
            if file.is_file() and file.stat().st_size == shard.nbytes and sha256_of(file) == shard.sha256:
                self.done[entry["key"]] = shard
        bad = [number for number, entry in enumerate(entries, 1) if entry is None]
        lost = sorted({entry["file"] for entry in shards if entry["key"] not in self.done})
        if (bad or lost) and len({entry["key"] for entry in shards}) < len(shards):
            # a shard that is made anew follows from its unrefined neighbours, and these are gone
            what = f"line {bad[0]} does not have its checksum" if bad else f"{lost[0]} has changed"
            raise CheckpointError(f"{path}: {what}, after the refinement was written.", "Start over with --restart.")
        for number in bad:
            self._note(f"{path}: line {number} is damaged; the shard that it was about is made anew")
        for file in lost:
            self._note(f"{self.folder / file} is missing or has changed since it was written; it is made anew")
        kept = (
            line
            for line, entry in zip(lines, entries, strict=True)
            if entry is not None and ("key" not in entry or entry["key"] in self.done)
        )
        journal = b"".join(kept)
        if journal != path.read_bytes():
            self._put(JOURNAL, journal)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self.folder / JOURNAL).open("ab") as journal:
            journal.write(_line(entry))
            journal.flush()
            os.fsync(journal.fileno())
        sync_folder(self.folder)

    def require_space(self, nbytes: int) -> None:
        """Refuse, before any work, if the disk has no room for `nbytes` more.

        Raises:
            OutputError: there is too little free space.
        """
        require_space(self.folder, nbytes, "the result needs", "give an --out on another disk")

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
            files: path in the folder -> content of the tokenizer's and other files.
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
            for name in self._not_listed(files):
                (self.folder / name).unlink()
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
            sync_folder(self.folder)
        self.finished = True
        self._clear_leftovers()

    def _not_listed(self, files: Mapping[str, bytes]) -> list[str]:
        """Shards and copied files in the folder that the result does not list, as of a run whose journal was lost."""
        listed = {*files, *(shard.file for shard in self.done.values())}
        copied = copied_files(self.folder)
        names = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return [name for name in names if name not in listed and (name in copied or SHARD.fullmatch(name))]

    def _put(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            sync_file(temporary)
        sync_folder(path.parent)
        sync_folder(self.folder)


def read_shard(folder: Path, shard: Shard) -> dict[str, Tensor]:
    """All tensors of a shard, copied out of the file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(folder / shard.file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / shard.file} cannot be read: {error}", "Start over with --restart.") from error


def _line(entry: Mapping[str, Any]) -> bytes:
    """A line of the journal: an entry with its checksum."""
    return json.dumps(dict(entry) | {_CHECK: checksum(json.dumps(entry))}).encode() + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry of a whole line of the journal; None if it is damaged."""
    entry = parsed(line)
    if not line.endswith(b"\n") or not isinstance(entry, dict):
        return None
    return entry if entry.pop(_CHECK, None) == checksum(json.dumps(entry)) else None


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
