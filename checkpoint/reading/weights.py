"""Reading a checkpoint tensor by tensor, so that the whole model is never in memory.

Two kinds of file are read: safetensors shards and GGUF. Pickled weights are refused, because unpickling runs code. Every read
opens the file, copies the requested tensors and closes it again: pages of a mapped file count as resident memory as long as the
mapping exists, so a model that is read layer by layer would otherwise become resident as a whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ...errors import CheckpointError, ModelError
from ..untrusted.foreign import foreign
from ..untrusted.gguf_header import require_sound
from ..untrusted.weights_header import data_places, require_short_header
from .ahead import Extent
from .fingerprint import Tell, fingerprint
from .gguf_lean import one_name_map
from .which import WeightFiles, weight_files

_ROWS = 1 << 22  # numbers of each of two tensors that are compared at a time
_FLOATING = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class WeightSource(ABC):
    """The tensors of one checkpoint, by their names on disk."""

    files: tuple[Path, ...]
    _fingerprint: str | None = None
    unread: tuple[str, ...] = ()  # other weight files beside these

    @abstractmethod
    def names(self) -> list[str]:
        """The names of all tensors in the checkpoint."""

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Copies of the named tensors on the CPU, in the dtype of the file.

        Raises:
            CheckpointError: a file is missing, truncated or corrupt, or lacks the tensor; the message names both.
        """

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape in the file's header; None if the file stores the tensor in another layout (GGUF)."""

    def stored_dtype(self, name: str) -> str | None:
        """The dtype in the file's header, in safetensors' spelling; None if the file has another layout (GGUF)."""
        return None

    @abstractmethod
    def extents(self, names: Iterable[str]) -> list[Extent]:
        """The bytes on the disk that hold these tensors."""

    def equal(self, first: str, second: str, dtype: torch.dtype) -> bool:
        """Whether two tensors of the checkpoint hold the same numbers once they are in this dtype."""
        held = self.read([first, second])
        return torch.equal(held[first].to(dtype), held[second].to(dtype))

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of most of the numbers; float32 for a file with quantized blocks (GGUF)."""

    def fingerprint(self, tell: Tell = lambda done, total: None) -> str:
        """sha256 over every byte of the files (checkpoint/fingerprint.py).

        Args:
            tell: called after each file that had to be read, with the numbers of files read and to be read.

        Raises:
            CheckpointError: a file cannot be read.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.fingerprinted, tell)
        return self._fingerprint

    @property
    def fingerprinted(self) -> tuple[Path, ...]:
        """The files that the fingerprint covers: those with tensors, and the index that says which file holds which."""
        return self.files


class SafetensorsSource(WeightSource):
    """The safetensors files of a folder that `weight_files` finds.

    Args:
        folder: the checkpoint.
        config: its transformers configuration; None where it is not known.

    Raises:
        CheckpointError: a file is missing or damaged, or the index and the files disagree.
        ModelError: it is not clear which files are the model, or none are.
    """

    def __init__(self, folder: Path, config: Any = None) -> None:
        found = weight_files(folder, config)
        headers = {file: _header(file) for file in found.files}
        self._where = _places(found, headers)
        self.files = tuple(sorted(found.files))
        self.unread, self._index = found.unread, found.index
        self._shapes = {name: headers[file][name][0] for name, file in self._where.items()}
        self._dtypes = {name: headers[file][name][1] for name, file in self._where.items()}

    @property
    def fingerprinted(self) -> tuple[Path, ...]:
        return self.files if self._index is None else (*self.files, self._index)

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes[name]

    def stored_dtype(self, name: str) -> str | None:
        return self._dtypes[name]

    @property
    def dtype(self) -> torch.dtype:
        numbers = Counter[torch.dtype]()
        for name in self._where:
            if (dtype := _FLOATING.get(self._dtypes[name])) is not None:
                numbers[dtype] += math.prod(self._shapes[name])
        return numbers.most_common(1)[0][0] if numbers else torch.float32

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors; each shard is opened once."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._where[name]].append(name)
        tensors: dict[str, torch.Tensor] = {}
        for path, wanted in by_file.items():
            try:
                with safe_open(path, framework="pt", device="cpu") as shard:
                    tensors.update({name: shard.get_tensor(name).clone() for name in wanted})
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"Cannot read {', '.join(wanted[:3])} from {path}: {error}", "Download or copy that shard again."
                ) from error
        return tensors

    def extents(self, names: Iterable[str]) -> list[Extent]:
        return [Extent(self._where[name], *self._bytes[self._where[name]][name]) for name in names]

    @cached_property
    def _bytes(self) -> dict[Path, dict[str, tuple[int, int]]]:
        return {path: data_places(path) for path in self.files}

    def equal(self, first: str, second: str, dtype: torch.dtype) -> bool:
        return _same_values((self._where[first], first), (self._where[second], second), dtype)


