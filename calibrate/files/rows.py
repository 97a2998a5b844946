"""Rows of a file that can only be read from its beginning: compressed JSON lines, JSON arrays, CSV.

A shuffled order takes the rows that it needs in passes over the file, so that memory holds those rows and no more. The first
pass counts the rows and hashes the content.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ...errors import CalibrationError
from .columns import Document, document, require_columns, without
from .opening import opened, wrong_byte

LONGEST = 64 << 20  # bytes of one row
_FIRST = 256  # rows of the first pass that takes rows
_SPACE = re.compile(r"[ \t\r\n]*")

Row = dict[str, Any] | str | None  # None: a blank line
Order = Callable[[int], Iterator[int]]  # (number of rows) -> their numbers in the order in which they are wanted


@dataclass(frozen=True)
class Rows:
    """The rows of one file.

    Args:
        path: of the file.
        kind: 'jsonl', 'json' or 'csv'.
        column: the column or field with the text; empty: by its name (columns.py).
    """

    path: Path
    kind: str
    column: str = ""

    def documents(self, order: Order | None) -> tuple[Iterator[Document], str]:
        """The documents, read as they are asked for, and the sha256 of the decompressed file.

        Args:
            order: None: the file's own.

        Raises:
            CalibrationError: the file is damaged, a row that is read is wrong (also while iterating), or no column holds text.
        """
        digest, count = hashlib.sha256(), 0
        columns: tuple[str, ...] = ()
        for where, taken in self._lines(digest):
            count += 1
            if not columns and isinstance(row := taken(), dict):
                columns = require_columns(where, self.column, list(row), f"{self.kind}:PATH:FIELD", "field")
        return self._documents(order, count, columns), digest.hexdigest()

    def _documents(self, order: Order | None, count: int, columns: tuple[str, ...]) -> Iterator[Document]:
        if order is None:
            for where, row in self._rows():
                yield from of_row(row, columns, where)
            return
        wanted, take = order(count), _FIRST
        while handful := list(islice(wanted, take)):
            take *= 2
            found: dict[int, tuple[str, Row]] = {}
            among = set(handful)
            for number, placed in enumerate(self._rows(among)):
                if number in among:
                    found[number] = placed
                    if len(found) == len(among):
                        break
            for number in handful:
                where, row = found.pop(number)
                yield from of_row(row, columns, where)

    def _rows(self, wanted: set[int] | None = None) -> Iterator[tuple[str, Row]]:
        """(place, row) of every row; only those with wanted numbers (None: all) are taken apart."""
        for number, (where, taken) in enumerate(self._lines()):
            yield where, (taken() if wanted is None or number in wanted else None)

    def _lines(self, digest: Any = None) -> Iterator[tuple[str, Callable[[], Row]]]:
        """(place, function that takes the row apart) of every row."""
        with opened(self.path) as plain:
            file: IO[bytes] = plain if digest is None else io.BufferedReader(_Hashing(plain, digest), 1 << 20)
            yield from {"jsonl": self._json_lines, "json": self._json_array, "csv": self._csv}[self.kind](file)
            while file.read(1 << 20):  # the hash is of the whole file
                pass

    def _json_lines(self, file: IO[bytes]) -> Iterator[tuple[str, Callable[[], Row]]]:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            where = f"{self.path}:{number}"
            if len(line) > LONGEST:
                raise CalibrationError(f"{where}: the line is longer than {LONGEST >> 20} MiB.", "Cut it into several rows.")
            yield where, partial(json_line, line, where)

    def _json_array(self, file: IO[bytes]) -> Iterator[tuple[str, Callable[[], Row]]]:
        text = io.TextIOWrapper(file, "utf-8-sig")
        try:
            for number, value in enumerate(_Elements(text, self.path)):
                where = f"{self.path}: element {number}"
                if not isinstance(value, dict | str | None):
                    raise CalibrationError(
                        f"{where} is {type(value).__name__}, neither text nor an object.", 'Write ["…"] or [{"text": "…"}].'
                    )
                yield where, partial(_same, value)
        except UnicodeDecodeError:
            raise wrong_byte(self.path) from None
        text.detach()  # the file is read on

    def _csv(self, file: IO[bytes]) -> Iterator[tuple[str, Callable[[], Row]]]:
        csv.field_size_limit(LONGEST)
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        try:
            first = text.readline(LONGEST)
            delimiter = max(",;\t|", key=lambda mark: (first.count(mark), mark == ","))
            names = next(csv.reader([first], delimiter=delimiter), [])
            if not any(name.strip() for name in names):
                raise CalibrationError(f"{self.path} has no header.", "Its first line names the columns, such as text,source.")
            require_columns(str(self.path), self.column, names, "csv:PATH:COLUMN")
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            for fields in reader:
                where = f"{self.path}:{reader.line_num + 1}"
                if len(fields) > len(names):
                    raise CalibrationError(
                        f"{where}: {len(fields)} fields, and the header has {len(names)}.",
                        'Put fields that hold the delimiter or the end of a line in quotes ("…").',
                    )
                yield where, partial(_named, names, fields)
        except csv.Error as error:
            raise CalibrationError(f"{self.path} is damaged as CSV: {error}.", "Write it anew, with quotes closed.") from None
        except UnicodeDecodeError:
            raise wrong_byte(self.path) from None
        text.detach()


def _same(value: Row) -> Row:
    return value


def _named(names: list[str], fields: list[str]) -> Row:
    return dict(zip(names, fields, strict=False)) if fields else None


def of_row(row: Row, columns: tuple[str, ...], where: str) -> Iterator[Document]:
    """The document of a row, if it is not blank.

    Raises:
        CalibrationError: the row lacks the column, or holds no text there.
    """
    if isinstance(row, str):
        yield row
    elif row is not None:
        if columns[0] not in row:
            raise without(f"{where}: no field", columns[0], row)
        yield document(row, columns, f"{where}: field ")


def json_line(line: bytes, where: str) -> dict[str, Any] | None:
    """The object of one line of JSON; None for a blank line.

    Raises:
        CalibrationError: the line is not JSON, or no object.
    """
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # both invalid JSON and invalid UTF-8
        raise CalibrationError(f"{where}: not a line of JSON: {error}.", "Write one JSON object per line.") from None
    if not isinstance(row, dict):
        raise CalibrationError(
            f"{where}: {type(row).__name__}, not an object.", 'Write {"text": "…"} per line, or one list in a file json:PATH.'
        )
    return row


def json_kind(path: Path) -> str:
    """'json' for a file that is one list, 'jsonl' for a file of JSON lines, by its first character.

    Raises:
        CalibrationError: it is one object over several lines, or the file cannot be read.
    """
    with opened(path) as file:
        first = file.readline(LONGEST).removeprefix(codecs.BOM_UTF8).strip()
        while not first and (line := file.readline(LONGEST)):
            first = line.strip()
        if first.startswith(b"[") or not first:
            return "json"
        try:
            json.loads(first)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(
                f"{path} is neither a list nor JSON lines: {error}.", 'Write [{"text": "…"}, …], or one object per line.'
            ) from None
        return "jsonl"


class _Hashing(io.RawIOBase):
    """Reads another file and hashes what is read."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self._file, self._digest = file, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        self._digest.update(block)
        buffer[: len(block)] = block
        return len(block)


