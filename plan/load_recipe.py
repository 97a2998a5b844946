"""Recipe files: shipped recipes and the user's own, read as strict YAML, with overrides from the command line.

Overrides apply before the check. The check therefore covers them too, and one error shows all mistakes.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..compress.base import get_method, methods
from ..compress.forms.grids import BITS
from ..errors import RecipeError, did_you_mean, one_line
from . import budget
from .recipe import Recipe
from .recipe_errors import problems_of


def shipped() -> dict[str, str]:
    """YAML text of every shipped recipe, by name."""
    folder = importlib.resources.files("lrc.recipes")
    files = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return {name: files[name].read_text("utf-8") for name in sorted(files)}


def summary(text: str) -> str:
    """The summary of a recipe: its first comment line."""
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    return first.lstrip("# ").strip()


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its shipped name or its path, apply overrides, and check it.

    Args:
        name: name of a shipped recipe, or path of a YAML file.
        overrides: dotted key -> value, from command-line flags; None values are ignored.
        settings: `KEY=VALUE` strings from `--set`; KEY is dotted ('calibration.samples'), VALUE is YAML.

    Raises:
        RecipeError: the recipe cannot be read or is wrong; the error lists every problem.
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
    if asked & set(budget.KEYS):  # a budget on the command line replaces the file's budget, whichever key holds that
        for key in set(budget.KEYS) - asked:
            data.pop(key, None)
        _leave_size_open(data, asked)
    try:
        recipe = Recipe(**data)
    except ValidationError as error:
        raise RecipeError(where, problems + problems_of(error, Recipe)) from None
    except TypeError:
        raise RecipeError(where, [*problems, "keys must be words"]) from None
    if problems:
        raise RecipeError(where, problems)
    return recipe


def _leave_size_open(data: dict[str, Any], asked: Collection[str]) -> None:
    """Let a budget of the command line replace the setting by which the file fixes the size (bits of rtn, rank of lqer).

    A whole number of bits means the codes of a method that only rounds, see `Recipe.bits_of_codes`.

    Args:
        data: the recipe's keys; changed.
        asked: the dotted keys that the command line gives: a setting among them is not replaced.
    """
    name, settings = data.get("method"), data.get("settings") or {}
    if not isinstance(name, str) or name not in methods() or not isinstance(settings, dict):
        return  # the check of the recipe says what is wrong
    key = get_method(name).settings.sized_by
    if not key or {"settings", f"settings.{key}"} & set(asked):
        return
    bits = data.get("bits")
    codes = next((each for each in BITS if each == bits), None)
    shared = any(data.get(other) for other in ("keep", "limits", "depth")) or data.get("allocation", "uniform") != "uniform"
    data["settings"] = settings | {key: codes if key == "bits" and not shared else None}


def read_recipe(name: str) -> tuple[str, str]:
    """Read a shipped recipe or a file: (its description for error messages, its YAML text).

    Raises:
        RecipeError: neither exists, or the file cannot be read.
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


_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # examples: a date with month 13, `0x_`, a thousand nested brackets


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys (PyYAML silently takes the last one)."""

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
