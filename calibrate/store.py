"""Statistics on disk, a file per layer: collected once, and used by every recipe that starts from the original model.

A folder holds one safetensors file per layer, and a manifest: the model's fingerprint, the token ids' hash and the names of the
statistics. Of a symmetric matrix the file holds one half. A layer that was collected in several chunks has a file for each
(`LAYER.part-N.safetensors`), and its own file says which of them holds which target. A layer's own file appears last and whole
(temporary name, rename), so that an interrupted collection resumes at the layer that it had reached. One process collects into
a folder at a time, and only while no other reads from it. All files carry checksums, which are compared at every read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint.atomic import (
    PARTIAL,
    CheckedTensors,
    checked_tensors,
    claimed,
    clear_leftovers,
    read_json,
    write_json,
    write_tensors,
)
from ..compress.base import GroupStats, TargetStats
from ..errors import OutputError, RequestError

MANIFEST = "statistics.json"
TRIALS = "trials"  # a folder beside the statistics: the losses of ablated models
_LOCK = "statistics.lock"
_ROWS = 128  # rows of a symmetric matrix that are mirrored together
LAYOUT = 3  # of the files; those of another are not read
_GROUP = ("gram", "mean", "abs_mean", "mean_square", "peak_abs_mean")
_TARGET = ("output_gram", "grad_gram", "fisher_in", "weight_grad")


def require_for_statistics(folder: Path) -> None:
    """Refuse a folder that holds other things than statistics.

    Raises:
        RequestError: it does, or it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--statistics {folder} is not a folder.", "Give an empty or new folder.")
    if _manifest(folder) is None and folder.is_dir() and (foreign := _foreign(folder)):
        raise RequestError(
            f"{folder} holds other files ({', '.join(foreign[:3])}); statistics need a folder of their own.",
            "Give --statistics an empty or new folder.",
        )


class StatsStore:
    """A folder of statistics. While this object exists, no other process can empty the folder or collect into it.

    Args:
        folder: created if it does not exist.
        identity: what the statistics are of; a JSON mapping. Statistics of another identity are deleted from the folder.
        needs: target -> the statistics that will be written. Where the folder has fewer, its statistics are deleted.

    Raises:
        RequestError: the folder holds files but no statistics, or another process uses it.
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], needs: Mapping[str, frozenset[str]]) -> None:
        self.folder = folder
        asked = {name: sorted(each) for name, each in needs.items()}
        wanted = {"layout": LAYOUT, "identity": json.loads(json.dumps(identity)), "needs": asked}
        require_for_statistics(folder)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / _LOCK).open("a")
        weakref.finalize(self, self._lock.close)
        self._claim(fcntl.LOCK_SH)
        held = _manifest(folder)
        same = held is not None and held["identity"] == wanted["identity"]
        self.needs = needs
        if held is not None and same and held.get("layout") == LAYOUT:
            there = {name: frozenset(each) for name, each in held["needs"].items()}
            if all(each <= _answered(there.get(name, frozenset())) for name, each in needs.items()):
                self.needs = there
                return
        with self.alone(), _writing(folder):
            for path in folder.iterdir():  # losses measured on the same statistics stay, whatever their layout was
                if path.suffix == ".safetensors" or (path.suffix == ".json" and path.name != MANIFEST and not same):
                    path.unlink()
            write_json(folder / MANIFEST, wanted, indent=2)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Exclude all other processes from the folder, to collect into it.

        Raises:
            RequestError: another process uses it.
        """
        self._claim(fcntl.LOCK_EX)
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(self._lock.close)  # an object that outlives its failure must not keep the lock
            with _writing(self.folder):
                clear_leftovers(self.folder)
            yield
            if_it_fails.pop_all()
        self._claim(fcntl.LOCK_SH)

    def _claim(self, kind: int) -> None:
        if not claimed(self._lock, kind):
            self._lock.close()
            raise RequestError(
                f"Another lrc works with the statistics in {self.folder}.", "Wait for it, or give --statistics another folder."
            )

    @property
    def kinds(self) -> frozenset[str]:
        """All statistics that are written of any target."""
        return frozenset[str]().union(*self.needs.values())

    def has(self, layer: str) -> bool:
        """Whether a layer's file is there."""
        return self._path(layer).is_file()

    def write(self, layer: str, statistics: Mapping[str, TargetStats]) -> None:
        """Write one layer's statistics; target name -> its statistics."""
        with self.adding(layer) as add:
            add(statistics)

    @contextlib.contextmanager
    def adding(self, layer: str) -> Iterator[Callable[[Mapping[str, TargetStats]], None]]:
        """Write one layer's statistics chunk by chunk: call what the context gives with each chunk (target -> statistics).

        The layer counts as collected when the context ends without an error. Targets of one group belong to one chunk.
        """
        path = self._path(layer)
        with self._writing_layer(path):
            path.unlink(missing_ok=True)  # before its parts change
            for part in self.folder.glob(f"{layer}.part-*.safetensors"):
                part.unlink()
        where: dict[str, int] = {}  # target -> the part that holds it
        parts: list[Path] = []

        def add(statistics: Mapping[str, TargetStats]) -> None:
            part = self._path(layer, len(parts))
            tensors, record = _stored(statistics)
            with self._writing_layer(part):
                write_tensors(part, tensors, {"targets": json.dumps(record)})
            where.update(dict.fromkeys(statistics, len(parts)))
            parts.append(part)

        yield add
        with self._writing_layer(path):
            if len(parts) == 1:
                parts[0].replace(path)
                return
            write_tensors(path, {}, {"parts": json.dumps(where)})  # no statistics, only where they are

    def read(self, layer: str, names: Iterable[str]) -> dict[str, TargetStats]:
        """The statistics of these targets of a layer; targets of one group share its `GroupStats`.

        Raises:
            CheckpointError: the file is damaged.
        """
        path, names = self._path(layer), list(names)
        with checked_tensors(path, _anew(path)) as file:
            if "parts" not in file.metadata:
                return _read(file, names)
            where = json.loads(file.metadata["parts"])
            places = {name: int(where[name]) for name in names}
        found: dict[str, TargetStats] = {}
        for number in sorted(set(places.values())):
            part = self._path(layer, number)
            with checked_tensors(part, _anew(path)) as file:
                found |= _read(file, [name for name in names if places[name] == number])
        return {name: found[name] for name in names}

    def _path(self, layer: str, part: int | None = None) -> Path:
        return self.folder / f"{layer}{'' if part is None else f'.part-{part}'}.safetensors"

    @contextlib.contextmanager
    def _writing_layer(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"Cannot write {path}: {error}", "Free some space, or give --statistics a folder on another disk."
            ) from error


