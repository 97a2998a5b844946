"""A GGUF file whose tensors are written as they come: their places are reserved first.

The package gguf writes tensors in the order in which it learnt of them. Here the header is written before any tensor is read,
and each goes to its place, so that neither memory nor a second file holds the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Place:
    """What a tensor of the file is.

    Args:
        shape: of its numbers, the fastest axis last.
        kind: its GGMLQuantizationType; None for float32.
        nbytes: bytes in the file.
    """

    shape: tuple[int, ...]
    kind: Any
    nbytes: int


class Placed:
    """The tensors of a file, to be put into their places in any order.

    Args:
        writer: a GGUFWriter that knows all settings.
        places: name -> what it will hold.
    """

    def __init__(self, writer: Any, places: Mapping[str, Place]) -> None:
        from gguf import GGMLQuantizationType

        self._writer, self._places = writer, dict(places)
        self._offsets: dict[str, int] = {}
        end = 0
        for name, place in places.items():
            kind = GGMLQuantizationType.F32 if place.kind is None else place.kind
            # a dtype that is not uint8 makes the writer take the shape as that of the numbers
            writer.add_tensor_info(name, place.shape, np.dtype(np.float32), place.nbytes, raw_dtype=kind)
            self._offsets[name] = end
            end += writer.ggml_pad(place.nbytes, writer.data_alignment)
        self._end = end

    def __enter__(self) -> Placed:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self._file = self._writer.fout[0]
        self._writer.write_padding(self._file, self._file.tell())
        self._start = self._file.tell()
        self._file.truncate(self._start + self._end)
        return self

    def put(self, name: str, array: Any) -> None:
        """Write one tensor.

        Raises:
            KeyError: there is no place of this name, or it was filled before.
            ValueError: the place has another size.
        """
        place = self._places.pop(name)
        if array.nbytes != place.nbytes:
            raise ValueError(f"'{name}' has {array.nbytes} bytes, and its place {place.nbytes}")
        self._file.seek(self._start + self._offsets[name])
        self._file.write(np.ascontiguousarray(array).data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
        if kind is None and self._places:
            raise ValueError(f"no tensor was written for {sorted(self._places)[:3]} and {len(self._places)} in all")
