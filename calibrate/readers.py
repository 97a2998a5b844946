"""Read documents: lines of JSON, columns of parquet, data sets of the hub, docstrings of the standard library.

Every reader is a generator and reads one document at a time, so that no large file is in memory whole. Readers of files and of
docstrings shuffle exactly; a streamed data set is shuffled through a buffer.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import random
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..errors import CalibrationError, one_line
from .files.columns import Document, document, require_columns, value_of, without
from .files.rows import LONGEST, json_line, of_row

OFFLINE = (
    "Without the hub, take text that is on this machine: text:PATH, jsonl:PATH[:FIELD], parquet:PATH[:COLUMN], "
    "pydoc (docstrings of the Python standard library) or, for calibration, self (the model's own text)."
)
HUB_TIMEOUT = 5.0  # seconds for the first answer
SHAPE_OF_JSONL = "jsonl:PATH:FIELD"
SHUFFLE_BUFFER = 1000  # documents in memory while a streamed data set is shuffled


@dataclass(frozen=True)
class HubData:
    """A data set on the hub and where its text is in it. `identity` is the name that `same_text` compares."""

    name: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    files: str | None = None
    revision: str | None = None
    streamed: bool = True
    joiner: str = "\n\n"
    identity: str = ""


def drawn(count: int, seed: int | None) -> Iterator[int]:
    """0 … count - 1 in a random order that the seed decides (None: in order); memory grows with the numbers taken."""
    if seed is None:
        yield from range(count)
        return
    moved: dict[int, int] = {}  # Fisher and Yates, keeping only the entries that are not in their place
    generator = random.Random(seed)
    for i in range(count):
        j = generator.randrange(i, count)
        here = moved.pop(i, i)
        yield moved.get(j, j) if j != i else here
        if j != i:
            moved[j] = here


def line_starts(path: Path) -> tuple[np.ndarray, str]:
    """Where each line of a file starts, in bytes, int64; and the file's sha256. One pass, in blocks of 16 MiB."""
    digest, starts, position = hashlib.sha256(), [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + (position + 1))
            position += len(block)
    lines = np.concatenate(starts)
    return lines[lines < position], digest.hexdigest()


def json_lines(path: Path, field: str, starts: np.ndarray, seed: int | None) -> Iterator[Document]:
    """`field` of each line of a file of JSON lines; `starts` are those of `line_starts`.

    Args:
        field: empty: by its name, see files/columns.py; the first object of the file decides.

    Raises:
        CalibrationError: a line that is drawn is not a JSON object or lacks the field; the message says file:line.
    """

    def row(i: int) -> dict[str, Any] | None:
        file.seek(int(starts[i]))
        line = file.readline(LONGEST + 1)
        if len(line) > LONGEST:
            raise CalibrationError(f"{path}:{i + 1}: the line is longer than {LONGEST >> 20} MiB.", "Cut it into several rows.")
        return json_line(line, f"{path}:{i + 1}")

    with path.open("rb") as file:
        columns: tuple[str, ...] = ()
        for i in range(len(starts)):
            if (first := row(i)) is not None:
                columns = require_columns(f"{path}:{i + 1}", field, list(first), SHAPE_OF_JSONL, "field")
                break
        for i in drawn(len(starts), seed):
            yield from of_row(row(i), columns, f"{path}:{i + 1}")


