"""`lrc recipe`: its commands, and those that list what a recipe may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import typer

from ..common.help import Command, Group
from ..common.json_output import Json, answered, require_json
from .authoring import recipe_check, recipe_diff, recipe_new, recipe_schema, recipe_show

recipe_app = typer.Typer(help="List, show, write, check and compare recipes.", no_args_is_help=True, cls=Group)


def recipe_list(json_file: Json = None) -> None:
    """List the shipped recipes by family, with what each needs."""
    require_json(json_file)
    from ...plan.load_recipe import load_recipe, shipped, summary
    from ...plan.recipes.describe import START, family, needs

    recipes = {name: (load_recipe(name), summary(text)) for name, text in shipped().items()}
    families: dict[str, list[str]] = {}
    for name, (recipe, _) in recipes.items():
        families.setdefault(family(name, recipe), []).append(name)
    entries: list[dict[str, Any]] = [
        {"name": name, "family": group, "summary": recipes[name][1], "needs": needs(recipes[name][0]), "start": START.get(name)}
        for group, names in families.items()
        for name in names
    ]
    if answered(json_file, entries):
        return
    table: list[tuple[str, str]] = []
    table += [("start here", ""), *((f"  {name}", said) for name, said in START.items())]
    for group in sorted(families, key=lambda group: (group != "lrc's own", group)):
        table += [("", ""), (group, "")]
        for entry in entries:
            if entry["family"] == group:
                table.append((f"  {entry['name']}", f"{entry['summary']} [{', '.join(entry['needs'])}]"))
    _print_columns(table)


def recipe_methods(json_file: Json = None) -> None:
    """List the methods that a recipe may name."""
    require_json(json_file)
    from ...compress.base import methods

    _print_known(methods(), json_file)


def recipe_scores(json_file: Json = None) -> None:
    """List the importance scores and repairs for dropping layers."""
    require_json(json_file)
    from ...depth.base import repairs, scores

    parts: dict[str, Mapping[str, Any]] = {"scores (depth.score)": scores(), "repairs (depth.repair)": repairs()}
    answer = {
        title.split()[0]: {name: {"summary": each.summary, "source": each.source} for name, each in known.items()}
        for title, known in parts.items()
    }
    if answered(json_file, answer):
        return
    rows: list[tuple[str, str]] = []
    for title, known in parts.items():
        rows += [(title, ""), *((f"  {name}", f"{each.summary} [{each.source}]") for name, each in known.items())]
    _print_columns(rows)


def recipe_rules(json_file: Json = None) -> None:
    """List the rules that allocate the budget."""
    require_json(json_file)
    from ...plan.allocation import described

    known = described()
    if not answered(json_file, known):
        _print_columns(list(known.items()))


def _print_known(known: Mapping[str, Any], json_file: str | None) -> None:
    answer = {name: {"summary": each.summary, "source": each.source} for name, each in known.items()}
    if not answered(json_file, answer):
        _print_columns([(name, f"{each.summary} [{each.source}]") for name, each in known.items()])


def _print_columns(rows: list[tuple[str, str]]) -> None:
    """Print names and what they are; the second column is wrapped on a terminal, and whole elsewhere."""
    import sys
    import textwrap
    from shutil import get_terminal_size

    width = max((len(name) for name, said in rows if said), default=0)
    room = get_terminal_size().columns - width - 2 if sys.stdout.isatty() else 10_000
    for name, said in rows:
        if not said:
            print(name)
            continue
        lines = textwrap.wrap(said, max(20, room))
        print(f"{name:<{width}}  {lines[0]}")
        for line in lines[1:]:
            print(f"{'':<{width}}  {line}")


_COMMANDS: dict[str, Callable[..., None]] = {
    "list": recipe_list, "show": recipe_show, "new": recipe_new, "check": recipe_check, "diff": recipe_diff,
    "schema": recipe_schema, "methods": recipe_methods, "scores": recipe_scores, "rules": recipe_rules,
}  # fmt: skip
for name, command in _COMMANDS.items():
    recipe_app.command(name, cls=Command)(command)
