"""The lines of a run's journal, each with its checksum; what a continued run takes over; and how two requests differ.

The first line has the identity of the run. Then comes a line for each part (`key`), and, once they are merged, the names of the
shards (`shards`), a line for each shard (`merged`), the record of a refinement (`refinement`), the other files (`files`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .atomic import checksum, sha256_of
from .folder import parsed

# the folders in the path of a source: text:PATH, csv:PATH:COLUMN, hf:FOLDER, alone or in a mixture
_FOLDERS = re.compile(r"((?:^|(?<=\+))\s*(?:(?:text|json|jsonl|csv|parquet):|hf:(?=[./~])))[^+]*/")
CHECK = "checksum"  # of a line: sha256 of the line without it


def line(entry: Mapping[str, Any]) -> bytes:
    """A line: an entry with its checksum."""
    return json.dumps(dict(entry) | {CHECK: checksum(json.dumps(entry))}).encode() + b"\n"


def entry_of(text: bytes) -> dict[str, Any] | None:
    """The entry of a whole line; None if it is damaged."""
    entry = parsed(text)
    if not text.endswith(b"\n") or not isinstance(entry, dict):
        return None
    return entry if entry.pop(CHECK, None) == checksum(json.dumps(entry)) else None


def read_lines(path: Path) -> tuple[list[bytes], list[dict[str, Any] | None]]:
    """The lines of a journal and their entries, None for a damaged one; without what a killed run left half at the end."""
    lines = path.read_bytes().splitlines(keepends=True)
    entries = [entry_of(text) for text in lines]
    while entries and entries[-1] is None and (not lines[-1].endswith(b"\n") or not lines[-1].strip(b"\0\n")):
        entries.pop()  # a killed run may leave half a line, a power cut zeros
        lines.pop()
    return lines, entries


@dataclass(frozen=True)
class Shard:
    """A finished part or shard: its file, sha256, size in bytes, tensors with their bytes, and the run's record of it."""

    file: str
    sha256: str
    nbytes: int
    tensors: Mapping[str, int]
    record: dict[str, Any] = field(default_factory=dict)

    def is_in(self, folder: Path) -> bool:
        """Whether the folder has the file as it was written."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.nbytes and sha256_of(path) == self.sha256


@dataclass(frozen=True)
class Recovered:
    """What a continued run takes over.

    Args:
        done: key -> part; it is in its file or in shards.
        merged: file -> shard.
        refinement: what the journal has of it; empty before merging.
        journal: the lines that hold.
    """

    done: dict[str, Shard]
    merged: dict[str, Shard]
    refinement: dict[str, Any]
    journal: bytes


def identity_of(path: Path, text: bytes, entry: dict[str, Any] | None) -> dict[str, Any]:
    """The identity in the first line of a journal.

    Raises:
        CheckpointError: the line is damaged.
    """
    if entry is None:
        old = parsed(text)
        if isinstance(old, dict) and "identity" in old and CHECK not in old:
            return dict(old["identity"])  # of an lrc that wrote no checksums: another version of the identity
        raise CheckpointError(f"{path} is damaged: line 1 does not have its checksum.", "Start over with --restart.")
    return dict(entry.get("identity", {}))


def recovered(
    path: Path, lines: Sequence[bytes], entries: Sequence[dict[str, Any] | None], note: Callable[[str], None]
) -> Recovered:
    """What is on the disk as the journal has it. Notes everything else, which is made anew.

    Raises:
        CheckpointError: something is damaged that would not come out the same.
    """
    known = [entry for entry in entries if entry is not None]
    shards = [Shard(each["merged"], each["sha256"], each["nbytes"], each["tensors"]) for each in known if "merged" in each]
    merged = {shard.file: shard for shard in shards if shard.is_in(path.parent)}
    inside = {name for shard in merged.values() for name in shard.tensors}
    parts = [(each["key"], _part(each)) for each in known if "key" in each]
    done = {key: part for key, part in parts if inside.issuperset(part.tensors) or part.is_in(path.parent)}
    refinement: dict[str, Any] = next((each["refinement"] for each in known if "refinement" in each), {})
    bad = [number for number, entry in enumerate(entries, 1) if entry is None]
    gone = {shard.file: shard for shard in shards if shard.file not in merged}
    lost = {file for key, part in parts if key not in done for file in _holders(part, gone)}
    if (bad or lost) and (len({key for key, _ in parts}) < len(parts) or refinement):
        # a part that is made anew follows from its unrefined neighbours, and these are gone
        what = f"line {bad[0]} does not have its checksum" if bad else f"{min(lost)} has changed"
        raise CheckpointError(f"{path}: {what}, after the refinement was written.", "Start over with --restart.")
    for number in bad:
        note(f"{path}: line {number} is damaged; what it was about is made anew")
    for file in sorted(lost):
        note(f"{path.parent / file} is missing or has changed since it was written; it is made anew")
    kept = (
        text
        for text, entry in zip(lines, entries, strict=True)
        if entry is not None
        and ("key" not in entry or entry["key"] in done)
        and ("merged" not in entry or entry["merged"] in merged)
    )
    return Recovered(done, merged, refinement, b"".join(kept))


def _part(entry: Mapping[str, Any]) -> Shard:
    # an lrc that wrote one shard a layer listed no sizes
    tensors = entry["tensors"] if isinstance(entry["tensors"], dict) else dict.fromkeys(entry["tensors"], 0)
    return Shard(entry["file"], entry["sha256"], entry["nbytes"], tensors, entry["record"])


def _holders(part: Shard, gone: Mapping[str, Shard]) -> set[str]:
    """The files that are lost with a part: the shards that held it, or its own."""
    return {file for file, shard in gone.items() if part.tensors.keys() & shard.tensors.keys()} or {part.file}


def without_paths(value: Any) -> Any:
    """The same JSON value with the files of calibration sources named without their folders: it may be published.

    What a source holds is identified by its hash, so nothing that is compared gets lost.
    """
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each) for each in value]
    return _FOLDERS.sub(r"\1", value) if isinstance(value, str) else value


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """One sentence for each value in which two identities differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: it has {_short(old)}, you asked for {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:76]} … {text[-76:]}"  # paths differ at their ends
