"""Recipe files: shipped recipes and the user's own, read as strict YAML, with overrides from the command line.

Overrides apply before the check. The check therefore covers them too, and one error shows all mistakes.
"""

from __future__ import annotations

import importlib.resources
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from ..checkpoint.folder import RECORD as RECORD_NAME
from ..checkpoint.folder import read_record
from ..checkpoint.untrusted.files import RECIPE, read_bounded, require_path, size_of
from ..compress.base import Settings, get_method, methods
from ..compress.forms.grids import BITS
from ..errors import CheckpointError, ModelError, RecipeError, brief, did_you_mean, one_line
from . import budget
from .recipe import Recipe
from .recipe_errors import problems_of

SCHEMA_LINE = "# yaml-language-server: $schema="
SCHEMA_FILE = "recipe.schema.json"  # beside the shipped recipes


def shipped() -> dict[str, str]:
    """YAML text of every shipped recipe, by name."""
    folder = importlib.resources.files("lrc.recipes")
    files = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return {name: files[name].read_text("utf-8") for name in sorted(files)}


def summary(text: str) -> str:
    """The summary of a recipe: its first comment line, apart from the one for editors."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(SCHEMA_LINE)]
    return lines[0].lstrip("# ").strip() if lines else ""


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
    asked = {item.partition("=")[0] for item in settings} | {
        key for key, value in (overrides or {}).items() if value is not None
    }
    place = placing("" if name in shipped() else where, text, asked)
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
    if asked & set(budget.KEYS):  # a budget on the command line replaces the file's budget, whichever key holds that
        for key in set(budget.KEYS) - asked:
            data.pop(key, None)
        _leave_size_open(data, asked)
    try:
        recipe = Recipe(**data)
    except ValidationError as error:
        raise RecipeError(where, problems + problems_of(error, Recipe, place=place)) from None
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
    known = get_method(name).settings
    key = known.sized_by
    if not key or {"settings", f"settings.{key}"} & set(asked):
        return
    bits = data.get("bits")
    codes = next((each for each in (1, *BITS) if each == bits and _takes(known, settings | {key: each})), None)
    shared = any(data.get(other) for other in ("keep", "limits", "depth")) or data.get("allocation", "uniform") != "uniform"
    data["settings"] = settings | {key: codes if key == "bits" and not shared else None}


def _takes(known: type[Settings], settings: dict[str, Any]) -> bool:
    """Whether a method has these settings, such as codes of so many bits."""
    try:
        known(**settings)
    except ValidationError:
        return False
    return True


def read_recipe(name: str) -> tuple[str, str]:
    """Read a shipped recipe or a file: (its description for error messages, its YAML text).

    Raises:
        RecipeError: neither exists, or the file cannot be read.
    """
    known = shipped()
    if name in known:
        return f"recipe {name}", known[name]
    try:
        require_path(name)
        path = Path(name).expanduser()
        if path.is_dir():
            inside = (
                f"{path / RECORD_NAME} repeats the run that made it." if (path / RECORD_NAME).is_file() else "Name a YAML file."
            )
            raise RecipeError(str(path), ["it is a folder, not a recipe"], inside)
        if size_of(path) is None:
            raise RecipeError(name, ["there is no shipped recipe and no file of that name"], did_you_mean(name, known))
        if path.name == RECORD_NAME:
            return str(path), recipe_of_record(path)
        return str(path), read_bounded(path, RECIPE).decode()
    except (CheckpointError, ModelError, UnicodeDecodeError, RuntimeError) as error:  # RuntimeError: no home for ~NAME
        raise RecipeError(brief(name), [f"cannot be read: {error}"]) from error


def recipe_of_record(path: Path) -> str:
    """The resolved recipe of a finished result, from its lrc.json, as YAML.

    Raises:
        CheckpointError: the record is missing or damaged.
    """
    return yaml.safe_dump(read_record(path.parent)["recipe"], sort_keys=False)


def recorded_dtype(name: str) -> torch.dtype | None:
    """The dtype of the run whose lrc.json is given as a recipe; None for other recipes."""
    path = Path(name).expanduser()
    if path.name != RECORD_NAME or not path.is_file():
        return None
    return getattr(torch, str(read_record(path.parent)["identity"]["dtype"]))


_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # examples: a date with month 13, `0x_`, a thousand nested brackets


_VALUES = 20_000  # a recipe with a pattern for each matrix of a large model has some thousand
_DEPTH = 32
_LONGEST = 10_000  # characters; a number of 300,000 parts takes a minute


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys (PyYAML silently takes the last one)."""

    def get_single_data(self) -> Any:
        """The value of the document, if it is of a bounded size with all its aliases written out."""
        node = self.get_single_node()
        if node is None:
            return None
        _require_small(node)
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := sorted(key for key, count in keys.items() if count > 1):
            raise yaml.YAMLError(f"'{brief(twice[0])}' is given twice")
        return super().construct_mapping(node, deep)


def _require_small(root: yaml.Node) -> None:
    """Refuse a document that grows when its aliases are written out: nine lines can stand for a billion values.

    Raises:
        yaml.YAMLError: it has more than `_VALUES` values then, is nested too deeply, contains itself,
            or holds a text that is too long.
    """
    sizes: dict[int, int] = {}
    left: list[tuple[yaml.Node, bool]] = [(root, False)]
    open_nodes: set[int] = set()
    while left:
        node, seen = left.pop()
        inner = [] if isinstance(node, yaml.ScalarNode) else _inner_nodes(node)
        if not inner and len(node.value) > _LONGEST:
            raise yaml.YAMLError(f"a value has {len(node.value):,} characters")
        if seen:
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(each)] for each in inner)
            if sizes[id(node)] > _VALUES:
                raise yaml.YAMLError(f"with its aliases written out it has more than {_VALUES:,} values")
        elif id(node) not in sizes:
            if id(node) in open_nodes:
                raise yaml.YAMLError("an alias stands for a value that contains it")
            open_nodes.add(id(node))
            if len(open_nodes) > _DEPTH:
                raise yaml.YAMLError(f"it is nested more than {_DEPTH} levels deep")
            left.append((node, True))
            left.extend((each, False) for each in inner)


def _inner_nodes(node: Any) -> list[yaml.Node]:
    """The values of a list, or the keys and values of a mapping."""
    return list(node.value) if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]


def placing(file: str, text: str, asked: Collection[str]) -> Callable[[Sequence[int | str]], str]:
    """A function (path of a key) -> 'FILE:LINE:COLUMN: ' of that key, or of what should hold it.

    Args:
        file: empty for a text that no person wrote.
        asked: dotted keys of the command line; they are in no file.
    """
    root = yaml.compose(text, _Loader) if file else None

    def place(path: Sequence[int | str]) -> str:
        """The place of the last part of a path that the file holds."""
        if root is None or any(".".join(map(str, path[: end + 1])) in asked for end in range(len(path))):
            return ""
        at, mark = root, root.start_mark
        for part in path:
            if isinstance(at, yaml.MappingNode):
                entry = next((pair for pair in at.value if pair[0].value == str(part)), None)
                if entry is None:
                    break
                mark, at = entry[0].start_mark, entry[1]
            elif isinstance(at, yaml.SequenceNode) and isinstance(part, int) and part < len(at.value):
                at = at.value[part]
                mark = at.start_mark
            else:
                break
        return f"{file}:{mark.line + 1}:{mark.column + 1}: "

    return place


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _Loader)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        at = "" if mark is None else f"{where}:{mark.line + 1}:{mark.column + 1}: "
        raise RecipeError(where, [f"{at}not YAML: {' '.join(str(error).split())}"]) from error
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
