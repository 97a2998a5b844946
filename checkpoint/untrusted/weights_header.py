"""How many tensors the weight files of a folder hold, without any library that allocates by what a header says."""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import CheckpointError
from .files import size_of

_LONGEST_HEADER = 100_000_000  # bytes, by the format


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


def _entries(path: Path) -> list[dict[str, object]]:
    try:
        if not size_of(path):
            return []
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}
    except (CheckpointError, OSError, ValueError, RecursionError):
        return []
    entries = header.values() if isinstance(header, dict) else ()
    return [entry for entry in entries if isinstance(entry, dict)]
