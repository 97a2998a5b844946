"""Where text comes from: named data sets of the hub, local files, the standard library's docstrings.

A source is written as one word: `wikitext2`, `c4`, `ptb`, `pile`, `hf:NAME[:CONFIG][:SPLIT][:COLUMN]`, `text:PATH`,
`jsonl:PATH[:FIELD]`, `json:PATH[:FIELD]`, `csv:PATH[:COLUMN]`, `parquet:PATH[:COLUMN]`, `self` or `pydoc`. A file of `text:` is
what its name says: `.jsonl`, `.json`, `.csv`, `.tsv` and `.parquet` are made of documents, anything else is one long text.
`.gz`, `.bz2`, `.xz` and `.zst` are decompressed. `parse_source` and `parse_mix` read that word, `read_stream` reads a source
that is one long text, `open_documents` one that is made of documents. `data` turns them into tokens.

The splits, columns and joiners of the named data sets are those of the GPTQ line of papers (arXiv:2210.17323 and its
successors), so that perplexities can be compared with published ones.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from ..checkpoint.untrusted.files import is_regular, size_of
from ..errors import CalibrationError, RequestError, did_you_mean
from .files.columns import Document
from .files.long_text import long_text
from .files.opening import is_compressed, kind_of, opened
from .files.rows import Rows, json_kind
from .readers import HubData, drawn, hub_documents, json_lines, line_starts, parquet_rows, stdlib_docstrings

# Two small ones are downloaded (the hub's cache then answers offline); the others are streamed. ptb's main branch holds a
# loading script, which `datasets` no longer runs; the hub's own parquet conversion holds the same rows.
NAMED = {
    "wikitext2": HubData("Salesforce/wikitext", "wikitext-2-raw-v1", streamed=False),
    "ptb": HubData(
        "ptb-text-only/ptb_text_only", column="sentence", revision="refs/convert/parquet", streamed=False, joiner=" "
    ),
    "c4": HubData("allenai/c4", files="en/c4-train.00000-of-01024.json.gz", joiner=" ", identity="allenai/c4:en"),
    "pile": HubData("NeelNanda/pile-10k"),
}
HELD_OUT = {
    "wikitext2": replace(NAMED["wikitext2"], split="test"),
    "ptb": replace(NAMED["ptb"], split="test"),
    "c4": replace(NAMED["c4"], split="validation", files="en/c4-validation.00000-of-00008.json.gz"),
}
SHAPES = {
    "hf": "hf:NAME[:CONFIG][:SPLIT][:COLUMN]",
    "text": "text:PATH",
    "jsonl": "jsonl:PATH[:FIELD]",
    "json": "json:PATH[:FIELD]",
    "csv": "csv:PATH[:COLUMN]",
    "parquet": "parquet:PATH[:COLUMN]",
}
PLAIN = (*NAMED, "self", "pydoc")
TOPICS = "pydoc-topics"  # text to evaluate on that every machine with Python has; no part of it is a docstring
STREAMS = ("text", "wikitext2", "ptb")
"""Kinds that are one long text; the others are made of documents (`self` is neither: it gives tokens)."""


@dataclass(frozen=True)
class Source:
    """One parsed source. `path` and `field` belong to local files, `hub` to data sets of the hub.

    `kind` is that of the content: of `text:rows.csv` it is 'csv'. `field` is empty where the source names none.
    """

    text: str
    kind: str
    path: Path | None = None
    field: str = ""
    hub: HubData | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The part of the provenance that is known before anything is read."""
        if self.hub is None:
            return {"source": self.text, "split": None}
        identity = self.hub.identity or ":".join(filter(None, (self.hub.name, self.hub.config)))
        return {"source": self.text, "split": self.hub.split, "dataset": identity}


_OUTSIDE_BRACKETS = re.compile(r":(?![^\[]*\])")  # a split may be a slice: test[:50%]


