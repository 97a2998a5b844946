"""Open a file of text, compressed or not, and refuse what is no text before anything is made of it."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ...errors import CalibrationError

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Suffix -> kind of a file that is made of documents; a file of another suffix is one long text."""
_COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}  # suffix -> first bytes
_OTHER = {b"PAR1": "a parquet file", b"PK\x03\x04": "a zip archive", b"%PDF": "a PDF", b"\x89PNG": "a picture"}
_WIDE = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_HEAD = 1 << 16


def kind_of(path: Path) -> str:
    """'jsonl', 'json', 'csv', 'parquet' or 'text': what a file is by its name, whatever compresses it."""
    bare = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return KINDS.get(bare.suffix.lower(), "text")


def is_compressed(path: Path) -> bool:
    """Whether a file is compressed, by its name."""
    return path.suffix.lower() in _COMPRESSED


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file, from the beginning; they are UTF-8 as far as the first ones tell.

    Raises:
        CalibrationError: the name's suffix does not fit the content, the content is no text in UTF-8, or (also while reading)
            the file is damaged or cut off.
    """
    _require_suffix(path)
    try:
        with _decompressed(path) as file:
            head = file.peek(_HEAD)[:_HEAD]
            _require_text(path, head)
            yield file
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        what = f"cannot be decompressed: {error}" if is_compressed(path) else f"cannot be read: {error}"
        raise CalibrationError(f"{path} {what}.", "The file is damaged or cut off: get it again.") from None


def _decompressed(path: Path) -> io.BufferedReader:
    readers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
    return io.BufferedReader(readers.get(path.suffix.lower(), io.FileIO)(path), 1 << 20)


def _zstd(path: Path) -> Any:
    import pyarrow  # type: ignore[import-untyped]

    return pyarrow.input_stream(str(path), compression="zstd")


def _require_suffix(path: Path) -> None:
    with path.open("rb") as file:
        first = file.read(8)
    by_name = path.suffix.lower()
    by_content = next((suffix for suffix, magic in _COMPRESSED.items() if first.startswith(magic)), None)
    if by_name in _COMPRESSED and first and by_content != by_name:
        is_ = f"compressed as {by_content}" if by_content else "not compressed"
        raise CalibrationError(f"{path} is named {by_name}, and its content is {is_}.", "Rename it, or get it again.")
    if by_name not in _COMPRESSED and by_content:
        raise CalibrationError(f"{path} is compressed ({by_content}).", f"Name it {path.name}{by_content}, or decompress it.")


def _require_text(path: Path, head: bytes) -> None:
    if wide := next((name for mark, name in _WIDE.items() if head.startswith(mark)), None):
        raise CalibrationError(
            f"{path} is {wide} text, as its first bytes say, not UTF-8.",
            f"Convert it: iconv -f {wide} -t UTF-8 FILE > NEW.",
        )
    if other := next((name for mark, name in _OTHER.items() if head.startswith(mark)), None):
        raise CalibrationError(f"{path} is {other}, not text.", "Name a file of text; parquet is written parquet:PATH.")
    if b"\0" in head:
        raise CalibrationError(
            f"{path} is no text: byte {head.index(0):,} is 0.", "Name a file of text in UTF-8 (UTF-16 has zeros, too)."
        )


def wrong_byte(path: Path) -> CalibrationError:
    """The error for a file that is not UTF-8 text, with the place of the first wrong byte in the decompressed file."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with opened(path) as file:
        while True:
            block = file.read(1 << 20)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:  # its object begins with what was left of the block before
                place = read + len(block) - len(error.object) + error.start
                return CalibrationError(
                    f"{path} is not UTF-8 text: byte {place:,} is 0x{error.object[error.start]:02x}.",
                    "Convert it to UTF-8: iconv -f LATIN1 -t UTF-8 FILE > NEW, with the name of its own encoding.",
                )
            if not block:
                raise ValueError(f"{path} is UTF-8")
            read += len(block)
