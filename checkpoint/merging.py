"""Shards by size from the parts that a run has written, one part a layer.

Bytes go from file to file: no tensor is in memory, and no number changes. A shard is made of whole parts, as many as fit; a
part that is larger than a shard may be becomes several shards. The layout follows from the sizes of the tensors alone, so a run
that is interrupted and continued comes to the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .atomic import replacing

SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9  # the most of a shard unless the user says otherwise, as in transformers
_AT_ONCE = 1 << 22  # bytes
_WIDTHS = {"64": 8, "32": 4, "16": 2}  # digits in the name of a dtype -> bytes; all others take one byte or less


def part_name(number: int, count: int) -> str:
    """Name of a part's file; the first has number 1."""
    return f"lrc.part-{number:05d}-of-{count:05d}.safetensors"


def shard_name(number: int, count: int) -> str:
    """Name of a shard's file, as the hub has it; the first has number 1."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True)
class Group:
    """One shard that is to be made.

    Args:
        file: its name.
        parts: keys of the parts that it takes tensors from.
        tensors: name -> bytes.
        renamed: whether it is a part as it is, under another name.
        done: keys of the parts that are needed no longer once it is there.
    """

    file: str
    parts: tuple[str, ...]
    tensors: Mapping[str, int]
    renamed: bool
    done: tuple[str, ...]


def layout(parts: Mapping[str, Mapping[str, int]], most: int) -> list[Group]:
    """The shards that hold the tensors of these parts, in their order.

    Args:
        parts: key of a part -> its tensors and their bytes, in the order of the file.
        most: bytes of the tensors of one shard; a single tensor may be larger.
    """
    found: list[tuple[list[str], dict[str, int], bool]] = []
    for key, tensors in parts.items():
        size = sum(tensors.values())
        fits = bool(found) and found[-1][2] and sum(found[-1][1].values()) + size <= most
        if fits:
            found[-1][0].append(key)
            found[-1][1].update(tensors)
        elif size <= most or len(tensors) < 2:
            found.append(([key], dict(tensors), True))
        else:
            found += [([key], piece, False) for piece in _pieces(tensors, most)]
    groups = []
    for number, (keys, held, whole) in enumerate(found, 1):
        last = number == len(found) or keys[-1] not in found[number][0]
        groups.append(
            Group(shard_name(number, len(found)), tuple(keys), held, whole and len(keys) == 1, tuple(keys) if last else ())
        )
    return groups


def _pieces(tensors: Mapping[str, int], most: int) -> Iterator[dict[str, int]]:
    piece: dict[str, int] = {}
    for name, nbytes in tensors.items():
        if piece and sum(piece.values()) + nbytes > most:
            yield piece
            piece = {}
        piece[name] = nbytes
    yield piece


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of a tensor lie in a file."""

    path: Path
    start: int
    dtype: str
    shape: Sequence[int]
    nbytes: int


def _entries(path: Path) -> dict[str, _Entry]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: _Entry(path, 8 + length + entry["data_offsets"][0], entry["dtype"], entry["shape"],
                     entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }  # fmt: skip


def sizes(path: Path) -> dict[str, int]:
    """Name -> bytes of the tensors of a safetensors file of lrc's own, in the order of the file."""
    entries = sorted(_entries(path).items(), key=lambda item: item[1].start)
    return {name: entry.nbytes for name, entry in entries}


def merge(
    path: Path, parts: Sequence[Path], names: Mapping[str, int], before_rename: Callable[[str, int], object] = lambda *_: None
) -> None:
    """Write the tensors `names` of these files into one file.

    Args:
        path: the new file; it appears completely or not at all.
        parts: safetensors files of lrc's own.
        names: the tensors, each in one of the files.
        before_rename: called with the sha256 and the size in bytes when the file is on the disk under a temporary name.

    Raises:
        OSError: it cannot be written.
        CheckpointError: a part has changed while it was read.
    """
    held = {name: entry for part in parts for name, entry in _entries(part).items() if name in names}
    # wide dtypes first, so that every tensor begins at a multiple of its element: a reader may map the file
    ordered = sorted(held.items(), key=lambda item: (-_width(item[1].dtype), item[0]))
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            digest = hashlib.sha256()
            for piece in _content(ordered):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        before_rename(digest.hexdigest(), temporary.stat().st_size)


def _width(dtype: str) -> int:
    return next((width for digits, width in _WIDTHS.items() if dtype.endswith(digits)), 1)


def _content(ordered: Sequence[tuple[str, _Entry]]) -> Iterator[bytes]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, entry in ordered:
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [place, place + entry.nbytes]}
        place += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {entry.path for _, entry in ordered}}
        for _, entry in ordered:
            yield from _bytes(files[entry.path], entry)


def _bytes(file: IO[bytes], entry: _Entry) -> Iterator[bytes]:
    file.seek(entry.start)
    left = entry.nbytes
    while left:
        piece = file.read(min(left, _AT_ONCE))
        if not piece:
            raise CheckpointError(f"{entry.path} ends before its last tensor.", "Start over with --restart.")
        left -= len(piece)
        yield piece


def read_tensors(folder: Path, files: Collection[str], names: Collection[str]) -> dict[str, Tensor]:
    """These tensors, copied out of the files that hold them.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    found: dict[str, Tensor] = {}
    for name in files:
        try:
            with safe_open(folder / name, "pt") as file:
                found |= {key: file.get_tensor(key).clone() for key in file.keys() if key in names}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}", "Start over with --restart.") from error
    return found