def _places(found: WeightFiles, headers: Mapping[Path, Mapping[str, Any]]) -> dict[str, Path]:
    """Tensor -> the file that transformers takes it from: the last that holds it. The index must say the same."""
    holders: dict[str, list[Path]] = defaultdict(list)
    for file in found.files:
        for name in headers[file]:
            holders[name].append(file)
    if found.index is None:
        return {name: files[-1] for name, files in holders.items()}
    if lost := sorted(set(found.listed) - set(holders)):
        raise CheckpointError(
            f"{found.index} promises {len(lost)} tensors that no shard holds, '{lost[0]}' first "
            f"(it should be in {found.listed[lost[0]].name}).",
            "Download or copy the checkpoint again.",
        )
    shards = set(found.listed.values())
    if unlisted := sorted(name for name in set(holders) - set(found.listed) if holders[name][-1] in shards):
        raise CheckpointError(
            f"{found.index} does not list {len(unlisted)} tensors that its shards hold, '{unlisted[0]}' in "
            f"{holders[unlisted[0]][-1].name} first; from_pretrained loads them.",
            "Download both again, or load the model in transformers and save_pretrained() it.",
        )
    for name, says in found.listed.items():
        takes = holders[name][-1]
        if says in holders[name] and says != takes and not _same_values((says, name), (takes, name)):
            raise CheckpointError(
                f"'{name}' has other values in {says.name}, where {found.index.name} says it is, than in {takes.name}, from "
                "which from_pretrained takes it.",
                "Download both shards again.",
            )
    order = {**found.listed, **holders}  # the index's order
    return {name: holders[name][-1] for name in order}


