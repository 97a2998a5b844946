"""What pydantic found wrong in a recipe, in the words of the person who wrote it."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from .errors import LrcError, did_you_mean


def problems_of(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per mistake, in the user's words."""
    lines = []
    for item in error.errors():
        key = prefix + ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{key}'. {_nearest(model, item['loc'])}")
        elif item["type"] == "settings":
            lines += item["ctx"]["problems"]
        elif item["type"] == "missing":
            lines.append(f"'{key}' is missing")
        else:
            shown = f" (got {item['input']!r})" if key and not isinstance(item["input"], dict) else ""
            cause = item.get("ctx", {}).get("error")
            message = str(cause) if isinstance(cause, LrcError | ValueError) else item["msg"]
            lines.append(f"{key}: {message}{shown}" if key else message)
    return lines


def _nearest(model: type[BaseModel], path: tuple[int | str, ...]) -> str:
    word, fields = str(path[-1]), _fields_at(model, path[:-1])
    deeper = [f"{field}.{word}" for field in fields if word in _fields_at(model, (*path[:-1], field)) and word not in fields]
    if deeper:
        return f"Did you mean '{deeper[0]}'?"
    return did_you_mean(word, fields) if fields else "It takes no settings."


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return list(model.model_fields)
        model = inner
    return list(model.model_fields)
