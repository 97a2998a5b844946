"""`lrc recipe`: list and show recipes and what they may name, and check one."""

from __future__ import annotations

from typing import Annotated

import typer

from .common.options import Set

recipe_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)


@recipe_app.command("list")
def recipe_list() -> None:
    """List the shipped recipes."""
    from ..plan.load_recipe import shipped, summary

    recipes = shipped()
    for name, text in recipes.items():
        print(f"{name:<{max(map(len, recipes))}}  {summary(text)}")


@recipe_app.command("methods")
def recipe_methods() -> None:
    """List the methods that a recipe may name."""
    from ..compress.base import methods

    known = methods()
    for name, method in known.items():
        print(f"{name:<{max(map(len, known))}}  {method.summary} [{method.source}]")


@recipe_app.command("scores")
def recipe_scores() -> None:
    """List the importance scores and repairs for dropping layers."""
    from ..depth.base import repairs, scores

    width = max(map(len, [*scores(), *repairs()]))
    for title, known in (("scores (depth.score)", scores()), ("repairs (depth.repair)", repairs())):
        print(title)
        for name, each in known.items():
            print(f"  {name:<{width}}  {each.summary} [{each.source}]")


@recipe_app.command("rules")
def recipe_rules() -> None:
    """List the rules that allocate the budget."""
    from ..plan.allocation import described

    known = described()
    for name, line in known.items():
        print(f"{name:<{max(map(len, known))}}  {line}")


@recipe_app.command("show")
def recipe_show(name: Annotated[str, typer.Argument(help="A shipped recipe's name.")]) -> None:
    """Print a recipe.

    Redirect it into a file to start one of your own.
    """
    from ..plan.load_recipe import read_recipe

    print(read_recipe(name)[1], end="")


@recipe_app.command("check")
def recipe_check(
    file: Annotated[str, typer.Argument(help="A YAML file, or a shipped recipe's name.")], set_: Set = None
) -> None:
    """Check a recipe and print it with all defaults."""
    import yaml

    from ..plan.load_recipe import load_recipe

    print(yaml.safe_dump(load_recipe(file, settings=set_ or []).resolved(), sort_keys=False), end="")
