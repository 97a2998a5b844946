"""Which files of a folder are the model's weights: those that `from_pretrained` of transformers reads, or a refusal."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ModelError
from ..untrusted.files import CONFIG as CONFIG_BYTES
from ..untrusted.files import INDEX as INDEX_BYTES
from ..untrusted.files import require_path
from ..untrusted.json_text import json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# the content of adapter_config.json in an export; ... stands for a value of the export's own
EMBEDDED: Mapping[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True, "r": ...,
    "lora_alpha": ..., "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "target_modules": ..., "rank_pattern": ...,
    "alpha_pattern": ...,
}  # fmt: skip
_ADAPTER_BYTES = 1 << 20
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors$")  # transformers' own pattern


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

    An adapter that is part of an export of lrc's is let through, see `is_embedded`.

    Args:
        folder: where to look.
        name: what the user calls it; '' for its path.

    Raises:
        ModelError: the message names the adapter's kind and its base model, and says how to merge.
    """
    path, name = folder / ADAPTER, name or str(folder)
    if not path.is_file() or is_embedded(folder):
        return
    held: Any = {}
    with contextlib.suppress(ValueError, OSError, RecursionError), path.open("rb") as file:
        held = json.loads(file.read(_ADAPTER_BYTES))  # whatever it says, the folder is refused
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


def is_embedded(folder: Path) -> bool:
    """Whether a folder holds codes and their corrections as a LoRA adapter of PEFT, as `lrc export` writes them.

    Such a model is opened as a whole, for evaluation; its codes cannot be compressed, so no command leaves the adapter out. The
    adapter may hold nothing but what lrc writes: another key may name code or another model, and weights are never pickled.
    """
    try:
        with (folder / ADAPTER).open("rb") as file:
            held = json.loads(file.read(_ADAPTER_BYTES))
        with (folder / "config.json").open("rb") as file:
            method = json.loads(file.read(CONFIG_BYTES))["quantization_config"]["quant_method"]
        plain = held.keys() == EMBEDDED.keys() and all(held[key] == value for key, value in EMBEDDED.items() if value != ...)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    files = [path.name for path in folder.iterdir() if fnmatch.fnmatch(path.name.lower(), "adapter_model*")]
    return bool(plain and method in ("compressed-tensors", "gptq") and files == [ADAPTER_WEIGHTS])


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
    """Whether a path that the checkpoint names stays in its folder; links are not followed (the hub's cache has many)."""
    return not os.path.isabs(file) and Path(os.path.normpath(file)).parts[:1] not in ((), ("..",))


def read_index(index: Path) -> dict[str, str]:
    """Tensor -> file of an index of shards.

    Raises:
        CheckpointError: it is no index, lists nothing, or lists a tensor twice.
    """
    try:
        held = json_object(index, INDEX_BYTES)
        listed: Any = held.get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise CheckpointError("weight_map must give a file name for each tensor.")
        if not isinstance(held.get("metadata"), dict):
            raise CheckpointError("it has no 'metadata', which from_pretrained needs.")
        for file in set(listed.values()):
            require_path(file, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{index} is not an index of shards: {error.what}", "Download it again.") from error
    if not listed:
        raise CheckpointError(f"{index} lists no tensor: its weight_map is empty.", "Download it again.")
    return listed


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
