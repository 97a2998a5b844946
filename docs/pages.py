"""Writes the pages of docs/methods from the methods' own files.

    make docs

A page has a fixed order: what the method does, when to use it, its settings, the statistics that it needs, its cost, how to run
it, its recipe, its source, and how it differs from the authors' code. `tests/test_docs.py` fails if a page is not what this
script writes, or if a method's file lacks a section.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from lrc.compress.base import Method, methods
from lrc.compress.options import Shape
from lrc.plan.load_recipe import SCHEMA_FILE, SCHEMA_LINE, load_recipe, shipped, summary

FOLDER = Path(__file__).resolve().parent / "methods"
NEEDS = {
    "gram": "`gram`: mean over tokens of x xᵀ, (in, in), one for each group of targets that read one input",
    "output_gram": "`output_gram`: mean over tokens of y yᵀ, (out, out) per target; or the group's `gram`, if that is cheaper",
    "mean": "`mean`: of the inputs, (in,) per group",
    "abs_mean": "`abs_mean`: mean of |x|, (in,) per group",
    "mean_square": "`mean_square`: mean of x², (in,) per group",
    "peak_abs_mean": "`peak_abs_mean`: the largest over samples of the sample's mean |x|, (in,) per group",
    "grad_gram": "`grad_gram`: mean over tokens of g gᵀ, g = ∂loss/∂y, (out, out) per target; takes a backward pass",
    "fisher_in": "`fisher_in`: mean over samples of the squared gradients of each input channel, (in,) per target; "
    "takes a backward pass",
}
# the fields of a choice for a large square target -> the method's family
FAMILIES = [
    ({"atoms"}, "Dictionaries"),
    ({"bits", "rank"}, "Quantized, corrected by low rank"),
    ({"bits"}, "Quantized"),
    ({"channels"}, "Channels"),
    ({"rank"}, "Low rank"),
]
_LABELS = ("When to use", "Cost", "Source")
_DIFFERENCE = re.compile(r"\bDifferences?(?:\s+from[^:.]{1,40})?:\s")
_COMMAND = re.compile(r"^# +(lrc compress MODEL .*)$", re.MULTILINE)


class LackingError(ValueError):
    """A method's file lacks a section of its page."""


def sections_of(method: Method) -> dict[str, str]:
    """The sections of a method's docstring: 'what', one for each of `_LABELS`, and 'differences' ('' if there are none).

    Raises:
        LackingError: one of the others is missing.
    """
    text = (importlib.import_module(method.solve.__module__).__doc__ or "").strip()
    found: dict[str, list[str]] = defaultdict(list)
    label = "what"
    for paragraph in text.split("\n\n"):
        label = next((each for each in _LABELS if paragraph.startswith(f"{each}:")), label)
        found[label].append(paragraph.removeprefix(f"{label}:").strip())
    lacking = [label for label in ("what", *_LABELS) if not found[label]]
    if lacking:
        raise LackingError(f"{_file(method)} does not say: {', '.join(lacking)}")
    said = {label: "\n\n".join(found[label]) for label in ("what", *_LABELS)}
    head, *rest = _DIFFERENCE.split(said["Source"], maxsplit=1)
    return said | {"Source": head.strip(), "differences": _capital("".join(rest).strip())}


def _file(method: Method) -> str:
    """The method's file, from the root of the repository."""
    return method.solve.__module__.partition(".")[2].replace(".", "/") + ".py"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def family(method: Method) -> str:
    """The family of a method in the index, by its options."""
    options = method.options(Shape(4096, 4096, 2), method.settings(), 1)
    held = {key for key, value in vars(options[-1].choice).items() if value is not None} if options else set()
    return next((name for keys, name in FAMILIES if keys <= held), "Others")


def settings(method: Method) -> str:
    """A table of a method's settings, from their schema.

    Raises:
        LackingError: a setting has no description.
    """
    schema = method.settings.model_json_schema()
    fields: dict[str, Any] = schema.get("properties", {})
    if not fields:
        return "None."
    bare = [name for name, field in fields.items() if not field.get("description")]
    if bare:
        raise LackingError(f"{_file(method)}: settings without a description: {', '.join(bare)}")
    rows = [
        f"| `{name}` | `{_shown(field['default']) if 'default' in field else 'required'}` | {_values(field)} "
        f"| {field['description'].replace('|', chr(92) + '|')} |"
        for name, field in fields.items()
    ]
    return "\n".join(["| setting | default | values | meaning |", "|---|---|---|---|", *rows])


