"""Recipes as files: shipped ones and one's own, YAML read strictly, overridden from the command line, checked as a whole.

Overrides are applied before the check, so they are checked too, and all mistakes are shown together.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import RecipeError, did_you_mean, one_line
from . import budget
from .recipe import Recipe
from .recipe_errors import problems_of


def shipped() -> dict[str, str]:
    """The shipped recipes: name -> YAML text."""
    folder = importlib.resources.files("lrc.recipes")
    files = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return {name: files[name].read_text("utf-8") for name in sorted(files)}


def summary(text: str) -> str:
    """What a recipe says of itself: its first comment line."""
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    return first.lstrip("# ").strip()


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe by shipped name or path, apply overrides, check it.

    Args:
        name: a shipped recipe's name or a YAML file's path.
        overrides: dotted key -> value, from the command line's own flags; None values are left out.
        settings: `KEY=VALUE` strings; KEY is dotted ('calibration.samples'), VALUE is read as YAML.

    Raises:
        RecipeError: with every problem found.
    """
    where, text = read_recipe(name)
    data = _parse(where, text)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    problems: list[str] = []
    for item in settings:
        key, equals, value = item.partition("=")
        if not equals or not key:
            problems.append(f"--set '{item}': write KEY=VALUE, such as --set calibration.samples=64")
            continue
        try:
            parsed = yaml.load(value, _Loader)
        except _NOT_YAML as error:
            problems.append(f"--set '{item}': the value is not YAML: {one_line(error)}")
            continue
        problems += _put(data, key, parsed)
    for key, value in given.items():
        problems += _put(data, key, value)
    asked = {item.partition("=")[0] for item in settings} | set(given)
    if asked & set(budget.KEYS):  # a budget on the command line takes the place of the file's, however that says it
        for key in set(budget.KEYS) - asked:
            data.pop(key, None)
    try:
        recipe = Recipe(**data)
    except ValidationError as error:
        raise RecipeError(where, problems + problems_of(error, Recipe)) from None
    except TypeError:
        raise RecipeError(where, [*problems, "keys must be words"]) from None
    if problems:
        raise RecipeError(where, problems)
    return recipe


def read_recipe(name: str) -> tuple[str, str]:
    """(where, YAML text) of a shipped recipe or a file.

    Raises:
        RecipeError: neither exists.
    """
    known = shipped()
    if name in known:
        return f"recipe {name}", known[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise RecipeError(name, ["there is no shipped recipe and no file of that name"], did_you_mean(name, known))
    try:
        return str(path), path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(name, [f"cannot be read: {error}"]) from error


_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # a date of month 13, 0x_, brackets a thousand deep


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself would silently take the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"'{twice[0]}' is given twice")
        return super().construct_mapping(node, deep)


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _Loader)
    except _NOT_YAML as error:
        raise RecipeError(where, [f"not YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(data, dict):
        raise RecipeError(where, ["a recipe is a mapping of keys to values, such as 'method: svd-llm'"])
    return data


def _entries(held: list[Any]) -> str:
    return f"entries 0 to {len(held) - 1}" if held else "none"


def _put(data: dict[str, Any], dotted: str, value: Any) -> list[str]:
    *path, last = dotted.split(".")
    at: Any = data
    for index, part in enumerate(path):
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                return [f"'{dotted}': '{'.'.join(path[:index])}' has no entry '{part}'; it has {_entries(at)}"]
            at = at[int(part)]
        elif isinstance(at, dict):
            at = at.setdefault(part, {})
        if not isinstance(at, dict | list):
            return [f"'{dotted}': '{'.'.join(path[: index + 1])}' is a value, not a mapping"]
    if isinstance(at, list):
        return [f"'{dotted}': '{'.'.join(path)}' is a list; name one of its {len(at)} entries, such as {'.'.join(path)}.0"]
    at[last] = value
    return []
