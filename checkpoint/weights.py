"""Reading a checkpoint tensor by tensor, so that the whole model is never in memory.

Two kinds of file are read: safetensors shards and GGUF. Pickled weights are refused, because unpickling runs code. Every read
opens the file, copies the requested tensors and closes it again: pages of a mapped file count as resident memory as long as the
mapping exists, so a model that is read layer by layer would otherwise become resident as a whole.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ModelError
from .atomic import unique_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors$")  # transformers' own pattern
_ROWS = 1 << 22  # numbers of each of two tensors that are compared at a time
_SAMPLE = 1 << 20
_FLOATING = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class WeightSource(ABC):
    """The tensors of one checkpoint, by their names on disk."""

    files: tuple[Path, ...]
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

    def equal(self, first: str, second: str, dtype: torch.dtype) -> bool:
        """Whether two tensors of the checkpoint hold the same numbers once they are in this dtype."""
        held = self.read([first, second])
        return torch.equal(held[first].to(dtype), held[second].to(dtype))

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of most of the numbers; float32 for a file with quantized blocks (GGUF)."""

    def fingerprint(self) -> str:
        """sha256 over the files' names, sizes and three samples of 1 MiB (start, middle, end) of each.

        It distinguishes checkpoints without reading 140 GB; it does not prove that a file is intact.
        """
        digest = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in (0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
        return digest.hexdigest()


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
        self.unread = found.unread
        self._shapes = {name: headers[file][name][0] for name, file in self._where.items()}
        self._dtypes = {name: headers[file][name][1] for name, file in self._where.items()}

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

    def equal(self, first: str, second: str, dtype: torch.dtype) -> bool:
        return _same_values((self._where[first], first), (self._where[second], second), dtype)


@dataclass(frozen=True)
class WeightFiles:
    """The files that `from_pretrained` reads of a folder.

    Args:
        files: in the order of reading; of a tensor that several files hold, transformers takes the last.
        listed: tensor -> the file that the index names, as in `files`; empty without an index.
        index: the index; None without one.
        unread: names of other weight files in the folder; transformers does not read them either.
    """

    files: tuple[Path, ...]
    listed: Mapping[str, Path] = field(default_factory=dict)
    index: Path | None = None
    unread: tuple[str, ...] = ()


def weight_files(folder: Path, config: Any = None) -> WeightFiles:
    """Which files of a folder are the model: those that `from_pretrained` of transformers reads, or a refusal.

    The order is that of `_get_resolved_checkpoint_files` (transformers 5.23): `transformers_weights` of config.json, else
    model.safetensors, else the index; then the `extra_files` of the configuration's class. An adapter, which transformers would
    add to the weights, and two complete sets of weights are refused. Variants and subfolders are not read, as there.

    Args:
        folder: the checkpoint.
        config: its transformers configuration; None where it is not known.

    Raises:
        CheckpointError: the index is damaged, or files that it names are missing.
        ModelError: the folder holds no safetensors, or it is not clear which files are the model.
    """
    refuse_adapter(folder)
    everything = sorted(path.name for path in folder.iterdir())
    if parts := [name for name in everything if _DISTRIBUTED.match(name)]:
        raise ModelError(
            f"{folder} holds {len(parts)} files of a distributed checkpoint ({parts[0]}), which from_pretrained reads in place "
            f"of {SINGLE}.",
            "Load it in transformers and save_pretrained() it as ordinary safetensors.",
        )
    single, index = folder / SINGLE, folder / INDEX
    if explicit := explicit_file(config):
        found = _explicit(folder, explicit)
    elif single.is_file():
        _refuse_second_set(single, index)
        found = WeightFiles((single,))
    elif index.is_file():
        found = _indexed(folder, index)
    else:
        raise _no_weights(folder, everything)
    extra = tuple(path for name in getattr(type(config), "extra_files", ()) if (path := folder / name).is_file())
    read = {path.name for path in (*found.files, *extra)}
    unread = tuple(name for name in everything if fnmatch.filter([name], "*.safetensors") or name in _TORCH if name not in read)
    return replace(found, files=(*found.files, *(path for path in extra if path not in found.files)), unread=unread)


def named_weights(folder: Path) -> list[str]:
    """The files that config.json and the index of a snapshot name as weights, whether they are there or not."""
    named = []
    with contextlib.suppress(ValueError, OSError, AttributeError, RecursionError):
        named.append(str(json.loads((folder / "config.json").read_bytes()).get("transformers_weights") or ""))
    with contextlib.suppress(CheckpointError, OSError):
        named += read_index(folder / (named[0] if named and named[0].endswith(".index.json") else INDEX)).values()
    return sorted({name for name in named if name.endswith((".safetensors", ".safetensors.index.json")) and _inside(name)})


def explicit_file(config: Any) -> str | None:
    """`transformers_weights` of a configuration: the file that transformers reads in place of model.safetensors.

    A result of lrc has a sentence there, which transformers prints where lrc was not imported; that names no file.
    """
    named = getattr(config, "transformers_weights", None)
    return None if named is None or quantization_method(config) == "lrc" else str(named)


def quantization_method(config: Any) -> str | None:
    """`quant_method` of a configuration, or of its text part; None if it declares no quantization."""
    declared = declared_quantization(config)
    if declared.get("load_in_4bit") or declared.get("load_in_8bit"):
        return "bitsandbytes"
    method = declared.get("quant_method", "of unknown name" if declared else None)
    return None if method is None else str(getattr(method, "value", method))


def declared_quantization(config: Any) -> dict[str, Any]:
    """`quantization_config` of a configuration, or of its text part; empty if there is none."""
    parts = [config] if config is None else [config, config.get_text_config()]
    for part in parts:
        if declared := getattr(part, "quantization_config", None):
            return dict(declared) if isinstance(declared, Mapping) else dict(declared.to_dict())
    return {}


def refuse_adapter(folder: Path, name: str = "") -> None:
    """Refuse a folder with adapter_config.json: `from_pretrained` loads the base model and adds the adapter to it.

    Args:
        folder: where to look.
        name: what the user calls it; '' for its path.

    Raises:
        ModelError: the message names the adapter's kind and its base model, and says how to merge.
    """
    path, name = folder / ADAPTER, name or str(folder)
    if not path.is_file():
        return
    held: Any = {}
    with contextlib.suppress(ValueError, OSError, RecursionError):
        held = json.loads(path.read_bytes())
    described = held if isinstance(held, dict) else {}
    kind, base = (str(described.get(key) or "")[:200] for key in ("peft_type", "base_model_name_or_path"))
    what = f"a {kind.replace('LORA', 'LoRA')} adapter" if kind else "an adapter"
    ordinary = (folder / "config.json").is_file() and any((folder / file).is_file() for file in (SINGLE, INDEX))
    whole = ordinary or any(folder.glob("*.gguf"))
    if whole:
        situation = f"{name} holds weights and, beside them, {what} ({ADAPTER}), which from_pretrained adds to them."
        aside = f" To compress the weights without it, move {ADAPTER} and adapter_model.* to another folder."
    else:
        situation = f"{name} holds {what} ({ADAPTER}) and no model of its own; its base model is '{base or 'not named'}'."
        aside = ""
    if any(part in kind for part in ("PROMPT", "PREFIX", "P_TUNING")):
        raise ModelError(situation, "Such an adapter adds tokens and cannot be merged; compress the base model." + aside)
    if whole:
        moved = f"mkdir ADAPTER && mv {folder}/adapter_* ADAPTER && "
        model, origin = f"P.from_pretrained(M.from_pretrained('{folder}'), 'ADAPTER')", str(folder)
    else:
        moved, model, origin = "", f"P.from_pretrained(M.from_pretrained('{base or 'BASE'}'), '{name}')", base or "BASE"
    raise ModelError(
        situation,
        f'Merge it first (pip install peft), and give MERGED to lrc: {moved}python -c "from peft import PeftModel as P; '
        f"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; {model}.merge_and_unload()"
        f".save_pretrained('MERGED'); T.from_pretrained('{origin}').save_pretrained('MERGED')\"." + aside,
    )


def _explicit(folder: Path, named: str) -> WeightFiles:
    """What config.json's `transformers_weights` names: a safetensors file, or an index of shards in the folder."""
    path = folder / named
    if not _inside(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"{folder}: config.json names '{named[:200]}' as its weights (transformers_weights), which is no safetensors file "
            "in the folder.",
            "Put right or remove that entry.",
        )
    if not path.is_file():
        raise CheckpointError(f"{folder}: config.json names {named} as its weights, and there is no such file.",
                              "Finish the download, or remove transformers_weights from config.json.")  # fmt: skip
    return _indexed(folder, path) if named.endswith(".index.json") else WeightFiles((path,))


def _refuse_second_set(single: Path, index: Path) -> None:
    """Refuse model.safetensors beside a complete set of shards: transformers reads the one, other tools the other."""
    if not index.is_file():
        return
    try:
        shards = {file for file in read_index(index).values() if file != single.name}
    except CheckpointError:
        return  # left over from shards that are no longer there; transformers does not read it
    if shards and all((index.parent / file).is_file() for file in shards):
        raise ModelError(
            f"{index.parent} holds two sets of weights: {single.name}, which from_pretrained reads, and {index.name} with "
            f"{len(shards)} shards ({min(shards)}), which other programs read.",
            f"Keep one: move {single.name} away, or {index.name} and its shards.",
        )


def _indexed(folder: Path, index: Path) -> WeightFiles:
    listed = read_index(index)
    if outside := sorted(file for file in set(listed.values()) if not _inside(file)):
        raise CheckpointError(f"{index} points outside its folder: '{outside[0]}'.", "Do not use this checkpoint.")
    shards = sorted(set(listed.values()))
    missing = [file for file in shards if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing, {missing[0]} first.", "Finish the download."
        )
    return WeightFiles(tuple(folder / file for file in shards), {name: folder / file for name, file in listed.items()}, index)


def _inside(file: str) -> bool:
    """Whether a path that the checkpoint names stays in its folder; links are not followed (the hub's cache is made of them)."""
    return not os.path.isabs(file) and Path(os.path.normpath(file)).parts[:1] not in ((), ("..",))


def read_index(index: Path) -> dict[str, str]:
    """Tensor -> file of an index of shards.

    Raises:
        CheckpointError: it is no index, lists nothing, or lists a tensor twice.
    """
    try:
        held = unique_json(index.read_bytes())
        listed = held["weight_map"]
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise TypeError("weight_map must give a file name for each tensor")
        if not isinstance(held.get("metadata"), dict):
            raise TypeError("it has no 'metadata', which from_pretrained needs")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards: {type(error).__name__}: {str(error)[:120]}", "Download it again."
        ) from error
    if not listed:
        raise CheckpointError(f"{index} lists no tensor: its weight_map is empty.", "Download it again.")
    return listed


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