class _Elements:
    """The elements of a JSON array, read one at a time.

    Raises:
        CalibrationError: the text is no array, or is damaged.
    """

    def __init__(self, text: IO[str], path: Path) -> None:
        self._text, self._path = text, path
        self._held, self._at, self._decoder = "", 0, json.JSONDecoder()

    def __iter__(self) -> Iterator[Any]:
        mark = self._next()
        if not mark:
            return
        if mark != "[":
            raise self._damaged("it begins with no list")
        self._at += 1
        mark = self._next()
        while mark != "]":
            yield self._value()
            mark = self._next()
            if mark == ",":
                self._at += 1
                self._next()
            elif mark != "]":
                raise self._damaged(f"{mark or 'the end of the file'!r} in place of a comma or the list's end")
        self._at += 1
        if self._next():
            raise self._damaged("there is more after the list")

    def _next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._held) or not self._more():
                return self._held[self._at : self._at + 1]

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
                if end < len(self._held) or not self._more():  # a number may go on
                    self._at = end
                    return value
            except RecursionError:
                raise self._damaged("it is nested too deep") from None
            except ValueError as error:
                if len(self._held) - self._at > LONGEST or not self._more():
                    raise self._damaged(str(error)) from None

    def _more(self) -> bool:
        """Read on; what was taken is let go."""
        block = self._text.read(1 << 20)
        self._held, self._at = self._held[self._at :] + block, 0
        return bool(block)

    def _damaged(self, why: str) -> CalibrationError:
        return CalibrationError(
            f"{self._path} is damaged as JSON: {why}.", "Get the file again, or write one object per line (jsonl:PATH)."
        )