def _same_values(first: tuple[Path, str], second: tuple[Path, str], dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors (file, name) hold the same numbers, in `dtype` if it is given; some rows at a time are in memory."""
    with safe_open(first[0], framework="pt") as one, safe_open(second[0], framework="pt") as other:
        left, right = one.get_slice(first[1]), other.get_slice(second[1])
        shape = left.get_shape()
        if shape != right.get_shape():
            return False
        if dtype is None and left.get_dtype() != right.get_dtype():
            return False
        rows = max(1, _ROWS // max(1, math.prod(shape[1:])))
        pieces = [slice(start, start + rows) for start in range(0, shape[0], rows)] if shape else [...]
        pairs = ((left[piece], right[piece]) for piece in pieces)
        return all(torch.equal(a.to(dtype or a.dtype), b.to(dtype or b.dtype)) for a, b in pairs)


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype in safetensors' spelling) of every tensor; opening checks the header and the file's length.

    Raises:
        CheckpointError: the file is truncated or corrupt.
    """
    what = f"{path} ({require_short_header(path)} bytes) is truncated or corrupt"
    with foreign(CheckpointError, what, "Download or copy that shard again."), safe_open(path, framework="pt") as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


class GgufSource(WeightSource):
    """The tensors of a GGUF file, dequantized one at a time.

    Names and changes of layout (such as the rotary permutation of q and k) come from transformers' own table of GGUF
    architectures. Mixtures of experts are not read, because GGUF stores their experts fused.

    Args:
        path: the file.
        model: the model on the meta device; transformers derives the names from it.

    Raises:
        ModelError: the model is a mixture of experts.
        CheckpointError: the file cannot be read as GGUF.
    """

    def __init__(self, path: Path, model: Any) -> None:
        from gguf import GGMLQuantizationType
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        self.files = (path,)
        config = model.config.to_dict()
        if config.get("num_experts") or config.get("num_local_experts"):
            raise ModelError(
                f"{path.name}: experts of a mixture ({config['model_type']}) are not read from GGUF.", "Use safetensors."
            )
        header = require_sound(path)
        with foreign(CheckpointError, f"{path} cannot be read as GGUF", "Get the file again."), one_name_map():
            self._processor = TENSOR_PROCESSORS.get(header.scalars["general.architecture"], TensorProcessor)(config=config)
            self._map = get_gguf_hf_weights_map(model, self._processor)
        # with offsets, reads need neither the header (a whole vocabulary) nor a permanent mapping
        self._layout: dict[str, tuple[int, tuple[int, ...], Any]] = {}
        self._types: dict[str, tuple[str, Any]] = {}
        for stored, shape in header.tensors.items():
            if (name := self._map.get(stored)) is not None:
                kind, offset = header.places[stored]
                self._types[name] = (stored, GGMLQuantizationType(kind))
                self._layout[name] = (offset, *_stored_as(tuple(reversed(shape)), GGMLQuantizationType(kind)))

    def names(self) -> list[str]:
        return list(self._layout)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32  # as they are read

    def extents(self, names: Iterable[str]) -> list[Extent]:
        held = {name: self._layout[name] for name in names}
        return [
            Extent(self.files[0], offset, math.prod(shape) * np.dtype(dtype).itemsize) for offset, shape, dtype in held.values()
        ]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, dequantized to float32."""
        from gguf import dequantize

        tensors = {}
        for name in names:
            offset, shape, dtype = self._layout[name]
            stored, kind = self._types[name]
            count = math.prod(shape)
            data = np.fromfile(self.files[0], dtype=dtype, count=count, offset=offset)
            if data.size != count:
                raise CheckpointError(
                    f"{self.files[0]} ends inside '{stored}': {data.size} of {count} values.", "Get the file again."
                )
            # scales of a damaged block overflow; whoever asked for the weights refuses what is not finite
            with foreign(CheckpointError, f"{self.files[0]}: '{stored}'", "Get the file again."), np.errstate(all="ignore"):
                done = self._processor.process(
                    weights=dequantize(data.reshape(shape), kind),
                    name=stored,
                    tensor_key_mapping=self._map,
                    parsed_parameters={},
                )
                tensors[name] = torch.tensor(done.weights)
        return tensors


def dtype_of_gguf(path: Path) -> torch.dtype:
    """The dtype for a model of a GGUF file: that of most of its numbers, and bfloat16 where those are quantized.

    float32 would hold nothing more of a quantized matrix that a calculation in 16 bits could use, in twice the bytes.
    """
    header = require_sound(path)
    numbers = Counter[int]()
    for name, shape in header.tensors.items():
        numbers[header.places[name][0]] += math.prod(shape)
    from gguf import GGMLQuantizationType

    most = GGMLQuantizationType(numbers.most_common(1)[0][0]).name if numbers else "F32"
    return _FLOATING.get(most, torch.bfloat16)


def _stored_as(shape: tuple[int, ...], kind: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the array that `gguf.dequantize` wants of a tensor: numbers, or the bytes of its blocks."""
    from gguf.quants import quant_shape_to_byte_shape

    plain = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32,
             "I64": np.int64}  # fmt: skip
    return (shape, plain[kind.name]) if kind.name in plain else (quant_shape_to_byte_shape(shape, kind), np.uint8)


def numbers_held(shards: SafetensorsSource | None, gguf: Path) -> int:
    """How many numbers weight files hold, by their headers.

    Args:
        shards: the safetensors; None for a GGUF file.
        gguf: that file.
    """
    shapes = require_sound(gguf).tensors.values() if shards is None else [shards.shape(name) or () for name in shards.names()]
    return sum(map(math.prod, shapes))


def group_by_prefix(source_to_target: Mapping[str, str], prefixes: Iterable[str]) -> dict[str, list[str]]:
    """Module prefix -> the checkpoint's names of the tensors under it; '' -> all other names.

    Args:
        source_to_target: name in the checkpoint -> name in the model.
        prefixes: module paths in the model.
    """
    ordered = list(prefixes)
    groups: dict[str, list[str]] = {prefix: [] for prefix in [*ordered, ""]}
    for source, target in source_to_target.items():
        home = next((prefix for prefix in ordered if target.startswith(prefix + ".")), "")
        groups[home].append(source)
    return groups
