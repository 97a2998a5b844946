"""Forged and damaged files of a checkpoint: each function spoils a folder that was sound."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
DEEP = 100_000
Forgery = Callable[[Path], object]

# what nobody expects where something else should be; as JSON texts, because Python cannot write all of them
NASTY = (
    "null", "true", "-1", "0", "1", "1e18", "1000000000000000000", "9" * 4000, "-9223372036854775809", "1e999", "NaN",
    "-Infinity", "0.5", '""', '"x"', '"\\ud800"', '"\\u0000"', '"../../etc/passwd"', '"/dev/zero"', json.dumps("n" * 5000),
    "[]", "[1]", "[[]]", "{}", '{"kind": "low-rank"}', '{"a": {"a": {}}}', "[null, {}]", "[" * DEEP + "]" * DEEP,
    '{"a":' * 300 + "1" + "}" * 300,
)  # fmt: skip


def put(file: str, content: str | bytes) -> Forgery:
    """The file with this content."""
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def setting(file: str, path: str, value: str) -> Forgery:
    """The JSON file with one value replaced by a JSON text."""
    return lambda folder: replace(folder / file, path.split("/"), value)


def replace(file: Path, path: list[str], value: str) -> None:
    """Put a JSON text in the place of one value of a JSON file."""
    held: Any = json.loads(file.read_text())
    at = held
    for key in path[:-1]:
        at = at[key if isinstance(at, dict) else int(key)]
    at[path[-1] if isinstance(at, dict) else int(path[-1])] = "@@here@@"
    file.write_text(json.dumps(held).replace('"@@here@@"', value, 1))


def fifo(name: str) -> Forgery:
    """A FIFO in the place of the file."""

    def forge(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return forge


def link(name: str, target: str) -> Forgery:
    """A link in the place of the file."""

    def forge(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return forge


def sparse(name: str, size: int) -> Forgery:
    """The file made longer by zeros that take no room on the disk."""

    def forge(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return forge


def twice(name: str, key: str) -> Forgery:
    """A second entry of the same key in front of the JSON object."""

    def forge(folder: Path) -> None:
        text = (folder / name).read_text().lstrip()
        (folder / name).write_text("{" + f'"{key}": {{}},' + text[1:])

    return forge


def header(edit: Callable[[dict[str, Any]], object]) -> Forgery:
    """The header of the first safetensors file, edited."""

    def forge(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        held = json.loads(data[8 : 8 + length])
        edit(held)
        text = json.dumps(held).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return forge


def header_length(length: int) -> Forgery:
    """The first safetensors file says that its header has this length."""

    def forge(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    return forge


def resealed(forgery: Forgery) -> Forgery:
    """The forgery by someone who also writes the new hashes into lrc.json."""

    def forge(folder: Path) -> None:
        forgery(folder)
        record = json.loads((folder / "lrc.json").read_text())
        for name in record["sha256"]:
            record["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (folder / "lrc.json").write_text(json.dumps(record))

    return forge


def long_name(held: dict[str, Any]) -> None:
    """The first tensor in a safetensors header gets a name of 5,000 characters."""
    held["n" * 5000] = held.pop(next(name for name in held if name != "__metadata__"))


def first_entry(held: dict[str, Any]) -> dict[str, Any]:
    """The first tensor in a safetensors header."""
    return next(entry for name, entry in held.items() if name != "__metadata__")


# of any checkpoint in a folder, with an index
OF_MODELS: dict[str, Forgery] = {
    "config-list": put("config.json", "[]"),
    "config-null": put("config.json", "null"),
    "config-empty": put("config.json", ""),
    "config-utf16": put("config.json", '{"model_type": "llama"}'.encode("utf-16")),
    "config-deep": put("config.json", "[" * DEEP + "]" * DEEP),
    "config-deep-object": put("config.json", '{"model_type": "llama", "x": ' + '{"a":' * DEEP + "1" + "}" * DEEP + "}"),
    "config-500-mb": sparse("config.json", 500 << 20),
    "config-fifo": fifo("config.json"),
    "config-device": link("config.json", "/dev/zero"),
    "config-loop": link("config.json", "config.json"),
    "layers-1e5": setting("config.json", "num_hidden_layers", "100000"),
    "layers-1e18": setting("config.json", "num_hidden_layers", "1000000000000000000"),
    "layers-negative": setting("config.json", "num_hidden_layers", "-1"),
    "layers-text": setting("config.json", "num_hidden_layers", '"two"'),
    "heads-zero": setting("config.json", "num_attention_heads", "0"),
    "heads-1e18": setting("config.json", "num_attention_heads", "1000000000000000000"),
    "hidden-negative": setting("config.json", "hidden_size", "-48"),
    "vocab-1e12": setting("config.json", "vocab_size", "1000000000000"),
    "vocab-null": setting("config.json", "vocab_size", "null"),
    "head-dim-1e10": setting("config.json", "head_dim", "10000000000"),
    "eps-text": setting("config.json", "rms_norm_eps", '"small"'),
    "rope-nan": setting("config.json", "rope_parameters", '{"rope_type": "default", "rope_theta": NaN}'),
    "rope-infinite": setting("config.json", "rope_parameters", '{"rope_type": "default", "rope_theta": Infinity}'),
    "rope-zero": setting("config.json", "rope_parameters", '{"rope_type": "default", "rope_theta": 0.0}'),
    "rope-yarn-without": setting("config.json", "rope_parameters", '{"rope_type": "yarn", "rope_theta": 1e4}'),
    "rope-list": setting("config.json", "rope_parameters", "[1, 2]"),
    "labels-1e9": setting("config.json", "num_labels", "1000000000"),
    "surrogate": setting("config.json", "architectures", '["\\ud800"]'),
    "long-type": setting("config.json", "model_type", json.dumps("x" * 5000)),
    "activation": setting("config.json", "hidden_act", '"exec"'),
    "dtype": setting("config.json", "dtype", '"float1"'),
    "quantized-list": setting("config.json", "architectures", '[], "quantization_config": [1]'),
    "type-twice": twice("config.json", "model_type"),
    "index-list": put(INDEX, "[]"),
    "index-map-list": put(INDEX, '{"weight_map": ["a"]}'),
    "index-map-twice": twice(INDEX, "weight_map"),
    "index-deep": put(INDEX, '{"weight_map": ' + "[" * DEEP + "]" * DEEP + "}"),
    "index-parent": setting(INDEX, "weight_map/model.norm.weight", '"../x.safetensors"'),
    "index-absolute": setting(INDEX, "weight_map/model.norm.weight", '"/etc/passwd"'),
    "index-dots": setting(INDEX, "weight_map/model.norm.weight", '".."'),
    "index-long": setting(INDEX, "weight_map/model.norm.weight", json.dumps("n" * 5000)),
    "index-nul": setting(INDEX, "weight_map/model.norm.weight", '"a\\u0000b"'),
    "index-fifo": fifo(INDEX),
    "shard-fifo": lambda folder: fifo(sorted(folder.glob("*.safetensors"))[0].name)(folder),
    "header-2^63": header_length(1 << 63),
    "header-100-mb": header_length(100_000_000),
    "header-zero": header_length(0),
    "header-shape-1e18": header(lambda held: first_entry(held).update(shape=[10**18, 10**18])),
    "header-shape-negative": header(lambda held: first_entry(held).update(shape=[-1])),
    "header-shape-text": header(lambda held: first_entry(held).update(shape="x")),
    "header-dtype": header(lambda held: first_entry(held).update(dtype="F1")),
    "header-offsets": header(lambda held: first_entry(held).update(data_offsets=[0, 1 << 62])),
    "header-backwards": header(lambda held: first_entry(held).update(data_offsets=[64, 0])),
    "header-long-name": header(long_name),
    "tokenizer-null": put("tokenizer.json", "null"),
    "tokenizer-deep": put("tokenizer.json", '{"model": ' + "[" * DEEP + "]" * DEEP + "}"),
    "tokenizer-fifo": fifo("tokenizer.json"),
    "tokenizer-large": sparse("tokenizer.json", 1 << 31),
    "tokenizer-config-list": put("tokenizer_config.json", "[]"),
    "tokenizer-config-deep": put("tokenizer_config.json", "[" * DEEP + "]" * DEEP),
    "generation-deep": put("generation_config.json", "[" * DEEP + "]" * DEEP),
    "generation-fifo": fifo("generation_config.json"),
}  # fmt: skip


def of_spec(path: str, value: str) -> Forgery:
    """A value inside the spec of the first compressed module."""

    def forge(folder: Path) -> None:
        modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
        replace(folder / "config.json", ["quantization_config", "modules", next(iter(modules)), *path.split("/")], value)

    return forge


# of a result of lrc whose forms are low-rank
OF_RESULTS: dict[str, Forgery] = {
    "rank-negative": of_spec("rank", "-1"),
    "rank-zero": of_spec("rank", "0"),
    "rank-1e18": of_spec("rank", "1000000000000000000"),
    "rank-text": of_spec("rank", '"8"'),
    "rank-null": of_spec("rank", "null"),
    "rank-large": of_spec("rank", "49"),
    "rank-other": of_spec("rank", "1"),
    "kind-unknown": of_spec("kind", '"magic"'),
    "kind-list": of_spec("kind", "[]"),
    "kind-missing": of_spec("kind", '"low-rank", "kind": null'),
    "bias-text": of_spec("bias", '"no"'),
    "extra-key": of_spec("bias", 'false, "surprise": 1'),
    "pruned-deep": of_spec("kind", '"pruned", "rows": 4, "columns": 4, "form": ' + '{"form":' * 50 + "{}" + "}" * 50),
    "modules-null": setting("config.json", "quantization_config/modules", "null"),
    "modules-list": setting("config.json", "quantization_config/modules", "[1]"),
    "modules-of-null": setting("config.json", "quantization_config/modules", '{"model.layers.0.self_attn.q_proj": null}'),
    "modules-unknown": setting("config.json", "quantization_config/modules", '{"model.none": {"kind": "low-rank"}}'),
    "modules-twice": setting("config.json", "quantization_config/modules", '{}, "modules": {"a": {}}'),
    "format-text": setting("config.json", "quantization_config/format_version", '"1"'),
    "format-new": setting("config.json", "quantization_config/format_version", "99"),
    "format-zero": setting("config.json", "quantization_config/format_version", "0"),
    "method-other": setting("config.json", "quantization_config/quant_method", '"magic"'),
    "method-null": setting("config.json", "quantization_config/quant_method", "null"),
    "quantization-text": setting("config.json", "quantization_config", '"lrc"'),
    "record-list": put("lrc.json", "[]"),
    "record-deep": put("lrc.json", "[" * DEEP + "]" * DEEP),
    "record-large": sparse("lrc.json", 1 << 30),
    "record-fifo": fifo("lrc.json"),
    "record-schema-text": setting("lrc.json", "schema", '"1"'),
    "record-schema-new": setting("lrc.json", "schema", "99"),
    "record-shards-list": setting("lrc.json", "shards", "[]"),
    "record-shard-parent": setting("lrc.json", "shards", '{"../x": {"sha256": "' + "0" * 64 + '", "nbytes": 1}}'),
    "record-shard-null": setting("lrc.json", "shards", '{"x": null}'),
    "record-shard-long": setting("lrc.json", "shards", '{"' + "n" * 5000 + '": {"sha256": "' + "0" * 64 + '", "nbytes": 1}}'),
    "record-bytes-text": setting("lrc.json", "bytes/model_after", '"many"'),
    "record-bytes-1e18": setting("lrc.json", "bytes/model_after", "1000000000000000000"),
    "record-provenance-null": setting("lrc.json", "calibration/provenance", "null"),
    "record-provenance-numbers": setting("lrc.json", "calibration/provenance", "[1]"),
    "record-files-numbers": setting("lrc.json", "files", "[1]"),
    "record-sha-absolute": setting("lrc.json", "sha256", '{"/etc/passwd": "' + "0" * 64 + '"}'),
    "record-identity-null": setting("lrc.json", "identity", "null"),
}  # fmt: skip


def gguf(*, keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", count: int = 0, version: int = 3) -> bytes:
    """A GGUF file of these parts."""
    return b"GGUF" + struct.pack("<IQQ", version, count, key_count) + keys + tensors


def text_of(value: bytes) -> bytes:
    """A text as GGUF stores it."""
    return struct.pack("<Q", len(value)) + value


def key_of(name: bytes, kind: int, value: bytes) -> bytes:
    """A key with its value as GGUF stores them."""
    return text_of(name) + struct.pack("<I", kind) + value


ARCHITECTURE = key_of(b"general.architecture", 8, text_of(b"llama"))


def tensor_of(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """The description of a tensor as GGUF stores it."""
    return text_of(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _keys(*more: bytes) -> bytes:
    return gguf(keys=ARCHITECTURE + b"".join(more), key_count=1 + len(more))


def _tensors(*tensors: bytes, data: int = 256, keys: tuple[bytes, ...] = ()) -> bytes:
    return gguf(
        keys=ARCHITECTURE + b"".join(keys), key_count=1 + len(keys), tensors=b"".join(tensors) + bytes(data), count=len(tensors)
    )


GGUFS: dict[str, bytes] = {
    "empty": b"",
    "magic": b"GGML" + bytes(40),
    "version-1": gguf(version=1, keys=bytes(40)),
    "version-big-endian": b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(40),
    "tensors-2^60": gguf(count=1 << 60, tensors=bytes(100)),
    "keys-2^60": gguf(key_count=1 << 60, keys=bytes(100)),
    "keys-2^64": gguf(key_count=(1 << 64) - 1, keys=bytes(100)),
    "no-architecture": gguf(key_count=1, keys=key_of(b"a", 4, bytes(4))),
    "architecture-number": gguf(key_count=1, keys=key_of(b"general.architecture", 4, bytes(4))),
    "architecture-list": gguf(key_count=1, keys=key_of(b"general.architecture", 9, struct.pack("<IQ", 4, 1) + bytes(4))),
    "architecture-unknown": gguf(key_count=1, keys=key_of(b"general.architecture", 8, text_of(b"magic"))),
    "architecture-binary": gguf(key_count=1, keys=key_of(b"general.architecture", 8, text_of(b"\xff\xfe"))),
    "key-long": gguf(key_count=1, keys=key_of(b"k" * 70_000, 4, bytes(4))),
    "key-length-2^63": gguf(key_count=1, keys=struct.pack("<Q", 1 << 63) + bytes(40)),
    "key-twice": _keys(key_of(b"a", 4, bytes(4)), key_of(b"a", 4, bytes(4))),
    "text-2^63": _keys(key_of(b"a", 8, struct.pack("<Q", 1 << 63))),
    "type-99": _keys(key_of(b"a", 99, bytes(8))),
    "array-2^60": _keys(key_of(b"a", 9, struct.pack("<IQ", 0, 1 << 60))),
    "array-of-arrays": _keys(key_of(b"a", 9, struct.pack("<IQ", 9, 1) * 50_000 + bytes(12))),
    "array-of-bytes": _keys(key_of(b"a", 9, struct.pack("<IQ", 0, 30_000_000) + bytes(30_000_000))),
    "alignment-0": _keys(key_of(b"general.alignment", 4, struct.pack("<I", 0))),
    "alignment-3": _keys(key_of(b"general.alignment", 4, struct.pack("<I", 3))),
    "alignment-text": _keys(key_of(b"general.alignment", 8, text_of(b"32"))),
    "layers-2^31": _tensors(tensor_of(b"a", (4,)), keys=(key_of(b"llama.block_count", 4, struct.pack("<I", 1 << 31)),)),
    "layers-text": _tensors(tensor_of(b"a", (4,)), keys=(key_of(b"llama.block_count", 8, text_of(b"two")),)),
    "few-keys": _tensors(tensor_of(b"a", (4,)), keys=(key_of(b"llama.block_count", 4, struct.pack("<I", 1)),)),
    "split": _tensors(tensor_of(b"a", (4,)), keys=(key_of(b"split.count", 2, struct.pack("<H", 3)),)),
    "name-twice": _tensors(tensor_of(b"a", (4,)), tensor_of(b"a", (4,), offset=32)),
    "name-long": _tensors(tensor_of(b"n" * 5000, (4,))),
    "axes-2^31": _tensors(text_of(b"a") + struct.pack("<I", 1 << 31)),
    "shape-overflow": _tensors(tensor_of(b"a", (1 << 32, 1 << 32, 1 << 32))),
    "shape-zero": _tensors(tensor_of(b"a", (0, 4))),
    "shape-none": _tensors(tensor_of(b"a", ())),
    "kind-99": _tensors(tensor_of(b"a", (4,), kind=99)),
    "half-a-block": _tensors(tensor_of(b"a", (33,), kind=2)),
    "offset-beyond": _tensors(tensor_of(b"a", (4,), offset=1 << 40)),
    "offset-2^64": _tensors(tensor_of(b"a", (4,), offset=(1 << 64) - 32)),
    "offset-unaligned": _tensors(tensor_of(b"a", (4,), offset=4)),
    "overlap": _tensors(tensor_of(b"a", (32,)), tensor_of(b"b", (4,), offset=32)),
}  # fmt: skip