def _shown(value: Any) -> str:
    """A value as a recipe writes it (0.0 and False are equal in Python)."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _values(field: dict[str, Any]) -> str:
    kinds = field.get("anyOf", [field])
    return " or ".join(_kind(kind) for kind in kinds)


def _kind(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return ", ".join(f"`{_shown(value)}`" for value in kind["enum"])
    if "const" in kind:
        return f"`{_shown(kind['const'])}`"
    name = {"integer": "whole number", "number": "number", "boolean": "true or false", "null": "null", "array": "list"}
    bounds = [
        f"{sign} {kind[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in kind
    ]
    return " ".join([name.get(kind.get("type", ""), kind.get("type", "any")), ", ".join(bounds)]).strip()


def recipes_of(method: Method) -> list[str]:
    """The shipped recipes that use a method; the recipe of the same name comes first."""
    using = []
    for name in shipped():
        recipe = load_recipe(name)
        steps = [*recipe.steps, *(step for other in getattr(recipe, "alternatives", ()) for step in (other, *other.steps))]
        if method.name in (recipe.method, *(step.method for step in steps)):
            using.append(name)
    return sorted(using, key=lambda name: (name != method.name, name))


def page(method: Method) -> str:
    """The Markdown of one method."""
    said, using = sections_of(method), recipes_of(method)
    texts = {name: text.removeprefix(f"{SCHEMA_LINE}{SCHEMA_FILE}\n") for name, text in shipped().items()}
    if not using:
        raise LackingError(f"no shipped recipe uses the method {method.name}")
    commands = [match for name in using for match in _COMMAND.findall(texts[name])]
    more = ", ".join(f"`{name}`" for name in using[1:])
    sections = {
        "What it does": said["what"],
        "When to use it": _capital(said["When to use"]),
        "Settings": settings(method),
        "Statistics": "\n".join(f"* {NEEDS.get(need, f'`{need}`')}" for need in sorted(method.all_needs))
        or "None: it looks at the weights only, and no calibration text is read.",
        "Cost": _capital(said["Cost"]),
        "How to run it": "\n".join(f"    {command}" for command in dict.fromkeys(commands)),
        "Recipe": f"`recipes/{using[0]}.yaml`:\n\n```yaml\n{texts[using[0]].strip()}\n```"
        + (f"\n\nAlso in: {more}." if more else ""),
        "Source": said["Source"],
        "Differences from the authors' code": said["differences"] or "None that lrc knows of.",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    note = f"<!-- written by docs/pages.py from {_file(method)}: edit that file, then run make docs -->"
    return f"# {method.name}\n\n{note}\n\n{body}\n"


def index(known: dict[str, Method]) -> str:
    """docs/methods/README.md: all methods by family."""
    by_family: dict[str, list[Method]] = defaultdict(list)
    for method in known.values():
        by_family[family(method)].append(method)
    lines = ["# Methods", "", "<!-- written by docs/pages.py: run make docs -->", ""]
    order = [name for _, name in FAMILIES[::-1]] + ["Others"]
    for name in sorted(by_family, key=order.index):
        lines += [f"## {name}", "", "| method | what it is | statistics | source |", "|---|---|---|---|"]
        for method in by_family[name]:
            needs = ", ".join(f"`{need}`" for need in sorted(method.all_needs)) or "none"
            what = method.summary.partition(": ")[2] or method.summary
            lines.append(f"| [`{method.name}`]({method.name}.md) | {_capital(what)} | {needs} | {method.source} |")
        lines.append("")
    own = [name for name in shipped() if name not in known]
    lines += ["## Recipes that are no method of their own", "", "| recipe | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {summary(shipped()[name])} |" for name in own]
    lines += ["", "Dropping layers: [../depth.md](../depth.md)."]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """File name -> Markdown of every page."""
    known = methods()
    return {"README.md": index(known)} | {f"{name}.md": page(method) for name, method in known.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    written = pages()
    for stale in {path.name for path in FOLDER.glob("*.md")} - written.keys():
        (FOLDER / stale).unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(written)} pages in {FOLDER}")


if __name__ == "__main__":
    main()
