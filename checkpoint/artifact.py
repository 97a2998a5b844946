"""The artifact on disk. It is written part by part, so that a run can be killed at any time and still never looks finished.

During a run the folder holds the finished parts, one a layer, and a journal, but no config.json, so no tool takes it for a
model. Each part is written to a temporary file, synced and renamed; then a line is appended to the journal. When all are there
they are merged into shards by size (checkpoint/merging.py): a shard is written beside its parts, the journal gets its line, the
shard its name, and only then the parts go. config.json appears last, and only after the result was checked.

The journal's first line is the identity of the run (recipe, model, calibration); a different request is refused, and the
message lists the differences. Every line carries its own checksum. The journal is deleted when config.json is there; what else
a run keeps in the folder goes after it. A folder with config.json and no journal is finished; lrc's files in it are those that
`lrc.json` lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, ResumeError
from .atomic import (
    PARTIAL,
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
    PART,
    RECORD,
    SCHEMA,
    SCRATCH,
    SHARD,
    UNCHECKED,
    copied_files,
    folders_of,
    leftovers,
    listed_shards,
    read_record,
    require_usable,
)
from .journal import Shard, differences, identity_of, line, read_lines, recovered, without_paths
from .merging import SINGLE, Group, layout, merge, read_tensors, sizes


class Artifact:
    """An output folder that is being written.

    Args:
        folder: created if it does not exist; must be empty, or hold a run of the same identity.
        identity: a JSON mapping of everything that determines the result. Two runs with equal identities write equal bytes.
        restart: delete the files of an earlier run in the folder; other files are kept.
        note: receives a sentence for everything that was damaged and is made anew, or could not be deleted.

    Use as a context manager: it holds a lock on the folder. `done` maps keys to the parts that an earlier, interrupted run
    finished, whether they are merged or not. `merged` has the shards. `refinement` is what `merge` was given, {} before.
    `finished` is True if the artifact is complete already; then no file is changed.

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
        self.merged: dict[str, Shard] = {}
        self.refinement: dict[str, Any] = {}
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
        own = OWN | set(SCRATCH) | copied_files(self.folder) | listed_shards(self.folder)
        named = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*")}
        mine = [path for name, path in named.items() if name in own or name.endswith(PARTIAL) or _is_weights(name)]
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
        if found := list(differences(without_paths(dict(other)), without_paths(self.identity))):
            raise ResumeError(str(self.folder), found)

    def _read_journal(self) -> None:
        """Fill `done` and `merged` from the journal; what is damaged is made anew, if it can come out the same.

        Raises:
            CheckpointError: the first line is damaged, or a part that was refined.
        """
        path = self.folder / JOURNAL
        lines, entries = read_lines(path)
        if not entries:
            path.unlink()
            self._begin()
            return
        self._compare(identity_of(path, lines[0], entries[0]))
        found = recovered(path, lines, entries, self._note)
        self.done, self.merged, self.refinement = found.done, found.merged, found.refinement
        if found.journal != path.read_bytes():
            self._put(JOURNAL, found.journal)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with (self.folder / JOURNAL).open("ab") as journal:
            journal.write(line(entry))
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
        """Commit one part: temporary file, sync, rename, journal.

        Where a part is written a second time, the journal's line comes before the renaming. A line is valid if its hash is
        that of the file. The part is therefore finished at every moment, by the older line or by the newer one.

        Raises:
            OutputError: it cannot be written.
        """
        path, again = self.folder / file, key in self.done
        with writing(path):
            with replacing(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
                sync_file(temporary)
                part = Shard(file, sha256_of(temporary), temporary.stat().st_size, sizes(temporary), dict(record))
                told = {"key": key, "file": file, "sha256": part.sha256, "nbytes": part.nbytes,
                        "tensors": part.tensors, "record": part.record}  # fmt: skip
                if again:
                    self._append(told)
            sync_folder(self.folder)
            if not again:
                self._append(told)
        self.done[key] = part
        return part

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of a finished part.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        part = self.done[key]
        files = [shard.file for shard in self.merged.values() if part.tensors.keys() & shard.tensors.keys()]
        return read_tensors(self.folder, files or [part.file], part.tensors)

    def merge(self, most: int, refinement: Mapping[str, Any] | None) -> None:
        """Make shards of the parts, all of which are done. A part goes when the journal has the shard that holds it.

        A run that was begun by an lrc that wrote one shard a layer keeps them.

        Args:
            most: bytes of the tensors of one shard.
            refinement: what a run that is killed from here on must know of its refinement, which needs the parts.

        Raises:
            OutputError: a shard cannot be written.
        """
        parts = dict(sorted(self.done.items(), key=lambda item: item[1].file))
        if not all(PART.fullmatch(part.file) for part in parts.values()):
            self.merged = {part.file: part for part in parts.values()}
            return
        groups = layout({key: part.tensors for key, part in parts.items()}, most)
        with writing(self.folder):
            if refinement and not self.refinement:
                self._append({"refinement": dict(refinement)})
                self.refinement = dict(refinement)
            if not self.merged:
                self._append({"shards": [group.file for group in groups]})
            for group in groups:
                if group.file not in self.merged:
                    self._join(group)
                for key in group.done:
                    (self.folder / parts[key].file).unlink(missing_ok=True)
            sync_folder(self.folder)

    def _join(self, group: Group) -> None:
        """Make one shard. Its line comes before its name: until the file has the line's hash, the parts count."""
        path, parts = self.folder / group.file, [self.done[key] for key in group.parts]

        def told(sha256: str, nbytes: int) -> None:
            self.merged[group.file] = Shard(group.file, sha256, nbytes, group.tensors)
            self._append({"merged": group.file, "sha256": sha256, "nbytes": nbytes, "tensors": group.tensors})

        if group.renamed:
            told(parts[0].sha256, parts[0].nbytes)
            (self.folder / parts[0].file).replace(path)
        else:
            merge(path, [self.folder / part.file for part in parts], group.tensors, told)
        sync_folder(self.folder)

    def expose(self, config: Mapping[str, Any]) -> None:
        """Write what is needed to read the unfinished result: its index, and its configuration under the name `UNCHECKED`."""
        with writing(self.folder):
            for name, content in self._index().items():
                self._put(name, content)
            self._put(UNCHECKED, _json(config))

    def _files(self) -> list[Shard]:
        """The files that hold the tensors: the shards, before merging the parts."""
        return sorted((self.merged or self.done).values(), key=lambda shard: shard.file)

    def _index(self) -> dict[str, bytes]:
        """Name -> content of the index; empty where one file has the name that needs none."""
        files = self._files()
        if [shard.file for shard in files] == [SINGLE]:
            return {}
        index = {
            "metadata": {"total_size": sum(sum(shard.tensors.values()) or shard.nbytes for shard in files)},
            "weight_map": {name: shard.file for shard in files for name in sorted(shard.tensors)},
        }
        return {INDEX: _json(index)}

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
        shards = self._files()
        written = dict(files) | self._index() | {"config.json": _json(config)}
        whole = dict(record) | {
            "schema": SCHEMA,
            "identity": without_paths(self.identity),
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
        listed = {*files, *(shard.file for shard in self._files())}
        own = copied_files(self.folder) | listed_shards(self.folder) | (set() if self._index() else {INDEX})
        names = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        return [name for name in names if name not in listed and (name in own or _is_weights(name))]

    def _put(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            sync_file(temporary)
        sync_folder(path.parent)
        sync_folder(self.folder)


def _is_weights(name: str) -> bool:
    return SHARD.fullmatch(name) is not None or PART.fullmatch(name) is not None


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
