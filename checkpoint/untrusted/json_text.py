"""JSON that anyone may have written: bounded in size, depth and number of values, and with one meaning."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, LrcError, brief
from .files import read_bounded

# lrc's own deepest value is a corrected, quantized factor of an expert, 12 levels down
DEPTH = 64
# each takes some 100 bytes of memory
VALUES = 4_000_000


def json_object(path: Path, limit: int, kind: type[LrcError] = CheckpointError, finite: bool = False) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        limit: the most bytes that the file may have.
        kind: class of the errors.
        finite: whether numbers that are NaN are refused, and infinite ones in the settings of the rotary embedding.

    Raises:
        LrcError: the file is missing or no regular file, too large or too deep, no JSON object, gives one key two values, or
            holds text that is no Unicode.
    """
    return parsed(read_bounded(path, limit, kind), str(path), kind, finite)


def parsed(data: bytes, where: str, kind: type[LrcError] = CheckpointError, finite: bool = False) -> dict[str, Any]:
    """The object in a JSON text; as for `json_object`.

    Args:
        where: what the text is, for messages.
    """
    name = brief(where)
    if data.count(b",") + data.count(b"[") + data.count(b"{") > VALUES:
        raise kind(f"{name} holds more than {VALUES:,} values.", "It is damaged, or not what its name says: get it again.")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise _too_deep(name, kind) from error
    except ValueError as error:  # no JSON, no UTF-8, a number of thousands of digits, a key with two values
        raise kind(f"{name} cannot be read as JSON: {brief(str(error))}", "It is damaged: get it again.") from error
    if not isinstance(value, dict):
        raise kind(f"{name} holds {_called(value)}, not a JSON object.", "It is damaged: get it again.")
    _check_values(value, name, kind, finite)
    return value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise ValueError(f"the key '{brief(key)}' is given twice, with two values")
    return found


def _check_values(value: dict[str, Any], name: str, kind: type[LrcError], finite: bool) -> None:
    for path, each in walked(value):
        if len(path) > DEPTH:
            raise _too_deep(name, kind)
        if isinstance(each, str) and not _is_unicode(each):
            raise kind(f"{name}: '{dotted(path)}' holds half a surrogate pair.", "It is damaged: get it again.")
        if finite and isinstance(each, float) and (math.isnan(each) or (math.isinf(each) and "rope" in dotted(path))):
            raise kind(f"{name}: '{dotted(path)}' is {each}.", "Write a finite number there.")


def walked(value: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value inside a value of JSON, and every key, with its path; without recursion."""
    left: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while left:
        path, each = left.pop()
        yield path, each
        if isinstance(each, dict):
            for key, inner in each.items():
                left.append(((*path, key), inner))
                if not key.isascii():
                    yield path, key
        elif isinstance(each, list):
            left.extend(((*path, place), inner) for place, inner in enumerate(each))


def dotted(path: tuple[str | int, ...]) -> str:
    """A path inside a value of JSON, for messages."""
    return brief(".".join(map(str, path)))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_deep(name: str, kind: type[LrcError]) -> LrcError:
    return kind(f"{name} is nested more than {DEPTH} levels deep.", "It is damaged, or made to do harm: get it again.")


def _called(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
