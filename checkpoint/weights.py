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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ModelError
from .fingerprint import Tell, fingerprint
from .untrusted.files import INDEX as INDEX_BYTES
from .untrusted.files import require_path, size_of
from .untrusted.foreign import foreign
from .untrusted.gguf_header import require_sound
from .untrusted.json_text import json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATING = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class WeightSource(ABC):
    """The tensors of one checkpoint, by their names on disk."""

    files: tuple[Path, ...]
    _fingerprint: str | None = None

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
    """One or many safetensors shards in a folder."""

    def __init__(self, folder: Path) -> None:
        self._where = _locate_shards(folder)
        self.files = tuple(sorted({folder / file for file in self._where.values()}))
        self._folder = folder
        headers = {name: entry for file in self.files for name, entry in _header(file).items()}
        self._shapes = {name: shape for name, (shape, _) in headers.items()}
        self._dtypes = {name: dtype for name, (_, dtype) in headers.items()}
        lost = sorted(set(self._where) - set(self._shapes))
        if lost:
            raise CheckpointError(
                f"{folder / INDEX} promises {len(lost)} tensors that no shard holds, '{lost[0]}' first "
                f"(it should be in {self._where[lost[0]]}).",
                "Download or copy the checkpoint again.",
            )

    @property
    def fingerprinted(self) -> tuple[Path, ...]:
        index = self._folder / INDEX
        return (*self.files, index) if index.is_file() else self.files

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes[name]

    @property
    def dtype(self) -> torch.dtype:
        numbers = Counter[torch.dtype]()
        for name in self._where:
            if (dtype := _FLOATING.get(self._dtypes[name])) is not None:
                numbers[dtype] += math.prod(self._shapes[name])
        return numbers.most_common(1)[0][0] if numbers else torch.float32

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors; each shard is opened once."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._where[name]].append(name)
        tensors: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            path = self._folder / file
            try:
                with safe_open(path, framework="pt", device="cpu") as shard:
                    tensors.update({name: shard.get_tensor(name).clone() for name in wanted})
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"Cannot read {', '.join(wanted[:3])} from {path}: {error}", "Download or copy that shard again."
                ) from error
        return tensors


def _locate_shards(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or the single file.

    Raises:
        CheckpointError: the index is damaged, or shards are missing.
        ModelError: the folder holds no safetensors.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        where = read_index(index)
        outside = sorted({file for file in where.values() if Path(file).name != file or file == ".."})
        if outside:
            raise CheckpointError(f"{index} points outside its folder: '{outside[0]}'.", "Do not use this checkpoint.")
        missing = sorted({file for file in where.values() if not (folder / file).is_file()})
        if missing:
            total = len(set(where.values()))
            raise CheckpointError(
                f"{folder}: {len(missing)} of {total} shards are missing, {missing[0]} first.", "Finish the download."
            )
        return where
    if single.is_file():
        return dict.fromkeys(_header(single), single.name)
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds pickled weights ({pickled[0]}); unpickling can run code, so lrc does not read them.",
            "Convert it first: load it where you trust it and save_pretrained() it as safetensors.",
        )
    raise ModelError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}.", "Give a folder with safetensors shards.")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index of shards says.

    Raises:
        CheckpointError: it is damaged, or names a file that none can be called.
    """
    try:
        where = json_object(path, INDEX_BYTES).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError("weight_map must give a file name for each tensor.")
        for file in set(where.values()):
            require_path(file, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not an index of shards: {error.what}", "Download it again.") from error
    return where


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype in safetensors' spelling) of every tensor; opening checks the header and the file's length.

    Raises:
        CheckpointError: the file is truncated or corrupt.
    """
    what = f"{path} ({size_of(path) or 0} bytes) is truncated or corrupt"
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
        from gguf import GGUFReader
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        self.files = (path,)
        config = model.config.to_dict()
        if config.get("num_experts") or config.get("num_local_experts"):
            raise ModelError(
                f"{path.name}: experts of a mixture ({config['model_type']}) are not read from GGUF.", "Use safetensors."
            )
        require_sound(path)
        with foreign(CheckpointError, f"{path} cannot be read as GGUF", "Get the file again."):
            reader = GGUFReader(path)
            architecture = str(reader.fields["general.architecture"].contents())
            self._processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
            self._map = get_gguf_hf_weights_map(model, self._processor)
        # with offsets, later reads need neither the header (a whole vocabulary) nor a permanent mapping
        known = {self._map[t.name]: t for t in reader.tensors if t.name in self._map}
        self._layout = {name: (int(t.data_offset), t.data.shape, t.data.dtype) for name, t in known.items()}
        self._types = {name: (t.name, t.tensor_type) for name, t in known.items()}

    def names(self) -> list[str]:
        return list(self._layout)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

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