def _stored(statistics: Mapping[str, TargetStats]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds of these statistics: its tensors, and target -> its group and tokens."""
    tensors: dict[str, Tensor] = {}
    groups: dict[int, str] = {}
    record: dict[str, Any] = {}
    for name, stats in statistics.items():
        group = groups.setdefault(id(stats.group), name)
        record[name] = {"group": group, "tokens": stats.group.tokens}
        if group == name:
            tensors |= {f"{name}|{key}": value for key in _GROUP if (value := getattr(stats.group, key)) is not None}
        tensors |= {f"{name}|{key}": value for key in _TARGET if (value := getattr(stats, key)) is not None}
    packed_tensors = {key: packed(value) if _symmetric(key) else value for key, value in tensors.items()}
    return {key: tensor.cpu().contiguous() for key, tensor in packed_tensors.items()}, record


def _read(file: CheckedTensors, names: Iterable[str]) -> dict[str, TargetStats]:
    """The statistics of these targets, all of which this file holds."""
    record, keys = json.loads(file.metadata["targets"]), set(file.names())

    def held(name: str, which: Iterable[str]) -> dict[str, Tensor]:
        found = {key: file.get(f"{name}|{key}") for key in which if f"{name}|{key}" in keys}
        return {key: unpacked(value) if _symmetric(key) else value for key, value in found.items()}

    groups: dict[str, GroupStats] = {}
    found = {}
    for name in names:
        group = record[name]["group"]
        if group not in groups:
            groups[group] = GroupStats(record[name]["tokens"], **held(group, _GROUP))
        found[name] = TargetStats(groups[group], **held(name, _TARGET))
    return found


def _anew(path: Path) -> str:
    return f"Delete {path.name} there and run the same command again: that layer's statistics are collected anew."


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"Cannot write statistics into {folder}: {error}", "Give another folder.") from error


def _symmetric(key: str) -> bool:
    return key.endswith("gram")


def _foreign(folder: Path) -> list[str]:
    """The files of a folder that are neither trials nor left over from a collection that was killed at its start."""
    own = (TRIALS, _LOCK)
    return sorted(path.name for path in folder.iterdir() if path.name not in own and not path.name.endswith(PARTIAL))


def _answered(held: frozenset[str]) -> frozenset[str]:
    """These statistics, and those that can be computed from them: a gram of the inputs gives that of the outputs."""
    return held | {"output_gram"} if "gram" in held else held


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder of statistics holds: layout, identity, needs; None if it is no such folder.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    if _of_earlier_layout(folder / MANIFEST):
        return {"layout": None, "identity": None, "needs": {}}
    held: dict[str, Any] | None = read_json(folder / MANIFEST, dict[str, Any])
    return held


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a folder of statistics holds, as `StatsStore` was asked for it: identity and needs; None if it holds none.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    held = _manifest(folder)
    return None if held is None or held["identity"] is None else held


def _of_earlier_layout(manifest: Path) -> bool:
    """Whether it is a manifest of a layout before 3, which had no checksum."""
    try:
        held = json.loads(manifest.read_bytes())
    except (OSError, ValueError):
        return False
    return (
        isinstance(held, dict)
        and {"identity", "needs"} <= held.keys()
        and "sha256" not in held
        and held.get("layout") in (None, 1, 2)
    )


def packed(matrix: Tensor) -> Tensor:
    """(n, n), symmetric -> (n (n + 1) / 2,) on the CPU: its upper triangle, row after row."""
    n, held = len(matrix), matrix.cpu()
    return torch.cat([held[row, row:] for row in range(n)])


def unpacked(triangle: Tensor) -> Tensor:
    """The symmetric matrix (n, n) of an upper triangle (n (n + 1) / 2,).

    Raises:
        ValueError: no triangle has so many entries.
    """
    n = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    if n * (n + 1) // 2 != len(triangle):
        raise ValueError(f"{len(triangle)} numbers are no triangle of a matrix")
    matrix = triangle.new_empty(n, n)
    for row, part in enumerate(triangle.split([n - row for row in range(n)])):
        matrix[row, row:] = part
    for start in range(0, n, _ROWS):  # a column at a time would touch every line of memory n times
        stop = min(start + _ROWS, n)
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix
