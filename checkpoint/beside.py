"""The files of a checkpoint beside its weights: tokenizer, templates, processors, generation settings, licence.

A rule decides what is copied, not a list of names: every file of the folder and its subfolders, except

* weights in any format, training states and pickles, by their suffix; a subfolder that holds weights is another model;
* files that say how those weights are stored (indices, quantization, adapters), which would be wrong beside other weights;
* code, unless it is trusted;
* the card and its pictures, which lrc's own card replaces; archives and data sets; hidden files; lrc's own records;
* links that lead out of the checkpoint, and what is no file;
* files above `MOST_BYTES`, and those past `MOST_FILES` or `MOST_TOGETHER`.

What is left out is told with the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MOST_BYTES = 64 << 20  # of one file; the largest tokenizers take some 35 MB
MOST_TOGETHER = 256 << 20  # of all files: they are read into memory
MOST_FILES = 1000
_MOST_LOOKED_AT = 20_000  # entries of folders: a model may lie in a folder of many other things
_DEEPEST = 8  # folders inside each other
_NEAR = 2  # names below a folder elsewhere that holds config.json or weights: it may be a home folder

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".hdf5", ".keras", ".msgpack", ".gguf", ".ggml", ".onnx",
    ".onnx_data", ".ort", ".pb", ".tflite", ".mlmodel", ".mlpackage", ".npy", ".npz", ".pkl", ".pickle", ".joblib",
    ".pdparams", ".ot", ".params", ".engine", ".trt", ".distcp", ".nemo", ".llamafile", ".tar", ".zip", ".tgz", ".7z", ".rar",
    ".parquet", ".arrow",
)  # fmt: skip
"""Suffixes of weights, training states and pickles, and of archives and data sets, which may hold them."""
CODE = (
    ".py", ".pyc", ".pyi", ".pyx", ".ipynb", ".so", ".dll", ".dylib", ".exe", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp",
    ".js", ".sh", ".bat", ".ps1", ".jar",
)  # fmt: skip
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".bmp", ".mp4", ".mov", ".mp3", ".wav", ".flac", ".pdf")
_CARD = re.compile(r"readme(\..*)?", re.IGNORECASE)
_OF_THE_WEIGHTS = re.compile(r".*\.index\.json|.*quant.*config\.json|adapter_.*", re.IGNORECASE)
_OF_LRC = re.compile(r"config\.json(\.unchecked)?|lrc\.json|lrc\.journal\.jsonl|.*\.lrc-partial", re.IGNORECASE)

IN_ANOTHER_FORM = "weights, training states, archives"
UNTRUSTED = "code, which is not trusted"


@dataclass
class Beside:
    """The files beside a checkpoint's weights.

    Args:
        files: path inside the checkpoint, with '/' -> file to read.
        left_out: reason -> paths inside the checkpoint of what is not copied; a folder's path ends with '/'.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, name: str, reason: str) -> None:
        """Note that a file or folder is not copied."""
        self.left_out.setdefault(reason, []).append(name)


def files_beside(folder: Path, code: bool = False) -> Beside:
    """Find the files beside the weights of a checkpoint.

    Args:
        folder: of the checkpoint.
        code: whether its code is trusted and copied.
    """
    found, total = Beside(), 0
    for name, path in sorted(_Walk(folder, found).files(folder)):
        reason = _reason(name, code)
        if reason is not None:
            if reason:
                found.leave(name, reason)
            continue
        size = path.stat().st_size
        if size > MOST_BYTES:
            found.leave(name, f"larger than {MOST_BYTES >> 20} MiB")
        elif len(found.files) == MOST_FILES or total + size > MOST_TOGETHER:
            found.leave(name, f"past {MOST_FILES} files or {MOST_TOGETHER >> 20} MiB")
        else:
            found.files[name], total = path, total + size
    return found


