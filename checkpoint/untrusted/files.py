"""Opening files that anyone may have written: only regular files, and only up to a size.

Opening a FIFO waits for ever, a device has no end, and a parser needs several times the size of its file: all three are refused
before anything is read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ...errors import CheckpointError, LrcError, ModelError, brief

MB = 1 << 20
# A result of the largest mixture of experts (30,000 corrected experts of 900 bytes each) needs 27 MB of config.json.
CONFIG = 32 * MB
# 200,000 tensors of 150 bytes each are 30 MB of index
INDEX = 64 * MB
# lrc.json has some 600 bytes for each target
RECORD = 128 * MB
# the largest vocabularies of today take 35 MB as tokenizer.json
TOKENIZER = 128 * MB
SETTINGS = 16 * MB
RECIPE = MB // 4  # a pattern for each of 5,000 matrices

_LONGEST_PART, _LONGEST_PATH = 255, 4000  # bytes of a name and of a path

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
# what transformers opens by name in a model's folder -> the most bytes it may have; weights are read tensor by tensor
_READ_BY_NAME: tuple[tuple[re.Pattern[str], int | None], ...] = tuple(
    (re.compile(pattern), limit)
    for pattern, limit in (
        (r"config\.json(\.unchecked)?", CONFIG),
        (r".*\.safetensors\.index\.json", INDEX),
        (r"tokenizer\.json|tekken\.json|vocab\.json|(vocab|merges)\.txt|.*\.(model|tiktoken|bpe|vocab|spm)", TOKENIZER),
        (
            r"(generation|adapter|tokenizer|hf_quant|quantize|quantization|(video_|image_)?(pre)?processor)_config\.json",
            SETTINGS,
        ),
        (r"(special_tokens_map|added_tokens|chat_template|configuration)\.json|.*\.jinja|.*\.py", SETTINGS),
        (r".*\.(safetensors|gguf|bin)", None),
    )
)
_SUBFOLDER = "additional_chat_templates"


def size_of(path: Path, kind: type[LrcError] = CheckpointError) -> int | None:
    """Bytes of a regular file; None where nothing has that name. Links are followed.

    Args:
        kind: class of the error.

    Raises:
        LrcError: it is no regular file, or the system cannot say (a name that is too long, no permission, a circle of links).
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise kind(f"{brief(str(path))} cannot be opened: {reason}.", "Give another name, or the right to read it.") from error
    if not stat.S_ISREG(found.st_mode):
        what = next((name for test, name in _KINDS if test(found.st_mode)), "no file")
        raise kind(f"{brief(str(path))} is {what}; lrc reads regular files only.", "Put the file itself in its place.")
    return found.st_size


def require_path(name: str, kind: type[LrcError] = ModelError) -> None:
    """Refuse a name that no file can have, where the system's own answer would be a bare error.

    Raises:
        LrcError: the name, or a part of it, is too long, or it holds a NUL.
    """
    parts = os.fsencode(name).split(b"/") if _is_encodable(name) else [b"\0"]
    if any(len(part) > _LONGEST_PART or b"\0" in part for part in parts) or sum(map(len, parts)) > _LONGEST_PATH:
        raise kind(f"No file can have the name {brief(name)} ({len(name):,} characters).", "Check the name.")


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def is_regular(path: Path) -> bool:
    """Whether a regular file has this name; False for everything else, whatever the reason."""
    try:
        return size_of(path) is not None
    except CheckpointError:
        return False


def read_bounded(path: Path, limit: int, kind: type[LrcError] = CheckpointError) -> bytes:
    """The content of a regular file.

    Args:
        limit: the most bytes that it may have.
        kind: class of the errors.

    Raises:
        LrcError: it is not there, no regular file, larger than the limit, or cannot be read.
    """
    size = size_of(path, kind)
    if size is None:
        raise kind(f"{brief(str(path))} is missing.", "Copy it again.")
    _require_size(path, size, limit, kind)
    try:
        # it may have been replaced by a FIFO since: opening must not wait
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise kind(f"{brief(str(path))} cannot be read: {error.strerror or error}.", "Copy it again.") from error
    _require_size(path, len(content), limit, kind)
    return content


def _require_size(path: Path, size: int, limit: int, kind: type[LrcError]) -> None:
    if size > limit:
        raise kind(
            f"{brief(str(path))} has {size:,} bytes; a file of this kind has at most {limit:,}.",
            "It is damaged, or not what its name says: get it again.",
        )


def require_readable(folder: Path) -> None:
    """Check what transformers opens by name in a model's folder: regular files of a size that can be parsed.

    Files of other names are not looked at.

    Raises:
        ModelError: a file is none, or is too large.
    """
    for path in _entries(folder):
        limit = next((limit for pattern, limit in _READ_BY_NAME if pattern.fullmatch(path.name)), -1)
        if limit == -1:
            continue
        size = size_of(path, ModelError)
        if size is not None and limit is not None:
            _require_size(path, size, limit, ModelError)


def _entries(folder: Path) -> Iterator[Path]:
    for path in (folder, folder / _SUBFOLDER):
        try:
            yield from sorted(path.iterdir())
        except OSError:  # no such folder: whoever needs it says so
            continue
