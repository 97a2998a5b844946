"""Headers of safetensors files, before a library reads them: their length, and how many tensors the files of a folder hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, brief
from .files import MB, size_of

# The format allows 100 MB. That many are 1.7 million tensors in one file, whose names alone take two gigabytes of memory and a
# minute; a layer of the largest mixtures has some 6,000 tensors, 1 MB of header.
_LONGEST_HEADER = 16 * MB


def count_tensors(folder: Path) -> tuple[int, int]:
    """(Tensors in all safetensors files of a folder, the longest first axis of those with three axes).

    An upper bound of what a model in the folder can have; files that cannot be read count nothing, their reader says why.
    """
    tensors, longest = 0, 0
    for path in folder.glob("*.safetensors"):
        for entry in _entries(path):
            tensors += 1
            shape = entry.get("shape")
            if isinstance(shape, list) and len(shape) == 3 and isinstance(shape[0], int):
                longest = max(longest, shape[0])
    return tensors, longest


def require_short_header(path: Path) -> int:
    """Refuse a safetensors file with an absurd header; the file's size in bytes, 0 where there is none.

    Raises:
        CheckpointError: its header is longer than any model needs, or it is no regular file.
    """
    size = size_of(path) or 0
    what, remedy = f"{brief(str(path))} ({size} bytes) is truncated or corrupt", "Download or copy that shard again."
    try:
        length = _length(path) if size else 0
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror or error}.", remedy) from error
    if length > _LONGEST_HEADER:
        raise CheckpointError(f"{what}: its header has {length:,} bytes; no model needs more than {_LONGEST_HEADER:,}.", remedy)
    return size


def data_places(path: Path) -> dict[str, tuple[int, int]]:
    """Tensor -> (its first byte in the file, its bytes), of a safetensors file that its reader has found sound."""
    length, header = _header(path)
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + length + first, end - first) for name, (first, end) in offsets.items()}


def _length(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


def _header(path: Path) -> tuple[int, Any]:
    """(Bytes of the header, the header); an absurdly long one is not read and counts as empty."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return length, json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}


def _entries(path: Path) -> list[dict[str, object]]:
    try:
        if not size_of(path):
            return []
        header = _header(path)[1]
    except (CheckpointError, OSError, ValueError, RecursionError):
        return []
    entries = header.values() if isinstance(header, dict) else ()
    return [entry for entry in entries if isinstance(entry, dict)]