def parse_source(text: str, split: str = "train") -> Source:
    """Read one source as a person writes it; nothing is opened.

    Args:
        text: the source, e.g. `jsonl:notes.jsonl:body`. A path may hold colons if a file of that name exists.
        split: the split that `hf:` takes when it names none.

    Raises:
        RequestError: no such kind of source (with the nearest known one), or its argument is missing or not wanted.
    """
    kind, colon, rest = text.strip().partition(":")
    if kind in PLAIN:
        if colon:
            raise RequestError(f"Source '{text}': {kind} takes nothing after it.", f"Write {kind}, or {SHAPES['hf']}.")
        return Source(kind, kind, hub=NAMED.get(kind))
    if kind not in SHAPES:
        if is_regular(Path(text).expanduser()):
            raise RequestError(f"'{text}' is a file, not a source.", f"Write {kind_of(Path(text))}:{text}.")
        known = [*PLAIN, *(f"{name}:" for name in SHAPES)]
        raise RequestError(f"No source is called '{text}'.", did_you_mean(kind + colon, known))
    if not rest.strip(":"):
        raise RequestError(f"Source '{text}': something is missing after the colon.", f"Write {SHAPES[kind]}.")
    source = f"{kind}:{rest}"
    if kind == "hf":
        parts: list[str] = [*_OUTSIDE_BRACKETS.split(rest), *[""] * 3]
        name, config, of, column = parts[:4]
        if any(parts[4:]) or not name:
            raise RequestError(f"Source '{text}' cannot be read.", f"Write {SHAPES['hf']}; an inner part may be empty.")
        # a slice of a split is cut from the whole: it cannot be streamed
        return Source(source, kind, hub=HubData(name, config or None, of or split, column or "text", streamed="[" not in of))
    if kind == "text":
        return Source(source, kind_of(Path(rest)), Path(rest).expanduser())
    path, field = rest, ""
    if ":" in rest and not is_regular(Path(rest).expanduser()):
        path, _, field = rest.rpartition(":")
    return Source(source, kind, Path(path).expanduser(), field)


_WEIGHT = re.compile(r"(.+)\*(\d+(?:\.\d*)?|\.\d+)")
_START = re.compile(rf"(?:{'|'.join(PLAIN)})(?:[*]|$)|(?:{'|'.join(SHAPES)}):")


def parse_mix(text: str) -> list[tuple[str, float]]:
    """Read `SOURCE*WEIGHT+SOURCE*WEIGHT…` into pairs; without any weights, each is 1.

    A `+` parts two sources where a weight stands before it, a source begins after it, or a plain name stands before it;
    elsewhere it belongs to a path (`text:c++.txt`).

    Raises:
        RequestError: some have a weight and some have none.
    """
    parts: list[str] = []
    for piece in text.split("+"):
        splits = not parts or ":" not in parts[-1] or _WEIGHT.fullmatch(parts[-1]) or _START.match(piece)
        if splits:
            parts.append(piece)
        else:
            parts[-1] += f"+{piece}"
    weighted = [_WEIGHT.fullmatch(part.strip()) for part in parts]
    if any(weighted) and not all(weighted):
        bare = ", ".join(part for part, match in zip(parts, weighted, strict=True) if not match)
        raise RequestError(f"Mix '{text}': {bare} has no weight beside others that have.", "Write SOURCE*WEIGHT for each.")
    return [
        (match[1].strip(), float(match[2])) if match else (part.strip(), 1.0)
        for part, match in zip(parts, weighted, strict=True)
    ]


