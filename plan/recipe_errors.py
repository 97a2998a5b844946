"""Pydantic's validation errors as lines that name the keys of the recipe as the user writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..errors import LrcError, brief, did_you_mean

Place = Callable[[Sequence[int | str]], str]  # path of a key -> where it is in the file, such as 'my.yaml:3:5: '


def problems_of(error: ValidationError, model: type[BaseModel], prefix: str = "", place: Place = lambda path: "") -> list[str]:
    """One line per mistake.

    Args:
        error: pydantic's error.
        model: the class that was validated, for suggestions of keys.
        prefix: prefix of the keys in the lines, such as 'settings.'.
        place: what a line begins with, by the path of its key.
    """
    lines: list[str] = []
    for item in error.errors():
        path = _named(model, item["loc"])
        key = prefix + ".".join(map(str, path))
        if item["type"] == "extra_forbidden":
            gone = _gone(model, path)
            lines.append(place(path) + (gone or f"unknown key '{key}'. {_nearest(model, path)}".rstrip()))
        elif item["type"] == "settings":
            lines += [_placed(line, path, place) for line in item["ctx"]["problems"]]
        elif item["type"] == "missing":
            lines.append(f"{place(path)}'{key}' is missing")
        else:
            shown = f" (got {_shown(item['input'])})" if key and not isinstance(item["input"], dict) else ""
            cause = item.get("ctx", {}).get("error")
            message = str(cause) if isinstance(cause, LrcError | ValueError) else item["msg"]
            lines.append(place(path) + (f"{key}: {message}{shown}" if key else message))
    return lines


def _placed(line: str, path: Sequence[int | str], place: Place) -> str:
    """A line about settings, with the whole path of its key: those of a method do not know which alternative they are of."""
    before = "".join(f"{part}." for part in path[:-1])
    found = re.search(r"settings\.([\w.]+)", line)
    inner = [int(part) if part.isdecimal() else part for part in found[1].rstrip(".").split(".")] if found else []
    return place([*path, *inner]) + (line.replace(found[0], before + found[0], 1) if found else line)


def _shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long; a number of thousands of digits cannot be written at all."""
    try:
        return brief(repr(value))
    except ValueError:
        return "a number of thousands of digits"


def _named(model: type[BaseModel], path: tuple[int | str, ...]) -> list[int | str]:
    """The path without the class names that pydantic inserts after a key with a union type."""
    kind: Any = model
    found = []
    for part in path:
        inner = _inner(kind, part)
        if inner is None and get_origin(kind) in (Union, UnionType):
            tried = [each for each in get_args(kind) if str(part).startswith(getattr(each, "__name__", "?"))]
            if tried:
                kind = tried[0]
                continue
        kind = inner
        found.append(part)
    return found


def _gone(model: type[BaseModel], path: Sequence[int | str]) -> str:
    """The error line for a key of an earlier version; empty for a key that never existed."""
    told: Mapping[str, str] = getattr(_model_at(model, path[:-1]), "gone", {})
    why = told.get(str(path[-1]))
    return f"the key '{'.'.join(map(str, path))}' is gone. {why}" if why else ""


def _nearest(model: type[BaseModel], path: Sequence[int | str]) -> str:
    word, inner = str(path[-1]), _model_at(model, path[:-1])
    if inner is None:
        return ""
    fields = _fields(inner)
    deeper = [name for name, kind in fields.items() if (held := _one_model(kind)) and word in _fields(held)]
    if deeper and word not in fields:
        return f"Did you mean '{deeper[0]}.{word}'?"
    return did_you_mean(word, fields) if fields else "It takes no settings."


def _model_at(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel] | None:
    """The model class at a path of keys and indices inside `model`; None if the path leads to no single model class."""
    kind: Any = model
    for part in path:
        kind = _inner(kind, part)
    return _one_model(kind)


def _inner(kind: Any, part: int | str) -> Any:
    """The annotation of the value under a key or index inside an annotated type; None if there is none."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _fields(kind).get(str(part))
    origin, args = get_origin(kind), get_args(kind)
    if origin is dict:
        return args[1]
    if origin in (tuple, list) and isinstance(part, int):
        return args[0]
    return next((found for each in args if (found := _inner(each, part)) is not None), None)


def _one_model(kind: Any) -> type[BaseModel] | None:
    """The model class of an annotation such as `Model` or `Model | None`; None for any other annotation."""
    found = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel)]
    return found[0] if len(found) == 1 and get_origin(kind) not in (dict, tuple, list) else None


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """The keys of a model as recipes write them, with their annotations."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}
