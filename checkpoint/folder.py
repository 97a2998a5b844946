"""The folder of a result: the names of its files, its record, and what a killed run leaves in it."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RequestError, brief
from .atomic import PARTIAL, locked, own_digest_fits, remove, writing
from .untrusted.files import CONFIG as CONFIG_BYTES
from .untrusted.files import RECORD as RECORD_BYTES
from .untrusted.files import read_bounded, require_path, size_of
from .untrusted.json_text import parsed as json_of
from .untrusted.record import require_record

JOURNAL = "lrc.journal.jsonl"
RECORD = "lrc.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
UNCHECKED = "config.json.unchecked"
SCHEMA = 1
SCRATCH = (".lrc-statistics", ".lrc-search")  # folders that a run keeps until its result is finished
LOCK = ".lrc.lock"
OWN = {JOURNAL, RECORD, INDEX, UNCHECKED, "config.json", CARD}
# weights in any format, and adapters
WEIGHTS = (
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "adapter_*",
)  # fmt: skip
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
PART = re.compile(r"lrc\.part-\d{5}-of-\d{5}\.safetensors")


def is_below(name: Any) -> bool:
    """Whether a name that a file gives leads to a place below the folder, and not through it to another one."""
    return isinstance(name, str) and bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def folders_of(folder: Path) -> set[Path]:
    """The folder, and the folders in it that hold copied files."""
    return {folder, *((folder / name).parent for name in copied_files(folder))}


def leftovers(folder: Path) -> list[Path]:
    """What a run keeps in its folder until it is finished, journal apart: scratch, temporary files, the unchecked config.

    Shards are not among it: other programs give theirs the same names.
    """
    entries = [path for inner in folders_of(folder) if inner.is_dir() for path in inner.iterdir()]
    return [path for path in entries if path.name in (UNCHECKED, *SCRATCH) or path.name.endswith(PARTIAL)]


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (folder / JOURNAL).exists() or (folder / RECORD).exists()


def clear_finished(folder: Path) -> list[str]:
    """Delete what a killed run left in the folder of a finished result; the names of what was deleted.

    Nothing is deleted where there is no finished result, while another process works in the folder, or where it may not be
    written to.
    """
    finished = (folder / RECORD).is_file() and (folder / "config.json").is_file() and not (folder / JOURNAL).exists()
    if not finished or not (found := leftovers(folder)):
        return []
    gone = []
    with contextlib.suppress(OSError, RequestError):
        lock = locked(folder / LOCK)
        try:
            for path in found:
                remove(path)
                gone.append(path.name)
        finally:
            (folder / LOCK).unlink()
            lock.close()
    return gone


def copied_files(folder: Path) -> set[str]:
    """Paths in the folder of the tokenizer's and other files that an earlier run wrote here, or was about to write."""
    return _listed(folder, "files")


def listed_shards(folder: Path) -> set[str]:
    """Names of the shards that an earlier run wrote here, or was about to write."""
    return {name for name in _listed(folder, "shards") | _listed(folder, "merged") if "/" not in name}


def _listed(folder: Path, key: str) -> set[str]:
    """What the journal's lines and the record have under a key: names, or a mapping by names, or one name."""
    texts = [
        *((folder / JOURNAL).read_bytes().splitlines() if (folder / JOURNAL).is_file() else []),
        (folder / RECORD).read_bytes() if (folder / RECORD).is_file() else b"",
    ]
    held = [entry[key] for text in texts if isinstance(entry := parsed(text), dict) and key in entry]
    names = [name for each in held for name in (each if isinstance(each, list | dict) else [each])]
    return {name for name in names if is_below(name)}


def require_usable(folder: Path) -> None:
    """Refuse, before any work, a folder that a run cannot be written into. Writes nothing.

    Raises:
        RequestError: it holds files that are not lrc's.
        OutputError: it is not a folder, or it is not writable.
    """
    with writing(folder):
        if folder.exists():
            names = {path.name for path in folder.iterdir()}
            if not names & {JOURNAL, RECORD} and (foreign := sorted(names - {LOCK})):
                raise RequestError(
                    f"{folder} holds other files ({', '.join(foreign[:3])}); lrc would mix its own with them.",
                    "Give an empty or new folder as --out.",
                )
            own = OWN | listed_shards(folder)
            foreign = sorted(
                name for name in names - own if matches(name, WEIGHTS) and not (SHARD.fullmatch(name) or PART.fullmatch(name))
            )
            if foreign:
                raise RequestError(
                    f"{folder} holds weights that lrc did not write ({', '.join(foreign[:3])}); whoever loads the result would "
                    "read them.",
                    "Move them to another folder, or give another --out.",
                )
        standing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
        if not standing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(standing))
        if not os.access(standing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied or read-only file system", str(standing))


def require_result(folder: Path) -> None:
    """Refuse a folder that holds no finished result, nor a copy of one by `save_pretrained`, before anything in it is read.

    Raises:
        RequestError: there is no such folder, or no finished result in it.
    """
    require_path(str(folder))
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RequestError(f"{brief(str(folder))} {what}.", "Give the --out folder of a finished `lrc compress`.")
    if (folder / JOURNAL).is_file() and not (folder / "config.json").is_file():
        raise RequestError(f"{folder} holds an interrupted run.", "The `lrc compress` command that began it continues it.")
    if size_of(folder / RECORD) is None and not saved_by_transformers(folder):
        raise RequestError(f"{folder} holds no {RECORD}.", "Give the --out folder of a finished `lrc compress`.")


def read_record(folder: Path) -> dict[str, Any]:
    """`lrc.json` of a finished artifact.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / RECORD
    if size_of(path) is None:
        unfinished = (
            " (a run was interrupted here: the same `lrc compress` command continues it)" if (folder / JOURNAL).exists() else ""
        )
        if saved_by_transformers(folder):
            raise CheckpointError(
                f"{folder} is a compressed model that save_pretrained wrote: it has no record ({RECORD}) of what lrc wrote.",
                "Give the --out folder of `lrc compress`. `lrc eval`, `bench` and `export` take this one, too.",
            )
        raise CheckpointError(f"{folder} holds no {RECORD}{unfinished}.", "Give the --out folder of a finished `lrc compress`.")
    data = read_bounded(path, RECORD_BYTES)
    record = json_of(data, str(path))
    fits = own_digest_fits(data)
    if fits is False or (fits is None and {"digest", "card"} & record.keys()):  # an lrc that wrote no digest wrote no card
        raise CheckpointError(f"{path} has changed since it was written (its own digest differs).",
                              "Copy it again, or undo the change if it is not yours.")  # fmt: skip
    schema = record.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise CheckpointError(f"{path} has schema {brief(str(schema))}; this lrc reads up to {SCHEMA}.", "Upgrade lrc.")
    require_record(record, path)
    return record


def saved_by_transformers(folder: Path) -> bool:
    """Whether transformers saved a compressed model here, which it does without lrc's record."""
    held = None
    with contextlib.suppress(OSError), (folder / "config.json").open("rb") as file:
        held = parsed(file.read(CONFIG_BYTES))
    stored = held.get("quantization_config") if isinstance(held, dict) else None
    return isinstance(stored, dict) and stored.get("quant_method") == "lrc" and not (folder / RECORD).exists()


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the name of a file matches one of these shell patterns, upper or lower case."""
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)


def parsed(text: bytes) -> Any:
    """The JSON value of a text, or None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
