"""The header of a GGUF file, walked before gguf's own reader believes it.

That reader allocates and loops by the counts in the header, and cuts silently what lies beyond the end of the file. Here every
count and length is compared with the bytes that are left, and every tensor's place with the file's size. The format is
specified in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, LrcError, ModelError, brief
from .counts import require_counts
from .files import size_of

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_LONGEST_KEY = 65_535  # bytes, by the specification
_LONGEST_NAME = 1_024  # ggml itself allows 63
_LONGEST_TEXT = 16 << 20  # a chat template has some thousands
_NESTED = 4  # arrays in arrays
# gguf's reader makes three objects per element; the largest vocabulary has 262,144 tokens with scores, types and merges
_ELEMENTS = 2_000_000
_HEADER = 256 << 20  # bytes
_LEAST_ENTRY = 13  # bytes of the shortest key with its value
_LEAST_TENSOR = 32  # bytes of the shortest description of a tensor
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufHeader:
    """What the header says.

    Args:
        scalars: key -> value, for settings that are one number or one text.
        tensors: name -> shape as stored, the fastest axis first.
        places: name of a tensor -> (its type, the byte of the file at which its data begin).
        spans: key -> the bytes of the file at which its entry begins (its name included) and ends.
        counts: key -> number of elements, for settings that are arrays.
    """

    scalars: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    places: dict[str, tuple[int, int]]
    spans: dict[str, tuple[int, int]]
    counts: dict[str, int]


def require_sound(path: Path) -> GgufHeader:
    """Walk the header of a GGUF file.

    Raises:
        CheckpointError: the file is missing, truncated, damaged or forged.
        ModelError: it is one part of several, of a version or byte order that is not read, or its counts do not fit.
    """
    size = size_of(path)
    if size is None:
        raise CheckpointError(f"{brief(str(path))} is missing.", "Get the file again.")
    found = path.stat()
    return _walked(path, size, found.st_ino, found.st_mtime_ns)


@functools.lru_cache(maxsize=4)  # a header is asked for before the configuration, the tokenizer and the weights are read
def _walked(path: Path, size: int, *_: int) -> GgufHeader:
    refused: Callable[[str], LrcError] = lambda why: CheckpointError(  # noqa: E731
        f"{brief(str(path))} ({size} bytes) cannot be read as GGUF: {why}", "Get the file again."
    )
    if size < 24:
        raise refused("it is shorter than the shortest header.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            header = _Walk(data).header()
        except _DamagedError as error:
            raise refused(str(error)) from error
    split = header.scalars.get("split.count", 1)
    if _SPLIT.search(path.name) or (isinstance(split, int) and split > 1):
        raise ModelError(
            f"{brief(str(path))} is one part of a GGUF model in several files, which lrc does not read.",
            "Join them first: llama-gguf-split --merge FIRST-PART OUT.gguf.",
        )
    require_counts(header.scalars, len(header.tensors), 0, brief(str(path)))
    return header


class _DamagedError(Exception):
    """Why a header cannot be believed."""


class _Walk:
    """One pass over the header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.elements = data, len(_MAGIC), 0
        self.spans: dict[str, tuple[int, int]] = {}
        self.counts: dict[str, int] = {}

    def header(self) -> GgufHeader:
        """The header, checked against the file's size."""
        if self.data[:4] != _MAGIC:
            raise _DamagedError("GGUF magic invalid")
        version = self.number("<I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            if swapped in _VERSIONS:
                raise _DamagedError("its byte order is big-endian; only little-endian files are read")
            raise _DamagedError(f"it has version {version}; versions 2 and 3 are read")
        tensors, keys = self.number("<Q"), self.number("<Q")
        for what, count, least in (("tensors", tensors, _LEAST_TENSOR), ("keys", keys, _LEAST_ENTRY)):
            if count * least > len(self.data) - self.at:
                raise _DamagedError(f"it says that it holds {count} {what}, for which it is too short")
        scalars = self.settings(keys)
        infos = [self.tensor() for _ in range(tensors)]
        alignment = scalars.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise _DamagedError(f"general.alignment is {brief(str(alignment))}, not a power of two")
        start = -(-self.at // alignment) * alignment
        self.require_places(infos, start, alignment)
        places = {name: (kind, start + offset) for name, _, kind, offset in infos}
        return GgufHeader(scalars, {name: shape for name, shape, _, _ in infos}, places, self.spans, self.counts)

    def settings(self, count: int) -> dict[str, Any]:
        """Read the keys with their values; those of arrays are left out."""
        scalars: dict[str, Any] = {}
        seen: set[str] = set()
        for _ in range(count):
            begin = self.at
            key = self.text(_LONGEST_KEY, "a key")
            if key in seen:
                raise _DamagedError(f"the key '{brief(key)}' is given twice")
            seen.add(key)
            kind = self.number("<I")
            if kind == _ARRAY:
                self.array(key, 1)
            elif kind == _STRING:
                scalars[key] = self.text(_LONGEST_TEXT, f"'{brief(key)}'")
            elif kind in _SCALARS:
                scalars[key] = self.number(_SCALARS[kind])
            else:
                raise _DamagedError(f"'{brief(key)}' has the unknown type {kind}")
            self.spans[key] = (begin, self.at)
        if not isinstance(scalars.get("general.architecture"), str):
            raise _DamagedError("general.architecture is missing, or no text")
        return scalars

    def array(self, key: str, depth: int) -> None:
        """Step over an array, with all its lengths checked."""
        kind, count = self.number("<I"), self.number("<Q")
        self.counts.setdefault(key, count)
        self.elements += count
        if self.elements > _ELEMENTS:
            raise _DamagedError(f"with '{brief(key)}' its arrays hold more than {_ELEMENTS:,} elements")
        if kind in _SCALARS:
            self.step(count * struct.calcsize(_SCALARS[kind]), f"'{brief(key)}'")
        elif kind == _STRING:
            shown = f"'{brief(key)}'"
            for _ in range(count):
                self.step(self.number("<Q"), shown)
        elif kind == _ARRAY and depth < _NESTED:
            for _ in range(count):
                self.array(key, depth + 1)
        else:
            raise _DamagedError(f"'{brief(key)}' is an array of the unknown type {kind}, or nested too deeply")

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of the next tensor."""
        name = self.text(_LONGEST_NAME, "a tensor's name")
        axes = self.number("<I")
        if axes > 4:
            raise _DamagedError(f"'{brief(name)}' has {axes} axes; the most is 4")
        shape = tuple(self.number("<Q") for _ in range(axes))
        return name, shape, self.number("<I"), self.number("<Q")

    def require_places(self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int) -> None:
        """Compare types, sizes and places of the tensors' data with the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        places, names, known = [], set[str](), set(GGMLQuantizationType)
        for name, shape, kind, offset in infos:
            shown = brief(name)
            if name in names:
                raise _DamagedError(f"the tensor '{shown}' is there twice")
            names.add(name)
            if kind not in known:
                raise _DamagedError(f"'{shown}' has the unknown type {kind}")
            block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if not shape or 0 in shape or shape[0] % block:
                raise _DamagedError(f"'{shown}' has the shape {shape}, which its type with blocks of {block} cannot have")
            if offset % alignment:
                raise _DamagedError(f"'{shown}' begins at byte {offset} of the data, not at a multiple of {alignment}")
            end = offset + math.prod(shape) // block * nbytes
            if start + end > len(self.data):
                raise _DamagedError(f"'{shown}' of shape {shape} ends {start + end - len(self.data)} bytes beyond the file")
            places.append((offset, end, shown))
        places.sort()
        for (_, end, one), (offset, _, other) in itertools.pairwise(places):
            if offset < end:
                raise _DamagedError(f"'{one}' and '{other}' lie over each other")

    def number(self, kind: str) -> Any:
        """The next number of a struct format."""
        try:
            (value,) = struct.unpack_from(kind, self.data, self.at)
        except struct.error as error:
            raise _DamagedError("it ends inside its header") from error
        self.at += struct.calcsize(kind)
        return value

    def text(self, most: int, what: str) -> str:
        """The next text."""
        length = self.number("<Q")
        if length > most:
            raise _DamagedError(f"the length of {what} is {length} bytes; the most is {most}")
        begin = self.at
        self.step(length, what)
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError as error:
            raise _DamagedError(f"{what} is not UTF-8 text") from error

    def step(self, nbytes: int, what: str) -> None:
        """Step over so many bytes."""
        if nbytes > len(self.data) - self.at:
            raise _DamagedError(f"it ends inside {what}")
        self.at += nbytes
        if self.at > _HEADER:
            raise _DamagedError(f"its header has more than {_HEADER:,} bytes")
