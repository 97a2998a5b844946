"""A commented recipe to start from, and the JSON Schema by which editors complete one. Both follow from `Recipe`."""

from __future__ import annotations

import importlib.resources
import inspect
import re
import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ...compress.base import methods
from ..load_recipe import SCHEMA_FILE, SCHEMA_LINE, read_recipe
from ..recipe import SOLVED, Recipe
from ..rules.base import rules

_BASIS = """\
# My recipe: say here in one line what it is for.
#
#   lrc plan MODEL --recipe {file}
#   lrc compress MODEL --recipe {file}
method: svd-llm
ratio: 0.3
calibration:
  source: wikitext2*0.875+pydoc*0.125
  samples: 128
  length: 2048
"""
_WIDTH = 110
_AMOUNTS = ("ratio", "bits", "size", "max_ppl_increase")
_EXAMPLES = {
    "bits": 4, "size": "300MB", "max_ppl_increase": "5%", "keep": ["*.v_proj"], "limits": {"*.o_proj": {"min": 0.5}},
    "steps": [{"method": "svd-llm"}, {"method": "gptq"}], "depth": {"score": "block-influence", "drop": 4},
    "alternatives": [{"method": "svd-llm"}, {"method": "gptq", "settings": {"bits": None}}], "refine": {"block": {}},
}  # fmt: skip


def new_recipe(file: str, basis: str | None = None) -> str:
    """The text of a recipe file with every key that a person may want; keys without a value are commented out.

    Args:
        file: its name, for the commands in its head.
        basis: a shipped recipe, or a file, to begin with.

    Raises:
        RecipeError: there is no such basis.
    """
    text = _BASIS.format(file=file) if basis is None else read_recipe(basis)[1]
    body = "\n".join(line for line in text.splitlines() if not line.startswith(SCHEMA_LINE))
    given = yaml.safe_load(body) or {}
    parts = [f"{SCHEMA_LINE}{importlib.resources.files('lrc.recipes') / SCHEMA_FILE}", body.rstrip(), ""]
    parts.append("# ---- further keys: take the mark of a comment away to set one; values are the defaults, or examples")
    told = documented(Recipe)
    for key, field in Recipe.model_fields.items():
        if key in given or (key in _AMOUNTS and any(amount in given for amount in _AMOUNTS)):
            continue
        value = _EXAMPLES[key] if key in _EXAMPLES else _plain(field.get_default(call_default_factory=True))
        parts += ["", *_commented(told.get(key, "")), *_shown({key: value})]
    for key in ("calibration", "gradients"):
        kind = Recipe.model_fields[key].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        missing = [name for name in kind.model_fields if name not in (given.get(key) or {})]
        if key in given and missing:
            inside = documented(kind)
            parts += ["", f"# further keys of {key}:"]
            parts += [line for name in missing for line in _commented(f"{name}: {inside.get(name, '')}", "#   ")]
    return "\n".join(parts) + "\n"


def documented(kind: type[BaseModel]) -> dict[str, str]:
    """Key -> what the class's docstring says of it, under Args or Attributes."""
    text = inspect.getdoc(kind) or ""
    section = re.search(r"^(?:Args|Attributes):\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + section[1] if section else ""):
        names, colon, said = entry.strip().partition(":")
        if colon:
            found |= dict.fromkeys((name.strip() for name in names.split(",")), " ".join(said.split()))
    return found


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, with the names of methods and rules and what each key means."""
    whole: dict[str, Any] = Recipe.model_json_schema(by_alias=True)
    models = {"": whole} | whole.get("$defs", {})
    known = {kind.__name__: kind for kind in _models(Recipe)}
    for name, part in models.items():
        kind = known.get(name or "Recipe")
        part.pop("description", None)
        part.pop("title", None)
        for key, inner in part.get("properties", {}).items():
            inner.pop("title", None)
            said = documented(kind).get(key.replace("-", "_")) if kind else None
            if said:
                inner["description"] = said
        if "method" in part.get("properties", {}):
            part["properties"]["method"] |= {"enum": [*methods(), *([None] if name != "MethodStep" else [])]}
            part["properties"]["method"].pop("anyOf", None)
            part["properties"]["method"].pop("type", None)
    properties = whole["properties"]
    properties["allocation"] |= {"enum": sorted({*SOLVED, *rules()})}
    size_or_text = {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}]}
    for key in ("max_ppl_increase",):  # written as 5% or as a fraction
        properties[key] = {"default": None, "description": properties[key].get("description", "")} | size_or_text
    refine = properties["refine"]
    refine["anyOf"] = [*refine["anyOf"], {"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "a recipe of lrc", **whole}


def _models(kind: type[BaseModel]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    left: list[Any] = [kind]
    while left:
        each = left.pop()
        if isinstance(each, type) and issubclass(each, BaseModel):
            if each not in found:
                found.append(each)
                left += [field.annotation for field in each.model_fields.values()]
        else:
            left += getattr(each, "__args__", ())
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    return None if value is PydanticUndefined else list(value) if isinstance(value, tuple) else value


def _commented(text: str, mark: str = "# ") -> list[str]:
    return [f"{mark}{line}" for line in textwrap.wrap(text, _WIDTH)]


def _shown(entry: dict[str, Any]) -> list[str]:
    ((key, value),) = entry.items()
    written = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return [f"# {key}: {written}"]