def read_stream(source: Source, seed: int | None = None) -> tuple[str, dict[str, Any]]:
    """Read a source that is one long text (`STREAMS`).

    Args:
        seed: chooses pieces of a file that is too large to be read whole; None: its first ones.

    Returns:
        the text, and what was read: {"sha256": of the text in UTF-8, its lines ended by \\n; "documents": rows}, and for a file
        that is too large {"pieces": how many, "of": out of how many} (files/long_text.py).

    Raises:
        CalibrationError: it is not available, is not UTF-8 or is empty.
    """
    if source.hub is not None:
        rows = list(hub_documents(source.hub, None))
        if not all(isinstance(row, str) for row in rows):
            raise CalibrationError(f"{source.text}: column '{source.hub.column}' holds conversations, not text.")
        text = source.hub.joiner.join(str(row) for row in rows)
        facts = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "documents": len(rows)}
    else:
        text, facts = long_text(existing(source), lambda count: drawn(count, seed))
    if not text.strip():
        raise CalibrationError(f"{source.text} holds no text ({len(text):,} characters, all blank).")
    return text, facts


def open_documents(source: Source, seed: int | None) -> tuple[Iterator[Document], dict[str, Any]]:
    """Open a source that is made of documents; they are read one by one, as they are asked for.

    Args:
        source: of any kind but `self` and `text`.
        seed: the order is shuffled by it; None: the source's own order, empty documents included.

    Returns:
        the documents, and what is known of the text before it is read: {"sha256": of the whole file, for local files; of
        all docstrings, for pydoc; nothing for a streamed data set}.

    Raises:
        CalibrationError: it is not available (also while iterating), or a field or a line of it is wrong.
    """
    facts: dict[str, Any] = {}
    if source.hub is not None:
        documents = hub_documents(source.hub, seed)
    elif source.kind == "pydoc":
        texts = stdlib_docstrings()
        facts = {"sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
        documents = (texts[i] for i in drawn(len(texts), seed))
    elif source.kind in ("jsonl", "json", "csv"):
        documents, facts["sha256"] = _rows(existing(source), source, seed)
    else:
        path = existing(source)
        with path.open("rb") as file:
            facts = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        documents = parquet_rows(path, source.field, seed)
    if seed is None:
        return documents, facts
    return (document for document in documents if not isinstance(document, str) or document.strip()), facts


def _rows(path: Path, source: Source, seed: int | None) -> tuple[Iterator[Document], str]:
    """The documents of JSON lines, a JSON array or CSV, and the sha256 of the decompressed file."""
    kind = json_kind(path) if source.kind == "json" else source.kind
    with opened(path):  # for its checks
        pass
    if kind == "jsonl" and not is_compressed(path):  # any line can be sought
        starts, digest = line_starts(path)
        return json_lines(path, source.field, starts, seed), digest
    return Rows(path, kind, source.field).documents(None if seed is None else lambda count: drawn(count, seed))


def existing(source: Source) -> Path:
    """The file of a source that is a file, which is there and may be read.

    Raises:
        CalibrationError: it is not; the message names the closest file.
    """
    path = source.path
    assert path is not None
    if not os.path.isdir(path):
        size_of(path, CalibrationError)  # refuses FIFOs and devices, and names that no file can have
    if path.exists() and not path.is_dir():
        if not path.is_file():
            raise CalibrationError(f"{source.text}: {path} is a pipe or a device.", "Save the text to a file.")
        if not os.access(path, os.R_OK):
            raise CalibrationError(f"{source.text}: no permission to read {path}.")
        return path
    if path.is_dir():
        raise CalibrationError(f"{source.text}: {path} is a folder.", "Name one file.")
    if not path.parent.is_dir():
        raise CalibrationError(f"{source.text}: there is no folder {path.parent}.", f"Relative paths start at {Path.cwd()}.")
    beside = [entry.name for entry in islice(path.parent.iterdir(), 1000) if entry.is_file()]
    close = get_close_matches(path.name, beside, n=1)
    hint = f"Did you mean '{path.parent / close[0]}'?" if close else f"Relative paths start at {Path.cwd()}."
    if path.parent == Path():  # as in lrc.json
        hint += " A result's record names texts without their folder: give it with --calibration."
    raise CalibrationError(f"{source.text}: there is no file {path}.", hint)
