"""Checking a finished artifact: hashes, names, shapes, and a forward pass over a few tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.atomic import PARTIAL, sha256_of
from ..checkpoint.folder import CARD, INDEX, LOCK, OWN, RECORD, WEIGHTS, matches, read_record
from ..checkpoint.hf_quantizer import install_stored
from ..checkpoint.location import Location
from ..checkpoint.merging import SINGLE
from ..checkpoint.reading.which import read_index
from ..errors import CheckpointError, NonFiniteError
from ..model.layerwise import logits
from ..model.machine.host_memory import steady_memory
from ..model.view import ModelView

# Files that loading in transformers reads; in a finished artifact each of them must be one that lrc wrote.
_LOADED = (
    *WEIGHTS, "generation_config.json", "*processor_config.json", "*quant*config.json", "tokenizer*", "*.model", "vocab*",
    "merges*", "special_tokens_map.json", "added_tokens.json", "spiece*", "*.tiktoken", "tekken.json", "*chat_template*",
    "*.jinja", "*.py",
)  # fmt: skip
_LOADED_FOLDERS = ("additional_chat_templates", "custom_generate")
_TOKENS = 8


def verify(
    folder: Path,
    hashes: bool = True,
    config_file: str = "config.json",
    trust_remote_code: bool = False,
    edited_card: bool = False,
) -> dict[str, Any]:
    """Check an artifact and return its record (`lrc.json`).

    Args:
        folder: the artifact's folder.
        hashes: whether to recompute the sha256 of every shard, of config.json, of the model card and of the tokenizer's files,
            which reads every byte; otherwise only the sizes of the shards are compared.
        config_file: name of the configuration file; it is not config.json while a run checks its own result.
        trust_remote_code: whether code in the folder may run.
        edited_card: whether the model card (README.md) may have changed.

    Raises:
        CheckpointError: a file is missing or changed, one that loading would read is not lrc's, or a shard does not fit the
            model.
        NonFiniteError: the model's logits over a few tokens are not finite.
    """
    record = read_record(folder)
    _check_list(folder, record)
    _check_files(folder, record, hashes)
    steady_memory()
    location = Location(str(folder), folder, config_file=config_file)
    view = ModelView(location, trust_remote_code=trust_remote_code, prepare=install_stored)
    if hashes:
        location.tokenizer(trust_remote_code)  # must be loadable; a run that checks its own result has loaded the original's
    for name in view.source.names():
        expected = view.model.state_dict().get(name)
        if expected is None:
            raise CheckpointError(f"{folder}: the model has no tensor '{name}'.", "Write the artifact again.")
        if tuple(expected.shape) != view.source.shape(name):
            raise CheckpointError(
                f"{folder}: '{name}' has shape {view.source.shape(name)}, the model needs {tuple(expected.shape)}.",
                "config.json does not fit the shards: write the artifact again.",
            )
    _check_bytes(folder, record, view)
    _check_logits(folder, view)
    if hashes and not edited_card:
        _check_card(folder, record)
    return record


def not_covered(folder: Path, record: dict[str, Any]) -> list[str]:
    """What a person should know about a whole artifact: files that no hash covers, and those that are not lrc's."""
    notes = []
    if "card" not in record:
        notes.append(f"{RECORD} and {CARD} are not covered by a hash: an older lrc wrote them")
    if not record.get("sha256"):
        notes.append("config.json and the tokenizer's files are not covered by a hash: an older lrc wrote them")
    if others := other_files(folder, record)[1]:
        notes.append(f"not written by lrc, and not read in loading: {', '.join(others[:5])}{', …' if others[5:] else ''}")
    return notes


def other_files(folder: Path, record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Files in an artifact that its record does not list: those that loading would read, and the rest.

    Args:
        folder: the artifact.
        record: from `read_record`.
    """
    own = OWN | {LOCK} | set(record["shards"]) | set(record["files"]) | set(record.get("sha256", ()))
    found: list[str] = []
    for path in folder.iterdir():
        inside = path.name in _LOADED_FOLDERS and path.is_dir()
        found += [str(each.relative_to(folder)) for each in path.rglob("*") if each.is_file()] if inside else [path.name]
    others = sorted(name for name in found if name not in own and not name.endswith(PARTIAL))
    loaded = [name for name in others if name.partition("/")[0] == "custom_generate" or matches(Path(name).name, _LOADED)]
    return loaded, [name for name in others if name not in loaded]


def _check_list(folder: Path, record: dict[str, Any]) -> None:
    """Compare the record's list of shards with the index, and with what is in the folder."""
    shards = set(record["shards"])
    if not shards:
        raise CheckpointError(f"{folder / RECORD} lists no shards.", "Copy it again, or write the artifact again.")
    indexed = {SINGLE} & shards
    if (folder / INDEX).is_file() or not indexed:
        indexed = set(read_index(folder / INDEX).values()) if (folder / INDEX).is_file() else set()
    if differing := sorted(shards ^ indexed):
        raise CheckpointError(
            f"{folder / INDEX} names {len(indexed)} shards, {RECORD} {len(shards)}; '{differing[0]}' is in one of them only.",
            "Copy both again, or write the artifact again.",
        )
    if foreign := other_files(folder, record)[0]:
        raise CheckpointError(
            f"{folder} holds {len(foreign)} files that loading may read and lrc did not write: {', '.join(foreign[:3])}"
            f"{', …' if foreign[3:] else ''}.",
            "Move them to another folder.",
        )


def _check_files(folder: Path, record: dict[str, Any], hashes: bool) -> None:
    for name, expected in record["shards"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.", "Copy it again, or write the artifact again.")
        size = path.stat().st_size
        if size != expected["nbytes"]:
            raise CheckpointError(f"{path} has {size} bytes; {expected['nbytes']} were written.", "Copy it again.")
        if hashes and sha256_of(path) != expected["sha256"]:
            raise CheckpointError(f"{path} has the right size, but its content has changed (sha256).", "Copy it again.")
    for name, expected in record.get("sha256", {}).items() if hashes else ():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.", "Copy it again, or write the artifact again.")
        if sha256_of(path) != expected:
            raise CheckpointError(
                f"{path} has changed since it was written (sha256).", "Copy it again, or undo the change if it is not yours."
            )


def _check_card(folder: Path, record: dict[str, Any]) -> None:
    path, card = folder / CARD, record.get("card")
    if card is not None and (not path.is_file() or sha256_of(path) != card):
        state = "has changed since it was written (sha256)" if path.is_file() else "is missing"
        raise CheckpointError(
            f"{path}, the model card, {state}; everything else is as lrc wrote it, and the model runs.",
            "If you edited it, add --edited-card, which leaves the card out of the check; if not, copy it again.",
        )


def _check_bytes(folder: Path, record: dict[str, Any], view: ModelView) -> None:
    held = view.nbytes
    promised = record["bytes"]["model_after"]
    if held != promised:
        raise CheckpointError(f"{folder}: the model takes {held} bytes; the plan said {promised}.", "This is a bug: report it.")


def _check_logits(folder: Path, view: ModelView) -> None:
    vocabulary = view.config.get_text_config().vocab_size
    ids = torch.arange(1, _TOKENS + 1).remainder(vocabulary)[None]
    if not torch.isfinite(logits(view, ids)).all():
        raise NonFiniteError(
            f"{folder}: the logits over {_TOKENS} tokens are not finite.", "Compress again with --dtype float32."
        )