def parquet_rows(path: Path, column: str, seed: int | None) -> Iterator[Document]:
    """`column` of each row of a parquet file; at most one row group of that column and a handful of rows are held.

    Args:
        column: empty: by its name, see files/columns.py.

    Raises:
        CalibrationError: not a parquet file, no such column, or a value that is no text.
    """
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    where = f"{path}: column "
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = require_columns(str(path), column, file.schema_arrow.names, "parquet:PATH:COLUMN")
            if seed is None:
                for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
                    yield from (document(row, columns, where) for row in batch.to_pylist())
                return
            ends = np.cumsum([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
            order, take = drawn(file.metadata.num_rows, seed), 256
            # A row cannot be read without its row group: rows are fetched in growing handfuls, each group once per handful.
            while rows := np.fromiter(islice(order, take), np.int64).tolist():
                take *= 2
                groups = np.searchsorted(ends, rows, side="right")
                values: dict[int, Any] = {}
                for g in sorted(set(groups.tolist())):
                    first = int(ends[g]) - file.metadata.row_group(g).num_rows
                    here = [row for row, group in zip(rows, groups, strict=True) if group == g]
                    taken = file.read_row_group(g, columns=list(columns)).take([row - first for row in here])
                    values.update(zip(here, taken.to_pylist(), strict=True))
                yield from (document(values[row], columns, where) for row in rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def hub_documents(hub: HubData, seed: int | None) -> Iterator[Document]:
    """The rows of a data set of the hub, from its cache where that has it.

    Raises:
        CalibrationError: the hub cannot be reached (after `HUB_TIMEOUT`, not after minutes), or it has no such data set,
            configuration, split or column.
    """
    import datasets  # 100 MB of memory, for named data sets only

    name = ":".join(filter(None, (hub.name, hub.config)))
    silence = ""
    try:
        with _hub_answering_or_offline(hub.name) as silence:
            data = datasets.load_dataset(
                hub.name,
                hub.config,
                split=hub.split,
                streaming=hub.streamed,
                revision=hub.revision,
                data_files={hub.split: hub.files} if hub.files else None,
            )
        if seed is not None:
            data = data.shuffle(seed=seed, **({"buffer_size": SHUFFLE_BUFFER} if hub.streamed else {}))
        for row in data:
            if hub.column not in row:
                raise without(f"{name} ({hub.split}): no column", hub.column, row)
            yield value_of(row[hub.column], f"{name} ({hub.split}): column '{hub.column}'")
    except RepositoryNotFoundError:
        what, remedy = (
            f"The hub has no data set '{hub.name}', or it is private.",
            "Check the name; log in with `hf auth login`.",
        )
    except ValueError as error:  # no such configuration or split; `datasets` lists those that exist
        what = f"Data set '{name}' ({hub.split}) cannot be read: {_one_line(error)}"
        remedy = "Write hf:NAME[:CONFIG][:SPLIT][:COLUMN]."
    except (OSError, datasets.exceptions.DatasetsError, TransportError) as error:
        reason = f"the hub does not answer ({silence}) and the cache has no copy" if silence else _one_line(error)
        what, remedy = f"Data set '{name}' ({hub.split}) is not available: {reason}.", OFFLINE
    else:
        return
    raise CalibrationError(what, remedy)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


# The hub's client library changes (httpx, httpx2); what its errors derive from is the base of all transport errors.
TransportError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@contextmanager
def _hub_answering_or_offline(name: str) -> Iterator[str]:
    """Ask the hub once whether it is there; if not, let `datasets` look in its cache only, and say why.

    Left alone, `datasets` repeats a failed connection for 23 seconds before it looks there, with a warning for each try.
    """
    import datasets  # 100 MB of memory, for named data sets only

    before = datasets.config.HF_HUB_OFFLINE
    silence = "offline mode is set" if before else ""
    if not before and not Path(name).is_dir():
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
        except RepositoryNotFoundError:
            raise
        except HfHubHTTPError:
            pass  # it answers: gated, or busy. `datasets` says it better, or gets it from its cache
        except (OSError, TransportError) as error:
            silence = _one_line(error) or type(error).__name__
            datasets.config.HF_HUB_OFFLINE = True
    try:
        yield silence
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@cache
def stdlib_docstrings() -> tuple[str, ...]:
    """One text per module of the standard library: its docstrings, without those that an earlier module has as well.

    Files are parsed, never imported: importing has side effects.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    seen: set[str] = set()
    texts = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if left_out.intersection(path.relative_to(root).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the files' own invalid escapes
            tree = ast.parse(path.read_bytes())
        fresh = [text for text in _docstrings_of(tree) if text not in seen]
        seen.update(fresh)
        if fresh:
            texts.append("\n\n".join(dict.fromkeys(fresh)))
    if not texts:
        raise CalibrationError(f"pydoc: {root} holds no Python sources.", "Take another source: text:PATH, or self.")
    return tuple(texts)


def language_reference() -> tuple[str, dict[str, Any], str]:
    """The topics of Python's help, which are chapters of its language reference: prose of some 460,000 characters.

    Returns:
        the text, the hash and number of its topics, and in words how it was put together.

    Raises:
        CalibrationError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CalibrationError(
            f"This Python has no pydoc_data.topics ({one_line(error)}).",
            "Install Python's whole library, or name a text: text:PATH.",
        ) from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    facts = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "documents": len(topics)}
    return text, facts, f"{len(topics)} topics of the help of Python {platform.python_version()} joined by an empty line"


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text and text.strip():
            yield inspect.cleandoc(text)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from _docstrings_of(child)
