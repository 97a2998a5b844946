"""Writing an export: shards, configuration, files beside the weights, a check by logits, and only then the folder's name.

The export is written into a folder beside the one that is asked for, and renamed when it was checked. An export that was
killed, or that failed its check, therefore never looks finished.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..checkpoint.atomic import follow_umask, locked, require_space, sync_folder, writing
from ..checkpoint.merging import SHARD_BYTES, layout, merge, sizes
from ..errors import CheckpointError, RequestError, one_line
from ..model.events import Event, Notify, silent
from ..model.layerwise import logits
from ..model.machine.host_memory import give_back
from .base import Format, Tensors, get_format
from .card import export_card
from .source import Source

_TOKENS = 32
_PARTIAL = ".lrc-export"


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Args:
        folder: its folder.
        format: its format.
        nbytes: bytes of all its files.
        lost: what it does not carry, one sentence each.
        difference: of its logits from the result's, relative to them (root mean square); None where it was not checked.
    """

    folder: Path
    format: str
    nbytes: int
    lost: tuple[str, ...]
    difference: float | None


def export(
    result: str | Path,
    to: str,
    *,
    out: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    check: bool = True,
    trust_remote_code: bool = False,
    notify: Notify = silent,
) -> Exported:
    """Write a finished result in a format that other tools open.

    Args:
        result: the folder of a finished `lrc compress`.
        to: the format: one of `formats()` in base.py.
        out: the folder for the export, new or empty; None: the result's folder with the format's name behind it.
        dtype: of the floating-point tensors; None takes the result's.
        max_shard_bytes: the largest weight file, in bytes.
        check: compare the logits of the export, opened by its consumer, with those of the result.
        trust_remote_code: whether code in the result's folder may run.
        notify: receives an `Event` after each part.

    Raises:
        RequestError: the format cannot carry this result, or the folder holds other files.
        CheckpointError: the result is damaged, or the export's logits are not those of the result.
        OutputError: the export cannot be written.
    """
    folder = Path(result)
    chosen = get_format(to)
    target = Path(out) if out is not None else folder.absolute().with_name(f"{folder.absolute().name}-{to}")
    _require_new(target)
    source = Source.open(folder, trust_remote_code)
    form = chosen(source, dtype or source.view.dtype)
    # while the parts are merged a shard is there twice
    needed = form.drawing.nbytes + min(form.drawing.nbytes, max_shard_bytes)
    require_space(target.absolute().parent, needed, "the export needs", "give an --out on another disk")
    if check:
        _require_packages(form)
    partial = target.with_name(f"{target.name}{_PARTIAL}")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(target.with_name(f".{target.name}.lrc-export-lock"))
    try:
        with writing(partial):
            shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
            partial.mkdir()
            _write(form, partial, max_shard_bytes, notify)
        difference = _checked(form, partial) if check else None
        with writing(target):
            if target.exists():
                target.rmdir()
            partial.rename(target)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # renamed where all went well
        Path(lock.name).unlink(missing_ok=True)
        lock.close()
    nbytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Exported(target, to, nbytes, form.drawing.lost, difference)


def _require_new(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"{target} exists and is not an empty folder.", "Give a new folder as --out, or delete that one.")


def _require_packages(form: Format) -> None:
    missing = [name for name in form.checked_with if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise RequestError(
            f"The check opens the export as its users would, which needs {' and '.join(missing)}.",
            f"pip install {' '.join(missing)}, or add --no-check.",
        )


def _write(form: Format, folder: Path, max_shard_bytes: int, notify: Notify) -> None:
    if not form.write(folder, notify):
        write_shards(folder, form.parts(), max_shard_bytes, notify)
    if beside := form.beside():
        save_file(beside, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for name, content in _copied(form.source).items() if form.copies else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name, content in form.files().items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(export_card(form))
    if form.copies:
        (folder / "config.json").write_text(json.dumps(form.config(), indent=2) + "\n")
    for path in folder.rglob("*"):
        if path.is_file():
            follow_umask(path)


def write_shards(folder: Path, parts: Iterator[Tensors], most: int, notify: Notify) -> None:
    """Write tensors into files of at most `most` bytes (one tensor may be larger), with an index where there are several.

    One part is in memory at a time: each becomes a file, and the files are merged.
    """
    files: dict[str, Path] = {}
    for number, part in enumerate(parts, 1):
        # clones: safetensors stores no two tensors that share memory
        held = {name: tensor.clone() for name, tensor in part.items()}
        files[str(number)] = folder / f"part-{number}"
        save_file(held, files[str(number)], metadata={"format": "pt"})
        give_back()
        notify(Event("export", done=number))
    groups = layout({key: sizes(path) for key, path in files.items()}, most)
    for group in groups:
        if group.renamed:
            files[group.parts[0]].rename(folder / group.file)
        else:
            merge(folder / group.file, [files[key] for key in group.parts], group.tensors)
        for key in group.done:
            files[key].unlink(missing_ok=True)
    if len(groups) > 1:
        total = sum(sum(group.tensors.values()) for group in groups)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: group.file for group in groups for name in group.tensors},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copied(source: Source) -> dict[str, bytes]:
    """The files beside the weights of the result: tokenizer, templates, processors, generation settings, licence."""
    location = source.view.location
    return {name: path.read_bytes() for name, path in location.beside(code=source.view.trust_remote_code).files.items()}


@torch.no_grad()
def _checked(form: Format, folder: Path) -> float:
    """The relative difference of the export's logits from the result's, both computed in float32.

    Raises:
        CheckpointError: it is larger than the format's tolerance, or the export does not open.
    """
    vocabulary = form.source.view.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, _TOKENS), generator=generator)
    expected = logits(form.source.widened().view, ids).float()
    try:
        difference = form.difference(folder, ids, expected)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"The export does not open as its users would open it: {one_line(error)}",
            "Install what the message names, or export with --no-check.",
        ) from error
    if not difference <= form.allowed:
        raise CheckpointError(
            f"The logits of the export differ from those of the result by {difference:.2%}; {form.name} in "
            f"{str(form.dtype).removeprefix('torch.')} may differ by {form.allowed:.1%}.",
            "Export with --dtype float32; if that fails too, this is a bug: report it.",
        )
    return difference
