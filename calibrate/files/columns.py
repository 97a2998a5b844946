"""Which column of a table, or which field of a JSON object, holds the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ...errors import CalibrationError

Document = str | list[dict[str, Any]]
"""A text, or a conversation: a list of {"role": …, "content": …}. A null is ""."""

_ALONE = ("text", "content", "messages", "conversations", "conversation")
_ASKED = ("prompt", "instruction", "question")
_MORE = ("input", "context")
_ANSWERED = ("completion", "response", "output", "answer", "chosen")
_SHOWN = 30  # columns that a message lists
_ROLES = {"human": "user", "gpt": "assistant"}  # the words of ShareGPT


def columns_of(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that hold the text by their usual names: one, or a prompt and its answer; empty if none is known.

    `text` before `content` before conversations before prompts; upper and lower case are the same.
    """
    known = {name.lower(): name for name in reversed(list(names)) if isinstance(name, str)}
    if alone := next((known[name] for name in _ALONE if name in known), None):
        return (alone,)
    asked = next((known[name] for name in _ASKED if name in known), None)
    if asked is None:
        return ()
    more = [known[name] for name in _MORE if name in known]
    return (asked, *more, *[known[name] for name in _ANSWERED if name in known][:1])


def require_columns(where: str, wanted: str, names: Sequence[str], shape: str, what: str = "column") -> tuple[str, ...]:
    """The columns to read.

    Args:
        where: the file, or the place in it, for the message.
        wanted: the column that the source names; empty if it names none.
        names: of all columns.
        shape: how a source of this kind names a column, such as 'csv:PATH:COLUMN'.
        what: 'column' or 'field', for the message.

    Raises:
        CalibrationError: there is no such column, or none of a known name.
    """
    if wanted in names and wanted:
        return (wanted,)
    if not wanted and (found := columns_of(names)):
        return found
    raise without(f"{where}: no {what}", wanted or "text", names, shape)


def without(what: str, wanted: str, existing: Iterable[Any], shape: str = "") -> CalibrationError:
    """The error for a column or field that is not there; it lists those that are."""
    names = sorted(map(str, existing))[:_SHOWN]
    close = get_close_matches(wanted, names, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    more = f": {shape}" if shape else ""
    return CalibrationError(
        f"{what} '{wanted}'; there are: {', '.join(names) or 'none'}.", f"{hint}It is the last part of the source's name{more}."
    )


def document(row: Mapping[str, Any], columns: Sequence[str], where: str) -> Document:
    """The document of a row: one column's value, or the texts of several, an empty line between them.

    Raises:
        CalibrationError: a value is neither text nor a conversation.
    """
    parts = [value_of(row.get(name), f"{where}'{name}'") for name in columns]
    if len(parts) == 1:
        return parts[0]
    if whole := next((part for part in parts if isinstance(part, list)), None):
        return whole
    return "\n\n".join(part for part in parts if isinstance(part, str) and part)


def value_of(value: Any, where: str) -> Document:
    """A value as a document.

    Raises:
        CalibrationError: it is neither text nor a conversation.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        if all({"role", "content"} <= turn.keys() for turn in value):
            return value
        if all({"from", "value"} <= turn.keys() for turn in value):
            return [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in value]
    raise CalibrationError(
        f"{where} holds {type(value).__name__}, not text.", 'Name one with text, or with turns [{"role": …, "content": …}].'
    )