def _no_weights(folder: Path, everything: Iterable[str]) -> ModelError:
    pickled = sorted(name for pattern in _PICKLED for name in fnmatch.filter(everything, pattern))
    if pickled:
        return ModelError(
            f"{folder} holds pickled weights ({pickled[0]}); unpickling can run code, so lrc does not read them.",
            "Convert it first: load it where you trust it and save_pretrained() it as safetensors.",
        )
    if others := fnmatch.filter(everything, "*.safetensors*"):
        return ModelError(
            f"{folder} holds neither {SINGLE} nor {INDEX}, and from_pretrained reads no other file: not {others[0]}.",
            f"If that is the model (a variant, or a file with another name), call it {SINGLE}, or write an index.",
        )
    inside = sorted(path.parent.name for name in (SINGLE, INDEX) for path in folder.glob(f"*/{name}"))
    return ModelError(
        f"{folder} holds no weights: neither {SINGLE} nor {INDEX}.",
        f"Its folder {inside[0]} holds some: give that one." if inside else "Give a folder with safetensors shards.",
    )


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype in safetensors' spelling) of every tensor; opening checks the header and the file's length.

    Raises:
        CheckpointError: the file is truncated or corrupt.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or corrupt: {error}", "Download or copy that shard again."
        ) from error


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
        try:
            reader = GGUFReader(path)
            architecture = str(reader.fields["general.architecture"].contents())
        except (OSError, ValueError, IndexError, KeyError) as error:
            size = path.stat().st_size if path.is_file() else 0
            raise CheckpointError(f"{path} ({size} bytes) cannot be read as GGUF: {error}", "Get the file again.") from error
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
            done = self._processor.process(
                weights=dequantize(data.reshape(shape), kind), name=stored, tensor_key_mapping=self._map, parsed_parameters={}
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
