"""The folder of a result whose person named none: after the model, the recipe and the amount, in the working directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...plan.recipe import Recipe

_RECORD = "lrc.json"


def default_folder(model: str, name: str, recipe: Recipe) -> Path:
    """The folder `MODEL-RECIPE-AMOUNT`; the same request always gives the same name, so that it continues its own run.

    Args:
        model: as the user wrote it.
        name: of the recipe: a shipped one, a file, or the record of a result.
        recipe: for its amount; without one the name ends after the recipe.
    """
    path = Path(name)
    said = path.parent.name if path.name == _RECORD else path.stem if path.suffix in (".yaml", ".yml") else name
    last = re.split(r"[/\\:]", model.rstrip("/\\"))[-1].removesuffix(".gguf")
    if last in ("", ".", ".."):
        last = Path(model).resolve().name
    parts = [last, said, _amount(recipe)]
    return Path("-".join(re.sub(r"[^\w.+-]+", "_", part) for part in parts if part))


def _amount(recipe: Recipe) -> str:
    if recipe.ratio is not None:
        return f"{recipe.ratio:g}"
    if recipe.bits is not None:
        return f"{recipe.bits:g}bit"
    if recipe.size is not None:
        return f"{int(recipe.size[:-1]) / 1e6:g}MB"
    if recipe.max_ppl_increase is not None:
        return f"ppl+{100 * recipe.max_ppl_increase:g}"
    if recipe.depth is not None and recipe.depth.drop is not None:
        return f"drop{recipe.depth.drop}"
    return ""
