"""`lrc recipe show`, `new`, `check`, `diff` and `schema`: what a person needs to write a recipe of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import OutputError, RequestError
from ..common.json_output import Json, answered, require_json
from ..common.options import Set, recipe_names

Named = Annotated[
    str, typer.Argument(help="A shipped recipe's name, a YAML file, or lrc.json of a result.", autocompletion=recipe_names)
]


def recipe_show(name: Annotated[str, typer.Argument(help="A shipped recipe's name.", autocompletion=recipe_names)]) -> None:
    """Print a recipe.

    Redirect it into a file to start one of your own; lrc recipe new explains every key.
    """
    import importlib.resources

    from ...plan.load_recipe import SCHEMA_FILE, SCHEMA_LINE, read_recipe

    text = read_recipe(name)[1]
    place = importlib.resources.files("lrc.recipes") / SCHEMA_FILE  # the line for editors holds wherever the text is put
    print(text.replace(f"{SCHEMA_LINE}{SCHEMA_FILE}", f"{SCHEMA_LINE}{place}"), end="")


def recipe_new(
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    basis: Annotated[
        str | None, typer.Option("--from", help="A recipe to begin with.", autocompletion=recipe_names, show_default="svd-llm")
    ] = None,
) -> None:
    """Write a commented recipe with every key that you may want."""
    from ...plan.load_recipe import load_recipe
    from ...plan.recipes.new_recipe import new_recipe

    if file.exists():
        raise RequestError(f"{file} exists.", "Name a new file.")
    if not file.parent.is_dir():
        raise RequestError(f"The folder of {file} does not exist.", "Create it first.")
    if basis is not None:
        load_recipe(basis)
    try:
        file.write_text(new_recipe(str(file), basis), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"Cannot write {file}: {error.strerror}.", "Name a file in a folder that you may write to."
        ) from error
    print(f"{file}: written. `lrc recipe check {file}` checks it, `lrc plan MODEL --recipe {file}` says what it would do.")


def recipe_check(file: Named, set_: Set = None, json_file: Json = None) -> None:
    """Check a recipe and print it with all defaults."""
    require_json(json_file)
    import yaml

    from ...plan.load_recipe import load_recipe

    whole = every_default(load_recipe(file, settings=set_ or []))
    if not answered(json_file, whole):
        print(yaml.safe_dump(whole, sort_keys=False), end="")


def recipe_diff(first: Named, second: Named, json_file: Json = None) -> None:
    """Print the keys in which two recipes differ, defaults included."""
    require_json(json_file)
    from ...plan.load_recipe import load_recipe

    sides = [dict(_flat(every_default(load_recipe(name)))) for name in (first, second)]
    keys = [key for key in dict.fromkeys([*sides[0], *sides[1]]) if sides[0].get(key) != sides[1].get(key)]
    answer = {key: {"first": sides[0].get(key), "second": sides[1].get(key)} for key in keys}
    if answered(json_file, answer):
        return
    if not keys:
        print(f"{first} and {second} ask for the same.")
    for key in keys:
        print(key)
        for name, side in zip((first, second), sides, strict=True):
            print(f"  {name}: {json.dumps(side[key]) if key in side else 'not set'}")


def recipe_schema() -> None:
    """Print the JSON Schema of a recipe file, for editors."""
    from ...plan.recipes.new_recipe import schema

    print(json.dumps(schema(), indent=2))


def every_default(recipe: Any) -> dict[str, Any]:
    """The resolved recipe, and after it the keys that it does not set, with their defaults."""
    found: dict[str, Any] = recipe.resolved()
    whole: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    one = "alternatives" if "alternatives" in found else "steps" if "steps" in found else "method"
    other = {"method", "settings", "steps", "alternatives"} - {one, "settings" if one == "method" else ""}
    return found | {key: value for key, value in whole.items() if key not in found and key not in other}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{index}")
    else:
        yield path, value
