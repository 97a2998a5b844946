"""A GGUF header without its vocabulary, for transformers to make a configuration of.

gguf's reader makes five arrays of numpy for every element of an array. A vocabulary of 49,152 tokens with its merges then takes
some ten seconds, although a configuration needs nothing of it but its size. Which keys become which settings stays
transformers' own business: it reads a small file with the same keys.
"""

from __future__ import annotations

import functools
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..untrusted.gguf_header import GgufHeader, require_sound

_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
_TOKENS = _VOCABULARY[0]
_UINT32, _F32 = 4, 0


@contextmanager
def lean(path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and in it a small GGUF file that gives the configuration of this one; both are gone when the context ends.

    The folder of the file itself, where transformers needs the vocabulary for the configuration, or reads it quickly.

    Raises:
        CheckpointError, ModelError: as `require_sound`.
    """
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    header = require_sound(path)
    architecture = header.scalars["general.architecture"]
    known: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    settings = known.get(architecture, {})
    if architecture in GGUF_CONFIG_ARCHS or "vocab_size" not in settings:
        yield path.parent, path.name
        return
    with tempfile.TemporaryDirectory(prefix="lrc-gguf-") as folder:
        (Path(folder) / path.name).write_bytes(_without_vocabulary(path, header, architecture))
        yield Path(folder), path.name


def _without_vocabulary(path: Path, header: GgufHeader, architecture: str) -> bytes:
    """The header with every key but those of the vocabulary, and with every tensor as one number."""
    with path.open("rb") as file:
        version = file.read(8)[4:]
        entries = [_slice(file, *span) for key, span in header.spans.items() if key not in _VOCABULARY]
    size = f"{architecture}.vocab_size"
    if size not in header.spans and _TOKENS in header.counts:
        entries.append(_text(size) + struct.pack("<II", _UINT32, header.counts[_TOKENS]))
    tensors = [_text(name) + struct.pack("<IQIQ", 1, 1, _F32, 0) for name in header.tensors]
    counts = struct.pack("<QQ", len(tensors), len(entries))
    whole = b"".join([b"GGUF", version, counts, *entries, *tensors])
    alignment = int(header.scalars.get("general.alignment", 32))
    return whole + bytes(-len(whole) % alignment + alignment)


def _slice(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


@contextmanager
def one_name_map() -> Iterator[None]:
    """While the context is open, gguf makes the table of an architecture's names once.

    transformers asks for it for every module of the model; each time takes 60 milliseconds.
    """
    import gguf

    whole = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(whole)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = whole