def _reason(name: str, code: bool) -> str | None:
    """Why a file is not copied: None if it is; empty if it goes without saying, because lrc writes its own."""
    last, top = name.rpartition("/")[2], "/" not in name
    suffix = os.path.splitext(last)[1].lower()
    if top and (_OF_LRC.fullmatch(last) or last.endswith(".safetensors.index.json") or suffix == ".safetensors"):
        return "" if not last.startswith("consolidated") else IN_ANOTHER_FORM
    if suffix in WEIGHTS:
        return IN_ANOTHER_FORM
    if _OF_THE_WEIGHTS.fullmatch(last):
        return "about the weights of the original"
    if suffix in CODE:
        return None if code and suffix != ".pyc" else UNTRUSTED
    if (top and _CARD.fullmatch(last)) or suffix in PICTURES:
        return "the original's card"
    return None


class _Walk:
    """A walk through the files of a checkpoint; what may not be copied because of its place is noted in `found`."""

    def __init__(self, folder: Path, found: Beside) -> None:
        own = [folder / "config.json", *folder.glob("*.safetensors")]
        self._folder, self._found, self._looked_at = folder.resolve(), found, 0
        # Links may lead to where the checkpoint really lies: into the hub's cache of blobs, or to a model elsewhere.
        self._elsewhere = {path.resolve().parent for path in own if path.is_file()} - {self._folder}

    def files(self, folder: Path, prefix: str = "", above: tuple[Path, ...] = ()) -> Iterator[tuple[str, Path]]:
        """(path inside the checkpoint, file) of every file.

        Args:
            folder: to look into.
            prefix: its path inside the checkpoint, with a '/' at the end.
            above: the folders that it lies in, without links.
        """
        above = (*above, folder.resolve())
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name, path = prefix + entry.name, Path(entry.path)
                self._looked_at += 1
                if self._looked_at > _MOST_LOOKED_AT:
                    self._found.leave(f"{prefix}…", f"past {_MOST_LOOKED_AT:,} files and folders")
                    return
                if entry.name.startswith("."):
                    continue  # a tool's own: version control, caches, locks
                if (reason := self._misplaced(path, above)) is not None:
                    shown = name if name.isprintable() else ascii(name)
                    self._found.leave(shown + ("/" if path.is_dir() else ""), reason)
                elif path.is_dir():
                    yield from self.files(path, f"{name}/", above)
                else:
                    yield name, path

    def _misplaced(self, path: Path, above: tuple[Path, ...]) -> str | None:
        """Why a file is not copied, or a folder not looked into, whatever its suffix."""
        if not path.name.isprintable() or "\\" in path.name:
            return "a name with control characters or backslashes"
        if not path.exists():
            return "a link to nothing"
        if not self._inside(path.resolve()):
            return "a link that leads out of the checkpoint"
        if not os.access(path, os.R_OK):
            return "no permission to read"
        if path.is_dir():
            return _folder_reason(path, above)
        return None if path.is_file() else "no file"

    def _inside(self, target: Path) -> bool:
        if target.is_relative_to(self._folder):
            return not any(part.startswith(".") for part in target.relative_to(self._folder).parts)
        near = [target.relative_to(root).parts for root in self._elsewhere if target.is_relative_to(root)]
        return any(len(parts) <= _NEAR and not any(part.startswith(".") for part in parts) for parts in near)


def _folder_reason(path: Path, above: tuple[Path, ...]) -> str | None:
    """Why a subfolder is not looked into; None if it is."""
    if path.resolve() in above:
        return "a link to a folder that it lies in"
    if path.name == "__pycache__":
        return UNTRUSTED
    if len(above) > _DEEPEST:
        return f"more than {_DEEPEST} folders deep"
    with os.scandir(path) as entries:
        weights = any(os.path.splitext(entry.name)[1].lower() in WEIGHTS for entry in entries)
    return IN_ANOTHER_FORM if weights else None


def hub_leaves() -> list[str]:
    """Patterns of the files of a hub repository that need not be fetched: they are never copied, or read."""
    kinds = [*(suffix for suffix in WEIGHTS if suffix != ".safetensors"), *PICTURES]
    return [*(f"*{suffix}" for suffix in kinds), "consolidated*", "*/*.safetensors"]
